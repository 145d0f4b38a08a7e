"""Whole models with INC's FP8 layers, written as INC's own ``load`` brings them back."""

import copy
import re
from pathlib import Path
from typing import Any

from torch import nn

from fadapt.bases.inc_fp8 import IncFp8
from fadapt.bases.inc_fresh import METHOD
from fadapt.bases.protocol import base_of
from fadapt.errors import UnsupportedLayerError, listing
from fadapt.quieting import quiet
from fadapt.shell import share


def save_inc_model(model: Any, folder: str | Path) -> None:
    """Write a transformers model some of whose layers are INC's, as merging ``to="inc-fp8"`` makes.

    ``neural_compressor.torch.quantization.load(folder, format="huggingface")`` loads it. INC's own
    ``save`` writes the files; it needs the configuration of a model that INC itself converted,
    which is made here from what the layers are.

    Args:
        model: a ``PreTrainedModel``, left as it is.
        folder: made if need be.

    Raises:
        UnsupportedLayerError: no such layer in it, or one that was not made by a merge (INC's
            ``save`` writes what INC converted).
    """
    with quiet():
        from neural_compressor.torch.quantization import FP8Config, save

    layers = {p: m for p, m in model.named_modules() if type(m).__name__ == "PatchedLinear"}
    if not layers:
        raise UnsupportedLayerError(f"this {type(model).__name__} has no FP8 layer of INC.")
    bases: dict[str, Any] = {path: base_of(layer) for path, layer in layers.items()}
    odd = [p for p, b in bases.items() if b.layer.mode != "qdq" or b.layer.held is not None]
    kinds = {(b.layer.kind, b.dtype) for b in bases.values()}
    if odd or len(kinds) != 1:
        raise UnsupportedLayerError(
            f"save_inc_model writes QDQ layers with a scale a channel, all of one dtype: "
            f"{listing(odd) if odd else kinds} differ. INC's own save writes what INC converted."
        )
    assert all(isinstance(base, IncFp8) for base in bases.values())
    others = [p for p, m in model.named_modules() if isinstance(m, nn.Linear)]
    names = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}
    with quiet():
        shell: Any = share(model, {})
        shell.config = copy.deepcopy(model.config)  # INC's save writes into it
        shell.qconfig = {
            "": FP8Config(
                use_qdq=True,
                scale_method=METHOD,
                hp_dtype=names[str(next(iter(bases.values())).dtype)],
                observer="maxabs",
                # Regular expressions that INC searches for.
                blocklist={"types": [], "names": [f"^{re.escape(path)}$" for path in others]},
                dump_stats_path=str(Path(folder) / "stats"),
            )
        }
        save(shell, str(folder), format="huggingface")

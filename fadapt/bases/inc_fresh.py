"""INC's FP8 layers made anew, by INC's own ``prepare`` and ``convert``: what a merge writes into.

INC makes a layer from a float one that has seen inputs. Here that is one of a single input, whose
value is the largest that the real layer saw; the weight and its scales are put in afterwards.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from tempfile import TemporaryDirectory
from typing import Any

import torch
from neural_compressor.torch.quantization import FP8Config, convert, prepare
from torch import Tensor, nn

from fadapt.bases.inc_fp8 import IncFp8, inc_layer
from fadapt.bases.protocol import Base, base_of
from fadapt.errors import ConfigError
from fadapt.quieting import quiet

METHOD = "act_maxabs_pow2_weights_pcs_maxabs_pow2"
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def by_inc(model: Any, run: Callable[[], object], dtype: torch.dtype, blocked: Any = ()) -> Any:
    """``model`` changed in place by INC: E4M3, QDQ off a Gaudi, a scale a channel of W, powers of
    two for the activations.

    Args:
        model: of float layers.
        run: runs calibration inputs through it.
        dtype: the high-precision one.
        blocked: names of modules that stay as they are.

    Raises:
        ConfigError: a dtype that INC does not take.
    """
    if dtype not in _DTYPES:
        raise ConfigError(
            f"INC's FP8 layers compute in {', '.join(_DTYPES.values())}, not {dtype}."
        )
    device = next(model.parameters()).device
    with quiet(), TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        config = FP8Config(
            use_qdq=device.type != "hpu",
            scale_method=METHOD,
            hp_dtype=_DTYPES[dtype],
            observer="maxabs",
            blocklist={"types": [], "names": list(blocked)},
            dump_stats_path=f"{folder}/stats",
        )
        model = prepare(model, config)
        with torch.no_grad():
            run()
        return convert(model)


def empty_inc(like: Base, amax: float) -> IncFp8:
    """A base of the shape of ``like``, as INC makes it for inputs of up to ``amax``; its weight is
    not written yet."""
    found = base_of(_template(1, amax, like.dtype, like.device, False))
    assert isinstance(found, IncFp8)
    n_out, n_in = like.out_features, like.in_features
    return replace(
        found,
        weight=torch.empty(n_in, n_out, dtype=found.weight.dtype, device=like.device),
        scale=torch.ones(n_out, 1, dtype=found.scale.dtype, device=like.device),
    )


def fresh_layer(base: IncFp8) -> nn.Module:
    """A ``PatchedLinear`` of INC that holds what :func:`empty_inc` began and a merge filled in."""
    made = _template(base.out_features, 1.0, base.dtype, base.device, base.bias is not None)
    layer: Any = inc_layer(base, made)
    layer.in_features = base.in_features
    assert base.act_scale is not None
    for name, value in (("scale", base.act_scale), ("scale_inv", base.act_scale.reciprocal())):
        old: Tensor = getattr(layer.quant_input, name)
        setattr(layer.quant_input, name, nn.Parameter(value.detach().to(old).reshape(old.shape)))
    return layer.requires_grad_(False)  # type: ignore[no-any-return]


@lru_cache(maxsize=64)
def _template(
    n_out: int, amax: float, dtype: torch.dtype, device: torch.device, bias: bool
) -> nn.Module:
    """INC's layer of one input; to be copied, not written to."""
    linear = nn.utils.skip_init(nn.Linear, 1, n_out, bias, device=device, dtype=dtype)
    for p in linear.parameters():
        p.data.fill_(1.0)
    model = nn.Sequential(linear)
    x = torch.full((1, 1), amax, device=device, dtype=dtype)
    found: nn.Module = copy.deepcopy(by_inc(model, lambda: model(x), dtype)[0])
    return found

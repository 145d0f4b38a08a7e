"""The two files of a PEFT checkpoint folder: each read whole, and written whole or not at all."""

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from fadapt.errors import CheckpointError, listing

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_json(folder: Path) -> dict[str, Any]:
    """The content of ``adapter_config.json``."""
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise CheckpointError(
            f"{str(folder)!r} is {what}; a PEFT checkpoint is a local folder with {CONFIG} and "
            f"{WEIGHTS}. For one on a hub, download it first (huggingface_hub.snapshot_download)."
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        have = listing(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise CheckpointError(f"{str(folder)!r} has no {CONFIG}; it holds {have}.") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise CheckpointError(f"{str(folder / CONFIG)!r} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{str(folder / CONFIG)!r} is not a JSON object.")
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The content of ``adapter_model.safetensors``."""
    _need_safetensors()
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise CheckpointError(
                f"{str(folder)!r} holds its weights as a pickle (adapter_model.bin), which can run "
                "any code when it is read. Convert it where you trust it: "
                "safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), "
                f"'{WEIGHTS}')."
            )
        raise CheckpointError(f"{str(folder)!r} has no {WEIGHTS}.")
    try:
        # Not load_file: it maps the file, and who writes into the file writes into the tensors.
        tensors: dict[str, Tensor] = load(path.read_bytes())
    except SafetensorError as error:
        raise CheckpointError(
            f"{str(path)!r} ({path.stat().st_size} bytes) is not a whole safetensors file: {error}."
        ) from error
    return tensors


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Replace both files, so that whenever the process ends the folder holds the old pair, the new
    one, or (for an instant) no config; never a mixture."""
    _need_safetensors()
    from safetensors.torch import save

    # Copies: safetensors refuses views of one storage, such as the slices of a stack.
    data = save(
        {k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()}, {"format": "pt"}
    )
    # Sorted, but not inside: of the keys of a pattern the first that matches counts.
    text = (json.dumps(dict(sorted(config.items())), indent=2) + "\n").encode()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is a file; a PEFT checkpoint is a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / CONFIG
    new = [(folder / f".{name}.{os.getpid()}.new", folder / name) for name in (WEIGHTS, CONFIG)]
    try:
        for (temporary, _), content in zip(new, (data, text), strict=True):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if target.exists() and target.read_bytes() != text:
            # Old options with new weights would load, and be wrong. Better none, for an instant.
            target.unlink()
        for temporary, final in new:
            os.replace(temporary, final)
    finally:
        for temporary, _ in new:
            temporary.unlink(missing_ok=True)


def _need_safetensors() -> None:
    if find_spec("safetensors") is None:
        raise CheckpointError(
            "PEFT's checkpoints are safetensors files: pip install 'fadapt[peft]' (or safetensors)."
        )

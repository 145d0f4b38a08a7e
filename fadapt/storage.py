"""A run's state on disk: one safetensors file, replaced whole or not at all."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fadapt.errors import CheckpointError


def write_state(path: Path, tensors: Mapping[str, Tensor], about: Any) -> None:
    """Write the file beside its place, bring it to the disk, then put it in its place.

    Args:
        path: of the file.
        tensors: on any device; any dtype that safetensors knows.
        about: JSON.

    Raises:
        CheckpointError: it could not be written (a full disk, a missing right); what was at
            ``path`` before is still there.
    """
    from safetensors.torch import save

    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_bytes(path, save(plain, {"fadapt": json.dumps(about)}))


def write_bytes(path: Path, content: bytes) -> None:
    """The same for bytes."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        held = "; what was there before is intact" if path.exists() else ""
        raise CheckpointError(
            f"could not write {path} ({len(content):,} bytes): {error.strerror}{held}. Make room, "
            "or choose another place with --out."
        ) from error


def read_state(path: Path) -> tuple[dict[str, Tensor], Any]:
    """What :func:`write_state` wrote.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path}: there is no state to go on from.")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["fadapt"])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a state of fadapt ({error}).") from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

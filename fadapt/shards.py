"""safetensors files rewritten tensor by tensor: the header stays, and no file is held in memory."""

import json
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fadapt.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CHUNK = 2**24


class Entry(NamedTuple):
    """Where a tensor lies in a file: its dtype, its shape, and its bytes."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> tuple[bytes, dict[str, Entry]]:
    """The header as it stands, length included; and the tensors, in the order of their bytes.

    Raises:
        CheckpointError: it is no safetensors file, or a part of it is missing.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size, 2**27):
            raise CheckpointError(f"{path}: not a safetensors file, or only a part of one.")
        raw = file.read(length)
    try:
        header = {k: v for k, v in json.loads(raw).items() if k != "__metadata__"}
        entries = {
            name: Entry(
                _DTYPES.get(at["dtype"]),
                tuple(at["shape"]),
                8 + length + at["data_offsets"][0],
                8 + length + at["data_offsets"][1],
            )
            for name, at in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its safetensors header is broken ({error}).") from error
    ends = [entry.stop for entry in entries.values()]
    if max(ends, default=8 + length) != size:
        raise CheckpointError(
            f"{path}: {size:,} bytes, but its header speaks of {max(ends):,}: it is cut off."
        )
    ordered = dict(sorted(entries.items(), key=lambda item: item[1].start))
    return length.to_bytes(8, "little") + raw, ordered


def mapped(path: Path, entries: dict[str, Entry]) -> dict[str, Tensor]:
    """The tensors of a file, read from disk where they are touched: never all in memory."""
    with path.open("rb") as file:
        # A private map: nothing that is written to a tensor would reach the file.
        view = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
    found = {}
    for name, at in entries.items():
        if at.dtype is None or at.start == at.stop:
            continue
        count = (at.stop - at.start) // at.dtype.itemsize
        flat = torch.frombuffer(view, dtype=at.dtype, count=count, offset=at.start)
        found[name] = flat.view(at.shape)
    return found


def rewrite(source: Path, target: Path, changed: Callable[[str], Tensor | None]) -> None:
    """Write ``target`` as ``source`` with some tensors replaced, each by one of its own size.

    Args:
        source: a safetensors file.
        target: made whole, or not at all.
        changed: the new tensor of this name, or None for the old one; asked for one after another.
    """
    raw, entries = read_header(source)
    beside = target.with_name(f".{target.name}.partial")
    with source.open("rb") as old, beside.open("wb") as new:
        new.write(raw)
        for name, at in entries.items():
            tensor = changed(name)
            if tensor is None:
                old.seek(at.start)
                for piece in _pieces(old.read, at.stop - at.start):
                    new.write(piece)
                continue
            if tensor.dtype != at.dtype or tuple(tensor.shape) != at.shape:
                raise CheckpointError(
                    f"{source}: {name!r} is {at.dtype} {list(at.shape)} and would become "
                    f"{tensor.dtype} {list(tensor.shape)}."
                )
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            new.write(flat.data)
        new.flush()
        os.fsync(new.fileno())
    os.replace(beside, target)


def _pieces(read: Callable[[int], bytes], size: int) -> Iterator[bytes]:
    while size > 0:
        piece = read(min(size, _CHUNK))
        if not piece:
            raise OSError("the file became shorter while it was read")
        size -= len(piece)
        yield piece

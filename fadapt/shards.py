"""safetensors files read and written tensor by tensor: no file is held in memory."""

import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fadapt.errors import CheckpointError
from fadapt.quieting import quiet

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


_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor lies in a file: its dtype by the file's name for it, its shape, its bytes."""

    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None for one that is not read here, only copied."""
        return _DTYPES.get(self.kind)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.stop - self.start


class Piece(NamedTuple):
    """A tensor of a file that is to be written.

    Attributes:
        name: in that file.
        kind, shape: its dtype and shape, as the header says them.
        size: in bytes.
        source: the file that it is copied from, and where it starts there; None: it is made.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    size: int
    source: tuple[Path, int] | None = None


def copied(name: str, file: Path, at: Entry) -> Piece:
    """The piece that is this entry of ``file``."""
    return Piece(name, at.kind, at.shape, at.size, (file, at.start))


def piece_like(name: str, tensor: Tensor) -> Piece:
    """The piece for a tensor that has this one's dtype and shape."""
    size = tensor.numel() * tensor.element_size()
    return Piece(name, _NAMES[tensor.dtype], tuple(tensor.shape), size)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata; and the tensors, in the order of their bytes.

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
        header = json.loads(raw)
        metadata = dict(header.pop("__metadata__", {}))
        entries = {
            name: Entry(
                str(at["dtype"]),
                tuple(at["shape"]),
                8 + length + at["data_offsets"][0],
                8 + length + at["data_offsets"][1],
            )
            for name, at in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its safetensors header is broken ({error}).") from error
    for name, at in entries.items():
        if at.dtype is not None and math.prod(at.shape) * at.dtype.itemsize != at.size:
            raise CheckpointError(
                f"{path}: its header gives {name!r} {at.kind} {list(at.shape)} {at.size:,} bytes."
            )
    ends = [entry.stop for entry in entries.values()]
    if max(ends, default=8 + length) != size:
        raise CheckpointError(
            f"{path}: {size:,} bytes, but its header speaks of {max(ends):,}: it is cut off."
        )
    ordered = dict(sorted(entries.items(), key=lambda item: item[1].start))
    return metadata, ordered


def mapped(path: Path, entries: dict[str, Entry]) -> dict[str, Tensor]:
    """The tensors of a file, read from disk where they are touched: never all in memory. They
    cannot be written to."""
    with path.open("rb") as file:
        # Of a writable map the kernel reserves memory for a copy, and so refuses a larger file.
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    found = {}
    with quiet():  # torch warns of tensors that cannot be written to
        for name, at in entries.items():
            if at.dtype is None or at.start == at.stop:
                continue
            count = (at.stop - at.start) // at.dtype.itemsize
            flat = torch.frombuffer(view, dtype=at.dtype, count=count, offset=at.start)
            found[name] = flat.view(at.shape)
    return found


def write(
    target: Path,
    pieces: Sequence[Piece],
    metadata: Mapping[str, str],
    make: Callable[[str], Tensor],
) -> None:
    """Write a safetensors file, one tensor after the other.

    Args:
        target: made whole, or not at all.
        pieces: in the order in which they are to lie.
        metadata: of the header.
        make: the tensor of this name, for a piece that is not copied.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for piece in pieces:
        header[piece.name] = {
            "dtype": piece.kind,
            "shape": list(piece.shape),
            "data_offsets": [at, at + piece.size],
        }
        at += piece.size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    beside = target.with_name(f".{target.name}.partial")
    with beside.open("wb") as new:
        new.write(len(raw).to_bytes(8, "little") + raw)
        for piece in pieces:
            if piece.source is not None:
                file, start = piece.source
                with file.open("rb") as old:
                    old.seek(start)
                    for part in _parts(old.read, piece.size):
                        new.write(part)
                continue
            tensor = make(piece.name)
            if _NAMES.get(tensor.dtype) != piece.kind or tuple(tensor.shape) != piece.shape:
                raise CheckpointError(
                    f"{target.name}: {piece.name!r} is to be {piece.kind} {list(piece.shape)}, and "
                    f"became {tensor.dtype} {list(tensor.shape)}."
                )
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            new.write(flat.data)
            del tensor, flat  # before the next one is made
        new.flush()
        os.fsync(new.fileno())
    os.replace(beside, target)


def _parts(read: Callable[[int], bytes], size: int) -> Iterator[bytes]:
    while size > 0:
        piece = read(min(size, _CHUNK))
        if not piece:
            raise OSError("the file became shorter while it was read")
        size -= len(piece)
        yield piece

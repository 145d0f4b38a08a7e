"""The way back from a merge, bit for bit: what rounding lost, packed small.

Undoing the adapter in float predicts the old codes up to few of them; the record holds the
exclusive or of the prediction with the truth, deflated, and a checksum of the truth. For a format
without a grid (AQLM) the prediction is the merged layer as it is.
"""

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fadapt.adapted import Step, row_blocks, unmerged, unmerged_bias
from fadapt.bases.grid import Gridded
from fadapt.errors import AdapterError

Record = dict[str, Tensor]


def record(old: Any, new: Any, steps: Sequence[Step], ready: Sequence[Step]) -> Record:
    """What turns ``new``, merged from ``old``, back into it.

    Args:
        old, new: bases of one format.
        steps: as the caller gave them, and will give them again to undo.
        ready: as they were prepared on ``old``.

    Returns:
        Tensors only, so that safetensors can hold it: the differences of the scales, of the bias
        and of the codes, checksums, and the norms that the merged weight does not tell any more.
    """
    found: Record = {
        f"norm.{k}": to.params.norm
        for k, (step, to) in enumerate(zip(steps, ready, strict=True))
        if hasattr(to.params, "norm") and not hasattr(step.params, "norm")
    }
    steps = _normed(steps, found)
    if old.bias is None and new.bias is not None:
        old = replace(old, bias=torch.zeros_like(new.bias))
    guesses = _small(_with_old_bias(new, steps))
    for name, truth in _small(old).items():
        found |= _packed(name, [(truth, guesses[name])])
    if not isinstance(old, Gridded):
        return found
    pairs = ((old.codes()[rows], guess) for rows, guess in _guesses(new, old.grid(), steps))
    return found | _packed("codes", pairs)


def restore(new: Any, steps: Sequence[Step], found: Record, path: str) -> Any:
    """The base that ``new`` was merged from.

    Raises:
        AdapterError: the record is not of this layer, or the numbers come out otherwise here.
    """
    steps = _normed(steps, found)
    predicted = _with_old_bias(new, steps)
    small = {
        name: _unpacked(name, found, guess.shape, [guess], path)
        for name, guess in _small(predicted).items()
    }
    old = _with_small(predicted, small)
    if not isinstance(new, Gridded):
        return old
    grid = old.grid()
    guesses = (guess for _, guess in _guesses(new, grid, steps))
    codes = torch.empty_like(new.codes())
    codes.copy_(_unpacked("codes", found, codes.shape, guesses, path))
    return old.on_grid(grid, codes)


def _normed(steps: Sequence[Step], found: Record) -> list[Step]:
    """The steps, with the recorded norms where they have none (DoRA)."""
    return [
        step._replace(params=step.method.prepared_type(*step.params, found[f"norm.{k}"]))
        if f"norm.{k}" in found
        else step
        for k, step in enumerate(steps)
    ]


def _guesses(new: Any, grid: Any, steps: Sequence[Step]) -> Iterator[tuple[slice, Tensor]]:
    """The old codes, as undoing the steps in float has them."""
    kind = torch.promote_types(new.dtype, torch.float32)
    for rows in row_blocks(new):
        weight = new.rows(rows).dequantize(kind)
        # What cannot be undone in float (DoRA's magnitude of 0) makes the record larger, no more.
        with contextlib.suppress(AdapterError):
            weight = unmerged(weight, steps, rows)
        part = (
            grid
            if grid.tall
            else replace(
                grid, scale=grid.scale[rows], zero=None if grid.zero is None else grid.zero[rows]
            )
        )
        yield rows, part.nearest(weight.nan_to_num().to(kind))


def _with_old_bias(new: Any, steps: Sequence[Step]) -> Any:
    bias = unmerged_bias(new.bias, steps)
    return new if bias is None else replace(new, bias=bias.to(new.bias.dtype))


def _small(base: Any) -> dict[str, Tensor]:
    """All leaves but the codes; of a format without a grid, all."""
    if isinstance(base, Gridded):
        grid, bias = base.grid(), base.bias
        found = {"scale": grid.scale, "zero": grid.zero, "bias": bias}
        return {name: t for name, t in found.items() if t is not None}
    leaves, _ = tree_flatten(base)
    return {f"leaf.{k}": leaf for k, leaf in enumerate(leaves)}


def _with_small(base: Any, small: dict[str, Tensor]) -> Any:
    if isinstance(base, Gridded):
        grid = replace(base.grid(), scale=small["scale"], zero=small.get("zero"))
        found = base.on_grid(grid, base.codes())
        return replace(found, bias=small["bias"]) if "bias" in small else found
    _, spec = tree_flatten(base)
    return tree_unflatten([small[f"leaf.{k}"] for k in range(len(small))], spec)


def _bytes(tensor: Tensor) -> Tensor:
    """uint8 ``[bytes of an element, elements]``: equal high bytes lie together, for deflate."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).reshape(-1, tensor.element_size()).T


def _packed(name: str, pairs: Any) -> Record:
    crc, sizes, parts = 0, [], []
    for truth, guess in pairs:
        true = _bytes(truth).contiguous()
        crc = zlib.crc32(true.numpy().tobytes(), crc)
        wrong = (true ^ _bytes(guess)).numpy().tobytes()
        parts.append(zlib.compress(wrong, 6))
        sizes.append(len(parts[-1]))
    packed = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
    return {name: packed, f"{name}.parts": torch.tensor([crc, *sizes])}


def _unpacked(name: str, found: Record, shape: Any, guesses: Any, path: str) -> Tensor:
    if name not in found:
        raise AdapterError(f"layer {path!r}: the undo record has no {name!r}; it is of another.")
    wanted, *sizes = found[f"{name}.parts"].tolist()
    packed, crc, start, out = found[name].cpu().numpy().tobytes(), 0, 0, []
    for guess, size in zip(guesses, sizes, strict=False):
        wrong = bytearray()  # of bytes that are no record: of no length that fits
        with contextlib.suppress(zlib.error):
            wrong = bytearray(zlib.decompress(packed[start : start + size]))
        start += size
        guessed = _bytes(guess)
        if len(wrong) != guessed.numel():
            break
        true = torch.frombuffer(wrong, dtype=torch.uint8).view(guessed.shape) ^ guessed
        crc = zlib.crc32(true.contiguous().numpy().tobytes(), crc)
        flat = true.T.clone(memory_format=torch.contiguous_format).reshape(-1).view(guess.dtype)
        out.append(flat.reshape(guess.shape).to(guess.device))
    if crc != wanted or len(out) != len(sizes):
        raise AdapterError(
            f"layer {path!r}: undoing the merge does not give back what was recorded ({name}). The "
            "record is of another merge, or this machine rounds products otherwise than the one "
            "that merged. unmerge without undo= is within one step of the old weight."
        )
    return torch.cat(out).reshape(shape)

"""Merging into AQLM codes, where rounding to nearest is a search: what works, and what it keeps.

With the codebooks as they are, a change well below the codes' own error moves no code, and the
merged layer is the old one. What does help is to solve for codebooks and scales as well (as the
continuous half of PV-tuning does: Malinovskii et al. 2024, arXiv:2405.14852, section 3.2), to weigh
errors by the inputs, to start from the weight that was once quantized, or to leave the rest beside
the codes (:func:`fadapt.merge_with_remainder`).
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fadapt.adapted import Adapted, row_blocks, with_steps
from fadapt.errors import AdapterError, ConfigError, MergeError
from fadapt.layer_merge import not_finite
from fadapt.measure import shares

_SAMPLE = 64  # rows that the refusal measures


@dataclass(frozen=True)
class Recode:
    """How to merge into AQLM layers.

    Args:
        beam: combinations of codes that the search keeps.
        rounds: how often codebooks and scales are solved for and the codes searched anew; 0 leaves
            the codebooks alone.
        original: ``{path: W [out, in]}``, the weights that were once quantized, where they are
            known: the codes are then fitted to these with the adapter in them, and not to their own
            approximation.
        seconds: for one layer: then the search ends where it stands, and no further round starts;
            None for no limit.
        progress: called with ``(path, round, rounds, relative squared error)``.

    Raises:
        ConfigError: a value out of range.
    """

    beam: int = 8
    rounds: int = 3
    original: Mapping[str, Tensor] | None = None
    seconds: float | None = None
    progress: Callable[[str, int, int, float], Any] | None = None

    def __post_init__(self) -> None:
        if self.beam < 1 or self.rounds < 0:
            raise ConfigError(
                f"beam must be at least 1 and rounds at least 0, got {self.beam} and {self.rounds}."
            )

    def until(self) -> float | None:
        """When a layer that starts now is to end, as ``time.monotonic()`` counts."""
        return None if self.seconds is None else time.monotonic() + self.seconds


def refuse(adapted: Adapted, path: str) -> None:
    """Raise MergeError, with the share of the delta that the present codebooks would take.

    An adapter that changes nothing is not refused.
    """
    from fadapt.bases.aqlm_encode import recode

    if all(_unchanged(adapted, rows) for rows in row_blocks(adapted)):
        return
    group = adapted.base.out_group_size
    rows = slice(0, min(adapted.out_features, max(1, _SAMPLE // group) * group))
    part = adapted.rows(rows)
    old, target = part.base.dequantize(torch.float32), part.dequantize(torch.float32)
    new = recode(part.base, target, None, 4).dequantize(torch.float32)
    kept = float(shares([(old, target, new)]).captured)
    raise MergeError(
        f"layer {path!r} is AQLM: with its codebooks as they are, merging would keep "
        f"{max(kept, 0.0):.0%} of the adapter's change (measured on {rows.stop} of "
        f"{adapted.out_features} rows). Pass aqlm=fadapt.Recode() to solve for codebooks too, with "
        "moments= and original= where you have them, and read fadapt.merge_report; or keep the "
        "rest beside the codes (fadapt.merge_with_remainder); or merge into another format "
        "(to='int8')."
    )


def recoded(
    adapted: Adapted, path: str, how: Recode, moment: Tensor | None, safe: bool = True
) -> Any:
    """The base with other codes, codebooks and scales, closest to the merged weight.

    Never further from it, in the norm that ``moment`` gives, than the base is as it stands.

    Raises:
        MergeError: with ``safe``, NaN or Inf in the merged weight.
    """
    base = adapted.base
    if all(_unchanged(adapted, rows) for rows in row_blocks(adapted)):
        return base
    return _refined(base, _target(adapted, path, how, safe), path, how, moment, how.until())


def encoded(
    adapted: Adapted,
    path: str,
    form: Any,
    how: Recode,
    moment: Tensor | None,
    generator: torch.Generator | None,
    safe: bool = True,
) -> Any:
    """The merged weight as AQLM of these sizes, from nothing; see :mod:`fadapt.bases.aqlm_fresh`.

    Args:
        form: a :class:`fadapt.formats.AqlmFormat`.
        generator: that draws the first vectors of the codebooks.

    Raises:
        ConfigError: no generator.
        MergeError: with ``safe``, NaN or Inf in the merged weight.
    """
    from fadapt.bases.aqlm_fresh import encode

    if generator is None:
        raise ConfigError(
            "merging to AQLM draws the first vectors of its codebooks: pass "
            "generator=torch.Generator().manual_seed(...). The global one is never read."
        )
    until = how.until()
    target = _target(adapted, path, how, safe)
    sizes = dict(form._asdict(), second_moment=moment, beam=how.beam, generator=generator)
    first = encode(target.to(adapted.dtype), None, rounds=0, until=until, **sizes)
    return _refined(first, target, path, how, moment, until)


def _refined(
    base: Any, target: Tensor, path: str, how: Recode, moment: Tensor | None, until: float | None
) -> Any:
    """Codes searched, then codebooks solved for and codes searched again, while it helps."""
    from fadapt.bases.aqlm_encode import error_of, recode, tune_codebooks
    from fadapt.bases.aqlm_search import over

    found = recode(base, target, moment, how.beam, until)
    best, least = base, error_of(base, target, moment)
    for k in range(how.rounds + 1):
        error = error_of(found, target, moment)
        if error < least:
            best, least = found, error
        if how.progress is not None:
            how.progress(path, k, how.rounds, least)
        if k == how.rounds or over(until):
            break
        found = tune_codebooks(found, target, moment)
        tuned = error_of(found, target, moment)
        if tuned < least:
            best, least = found, tuned
        found = recode(found, target, moment, how.beam, until)
    return best


def _target(adapted: Adapted, path: str, how: Recode, safe: bool) -> Tensor:
    target = _wanted(adapted, path, how)
    if safe and not bool(target.isfinite().all()):
        raise not_finite(path)
    return target


def _wanted(adapted: Adapted, path: str, how: Recode) -> Tensor:
    if how.original is None:
        return adapted.dequantize(torch.float32)
    weight = how.original.get(path)
    shape = (adapted.out_features, adapted.in_features)
    if weight is None or tuple(weight.shape) != shape:
        came = "nothing" if weight is None else f"shape {list(weight.shape)}"
        raise AdapterError(f"original: layer {path!r} needs a weight {list(shape)}, got {came}.")
    return with_steps(weight.detach().float(), adapted.steps).float()


def _unchanged(adapted: Adapted, rows: slice) -> bool:
    part = adapted.rows(rows)
    return torch.equal(
        part.dequantize(torch.float32), replace(part, steps=()).dequantize(torch.float32)
    )

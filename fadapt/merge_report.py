"""``merge_report``: what a merge would keep of an adapter, layer by layer, before you do it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from fadapt.adapted import Adapted, row_blocks, with_steps
from fadapt.aqlm_merge import Recode
from fadapt.errors import ConfigError
from fadapt.measure import Shares, shares
from fadapt.merging import check_rounding, merge_layers
from fadapt.plan import Plan, plan
from fadapt.rounding import Rounding


class Truth(NamedTuple):
    """Errors against ``W0 + ΔW``, the original weight with the adapter: of the layer merged, of the
    base with the adapter beside it, and of the base alone. Relative; in the outputs if there are
    moments."""

    merged: float
    unmerged: float
    dropped: float


class LayerReport(NamedTuple):
    """One layer.

    Attributes:
        format: of the result, the name of its base.
        weight: of the weight: the relative size of the change, the share of it that survives, the
            relative error.
        output: the same of the outputs on the inputs that ``moments`` are of; None without them.
            ``output.error`` is the merged layer's, ``output.delta`` that of the adapter dropped; of
            the adapter unmerged it is 0.
        base_error: ``|W - W0| / |W|``, what quantizing the base had cost, in the outputs if
            there are moments; None without ``original``.
        truth: the errors against the original weight with the adapter; None without ``original``.
        saturated: elements beyond the ends of their grid.
        kept: the share of the scales that stayed.
    """

    format: str
    weight: Shares
    output: Shares | None
    base_error: float | None
    truth: Truth | None
    saturated: int
    kept: float

    @property
    def lost(self) -> bool:
        """The merged layer errs no less than one without the adapter: a lost cause."""
        found = self.found
        return found.delta > 0 and found.error >= found.delta

    @property
    def found(self) -> Shares:
        """Of the outputs if there are moments, else of the weight."""
        return self.output or self.weight


@dataclass(frozen=True)
class MergeReport:
    """A :class:`LayerReport` for each path; printing it prints a table."""

    layers: Mapping[str, LayerReport]

    @property
    def lost(self) -> list[str]:
        """The layers in which merging is no better than dropping the adapter."""
        return [path for path, layer in self.layers.items() if layer.lost]

    def __str__(self) -> str:
        """A table, one line a layer."""
        names = ["layer", "format", "|ΔW|/|W|", "survives", "error", "SNR dB"]
        names += ["out: dropped", "merged", "base's own", "saturated", "scales kept"]
        rows = [names]
        for path, one in self.layers.items():
            w, out = one.weight, one.output
            rows.append(
                [
                    path + (" (lost)" if one.lost else ""),
                    one.format,
                    f"{w.delta:.2%}",
                    f"{(out or w).captured:.1%}",
                    f"{w.error:.3%}",
                    f"{w.snr:.1f}",
                    "" if out is None else f"{out.delta:.3%}",
                    "" if out is None else f"{out.error:.3%}",
                    "" if one.base_error is None else f"{one.base_error:.3%}",
                    str(one.saturated),
                    f"{one.kept:.0%}",
                ]
            )
        return _aligned(rows)


@dataclass(frozen=True)
class MergeComparison:
    """A :class:`MergeReport` for each rounding; printing it prints their errors side by side."""

    reports: Mapping[str, MergeReport]

    @property
    def best(self) -> dict[str, str]:
        """``{path: the rounding of the smallest error}``, in the outputs if there are moments."""
        first = next(iter(self.reports.values()))
        return {
            path: min(self.reports, key=lambda name: self.reports[name].layers[path].found.error)
            for path in first.layers
        }

    def __str__(self) -> str:
        """A table, one line a layer: the error of dropping the adapter, and of each rounding."""
        rows = [["layer", "dropped", *self.reports, "best"]]
        for path, best in self.best.items():
            layers = [report.layers[path] for report in self.reports.values()]
            errors = [layers[0].found.delta, *(layer.found.error for layer in layers)]
            rows.append([path, *(f"{error:.3%}" for error in errors), best])
        return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows)


@overload
def merge_report(
    model: nn.Module, params: Any, method: Any, *, rounding: str = ..., **options: Any
) -> MergeReport: ...


@overload
def merge_report(
    model: nn.Module, params: Any, method: Any, *, rounding: Sequence[str], **options: Any
) -> MergeComparison: ...


def merge_report(
    model: nn.Module,
    params: Any,
    method: Any,
    *,
    rounding: str | Sequence[str] = "nearest",
    generator: torch.Generator | None = None,
    moments: Mapping[str, Tensor] | None = None,
    original: Mapping[str, Tensor] | None = None,
    aqlm: Recode | None = None,
    **options: Any,
) -> MergeReport | MergeComparison:
    """Merge a layer at a time, measure, and keep nothing.

    Args:
        model, params, method, generator, **options: as :func:`fadapt.merge`.
        rounding: one, or several to compare.
        moments: ``{path: X^T X}`` (see :func:`fadapt.calibrate`): the outputs of linear layers are
            then measured too.
        original: ``{path: W0 [out, in]}``, the weights before quantization: their distance from the
            base's is then reported beside.
        aqlm: how AQLM layers are merged; ``Recode()`` if None, since nothing is refused here.

    Returns:
        The report; ``report.lost`` names the lost causes, ``print(report)`` shows all. Of several
        roundings, a :class:`MergeComparison`: ``reports`` holds each one's, ``best`` names the best
        for each layer.

    Raises:
        ConfigError: no rounding, or one that lacks what it needs; before any is measured.

    Example:
        >>> import torch, fadapt
        >>> model, method = torch.nn.Linear(4, 3), fadapt.LoRA(rank=2, init="orthogonal")
        >>> params = fadapt.init(method, model, generator=torch.Generator().manual_seed(0))
        >>> params = {"": fadapt.LoRAParams(params[""].lora_A, params[""].lora_B + 0.1)}
        >>> report = fadapt.merge_report(model, params, method)
        >>> round(report.layers[""].weight.captured, 3), report.lost
        (1.0, [])
    """
    names = [rounding] if isinstance(rounding, str) else list(dict.fromkeys(rounding))
    if not names:
        raise ConfigError("rounding=[]: name at least one.")
    for name in names:
        Rounding(name, generator, moments)
        check_rounding(options.get("to"), name)
    todo = plan(model, params, method, options.get("safe", True))
    options |= {"generator": generator, "moments": moments, "aqlm": aqlm or Recode()}
    reports = {name: _report(todo, original, rounding=name, **options) for name in names}
    return reports[names[0]] if isinstance(rounding, str) else MergeComparison(reports)


def _report(todo: Plan, original: Mapping[str, Tensor] | None, **options: Any) -> MergeReport:
    found: dict[str, LayerReport] = {}
    moments = options["moments"]
    for path, adapted, merged in merge_layers(todo, **options):
        new = merged.base
        moment = (moments or {}).get(path)

        def blocks(adapted: Any = adapted, new: Any = new) -> Any:
            for rows in row_blocks(new, 2**22):
                part = adapted.rows(rows)
                old = part.base.dequantize(torch.float32)
                yield old, part.dequantize(torch.float32), new.rows(rows).dequantize(torch.float32)

        before = truth = None
        if original is not None:
            before, truth = _truth(original[path].float(), adapted, new, moment)
        found[path] = LayerReport(
            format=type(new).__name__,
            weight=shares(blocks()),
            output=None if moment is None else shares(blocks(), moment),
            base_error=before,
            truth=truth,
            saturated=merged.saturated,
            kept=merged.kept,
        )
    return MergeReport(found)


def _truth(weight: Tensor, adapted: Adapted, new: Any, moment: Tensor | None) -> Any:
    base, beside = adapted.base.dequantize(torch.float32), adapted.dequantize(torch.float32)
    before = shares([(weight, base, base)], moment).delta
    wanted = with_steps(weight, adapted.steps).float()
    new = new.dequantize(torch.float32)
    errors = (shares([(base, wanted, found)], moment).error for found in (new, beside, base))
    return before, Truth(*errors)

"""``merge_report``: what a merge would keep of an adapter, layer by layer, before you do it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fadapt.adapted import Adapted, row_blocks, with_steps
from fadapt.aqlm_merge import Recode
from fadapt.measure import Shares, shares
from fadapt.merging import merge_layers
from fadapt.plan import plan


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
        found = self.output or self.weight
        return found.delta > 0 and found.error >= found.delta


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
        widths = [max(len(r[k]) for r in rows) for k in range(len(names))]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows
        )


def merge_report(
    model: nn.Module,
    params: Any,
    method: Any,
    *,
    moments: Mapping[str, Tensor] | None = None,
    original: Mapping[str, Tensor] | None = None,
    aqlm: Recode | None = None,
    **options: Any,
) -> MergeReport:
    """Merge a layer at a time, measure, and keep nothing.

    Args:
        model, params, method, **options: as :func:`fadapt.merge`.
        moments: ``{path: X^T X}`` (see :func:`fadapt.calibrate`): the outputs of linear layers are
            then measured too.
        original: ``{path: W0 [out, in]}``, the weights before quantization: their distance from the
            base's is then reported beside.
        aqlm: how AQLM layers are merged; ``Recode()`` if None, since nothing is refused here.

    Returns:
        The report; ``report.lost`` names the lost causes, ``print(report)`` shows all.

    Example:
        >>> import torch, fadapt
        >>> model, method = torch.nn.Linear(4, 3), fadapt.LoRA(rank=2, init="orthogonal")
        >>> params = fadapt.init(method, model, generator=torch.Generator().manual_seed(0))
        >>> params = {"": fadapt.LoRAParams(params[""].lora_A, params[""].lora_B + 0.1)}
        >>> report = fadapt.merge_report(model, params, method)
        >>> round(report.layers[""].weight.captured, 3), report.lost
        (1.0, [])
    """
    found: dict[str, LayerReport] = {}
    todo = plan(model, params, method, options.get("safe", True))
    options |= {"moments": moments, "aqlm": aqlm or Recode()}
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

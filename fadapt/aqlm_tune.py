"""Codebooks and scales of AQLM layers, trained a little so that a merged model answers as the base
with the adapter does: the codes stay.

The continuous half of PV-tuning (Malinovskii et al. 2024, arXiv:2405.14852, section 3.2), here
towards a teacher's outputs. :class:`fadapt.Recode` fits each layer by itself; this one fits what
comes out at the end.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fadapt.bases import base_of
from fadapt.calibration import arguments
from fadapt.errors import ConfigError, UnsupportedLayerError
from fadapt.lending import Lender, Scratch
from fadapt.merging import placed, with_layers
from fadapt.shell import join, share, written_to

Loss = Callable[[Any, Any], Tensor]


def finetune_aqlm(
    merged: nn.Module,
    teacher: Callable[..., Any],
    batches: Iterable[Any],
    *,
    steps: int = 100,
    lr: float = 1e-3,
    loss: Loss | None = None,
    seconds: float | None = None,
    progress: Callable[[str, int, int, float], Any] | None = None,
) -> nn.Module:
    """A model like ``merged`` whose AQLM layers have other codebooks and scales, by Adam.

    Args:
        merged: a model with AQLM layers, as :func:`fadapt.merged_model` returns; left as it is.
        teacher: what it is to answer: ``lambda *a, **k: forward(params, *a, **k)`` of the adapter
            that was merged. It is asked once for each batch, and its answers are kept.
        batches: each a tensor, a tuple of positional inputs, or a dict of keyword ones; all are
            held, and met in turn.
        steps: of Adam, a batch each.
        lr: its learning rate, which falls to 0 by half a cosine. Codebooks have elements of about
            1; scales are trained as factors of what they are.
        loss: ``(output, teacher's) -> []``. None: of outputs with ``logits`` the Kullback-Leibler
            divergence a token; of tensors the squared error over the teacher's square.
        seconds: no step starts after that many; None for no limit.
        progress: called with ``("tuning", step, steps, loss)``.

    Returns:
        The new model. Over all batches its loss is no larger than that of ``merged``: if the steps
        did not lower it, the layers are as they were.

    Raises:
        UnsupportedLayerError: ``merged`` has no AQLM layer.
        ConfigError: no batch, or settings out of range.

    Example:
        ``fadapt.finetune_aqlm(merged, lambda x: forward(params, x), batches, seconds=60)``
    """
    if steps < 1 or not lr > 0:
        raise ConfigError(f"steps must be at least 1 and lr above 0; got {steps} and {lr}.")
    bases = _bases(merged)
    fed = [arguments(batch) for batch in batches]
    if not fed:
        raise ConfigError("finetune_aqlm: no batch was given.")
    loss = loss or distance
    run = _runner(merged, bases)
    start = {
        join(path, name): value
        for path, base in bases.items()
        for name, value in (
            ("codebooks", base.codebooks.float()),
            ("factors", torch.ones_like(base.scales, dtype=torch.float32)),
        )
    }
    with torch.no_grad():
        wanted = [teacher(*args, **kwargs) for args, kwargs in fed]

    def total(leaves: dict[str, Tensor]) -> float:
        with torch.no_grad():
            each = [loss(run(leaves, f), w) for f, w in zip(fed, wanted, strict=True)]
        return float(torch.stack(each).mean())

    leaves = {name: t.clone().requires_grad_() for name, t in start.items()}
    optimizer, begun = torch.optim.Adam(leaves.values(), lr=lr), time.monotonic()
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if seconds is not None and time.monotonic() - begun > seconds:
            break
        which = step % len(fed)
        with torch.enable_grad():
            value = loss(run(leaves, fed[which]), wanted[which])
            grads = torch.autograd.grad(value, list(leaves.values()))
        for leaf, grad in zip(leaves.values(), grads, strict=True):
            leaf.grad = grad
        optimizer.step()
        rate.step()
        if progress is not None:
            progress("tuning", step, steps, float(value.detach()))
    tuned = _rounded(bases, leaves)
    return _rebuilt(merged, bases, tuned if total(tuned) < total(start) else {})


def distance(got: Any, wanted: Any) -> Tensor:
    """The default loss of :func:`finetune_aqlm`."""
    if hasattr(got, "logits"):
        ours, theirs = (o.logits.float().log_softmax(-1).flatten(0, -2) for o in (got, wanted))
        return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    error: Tensor = (got - wanted).float().square().sum()
    return error.div(wanted.float().square().sum())


class _Tuned(nn.Module):
    """An AQLM layer whose codebooks and scales are handed in."""

    def __init__(self, base: Any):
        super().__init__()
        self.base = base
        self.register_buffer("codebooks", None, persistent=False)
        self.register_buffer("factors", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        codebooks: Any = self.codebooks
        factors: Any = self.factors
        scales = self.base.scales.float() * factors
        weight = replace(self.base, codebooks=codebooks, scales=scales).dequantize(torch.float32)
        return F.linear(x, weight.to(x.dtype), self.base.bias)


def _bases(merged: nn.Module) -> dict[str, Any]:
    # By its name: a model without such a layer does not need the package.
    found = {
        path: base_of(module)
        for path, module in merged.named_modules()
        if type(module).__name__ == "QuantizedLinear"
    }
    if not found:
        raise UnsupportedLayerError(
            f"this {type(merged).__name__} has no AQLM layer (aqlm.QuantizedLinear) to tune."
        )
    return found


def _rounded(bases: Mapping[str, Any], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The leaves in float32, of values that the layers' own dtypes hold."""
    found = {}
    for path, base in bases.items():
        name = join(path, "codebooks")
        found[name] = leaves[name].detach().to(base.dtype).float()
        name, scales = join(path, "factors"), base.scales.float()
        whole = (scales * leaves[name].detach()).to(base.scales.dtype).float()
        found[name] = torch.where(scales == 0, 1.0, whole / scales)
    return found


def _rebuilt(merged: nn.Module, bases: Mapping[str, Any], tuned: Mapping[str, Tensor]) -> nn.Module:
    fresh = []
    for path, base in bases.items():
        new = base
        if tuned:
            books, factors = tuned[join(path, "codebooks")], tuned[join(path, "factors")]
            scales = (base.scales.float() * factors).to(base.scales.dtype)
            new = replace(base, codebooks=books.to(base.dtype), scales=scales)
        fresh.append((path, base, new))
    return with_layers(merged, fresh)


def _runner(merged: nn.Module, bases: Mapping[str, Any]) -> Callable[..., Any]:
    """``run(leaves, (args, kwargs))``: the model with these in place of its layers' own."""
    shell = placed(share(merged, {}), [(path, _Tuned(base)) for path, base in bases.items()])
    written = written_to(shell)
    scratch = Scratch({n: v for n, v in written.items() if n.rpartition(".")[0] not in bases})
    lender = Lender(shell)

    def run(leaves: Mapping[str, Tensor], fed: Any) -> Any:
        tensors, (args, kwargs) = dict(leaves), fed
        scratch.fill(tensors)
        return lender.call(shell, tensors, tuple(args), kwargs)

    return run

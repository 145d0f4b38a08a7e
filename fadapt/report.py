"""What a run shows at its end: a table, best first, a picture of its losses, a file of results."""

import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fadapt.job import Job
from fadapt.loop import History, Timing
from fadapt.storage import write_bytes
from fadapt.training import State
from fadapt.trials import Trial


class Result(NamedTuple):
    """One row of the table.

    Attributes:
        trial: what was trained.
        train: the training loss over the last tenth of the steps.
        held, base: the held-out losses of the adapter and of the base alone.
        gain: their difference.
        frozen: the step at which a loss that was not finite froze it, or -1.
    """

    trial: Trial
    train: float
    held: float
    base: float
    gain: float
    frozen: int


def results(job: Job, state: State, history: History, base: torch.Tensor) -> list[Result]:
    """A row for each trial, the largest gain first."""
    last = torch.stack(history.losses[-max(1, len(history.losses) // 10) :])
    lately = torch.where(last.isfinite(), last, torch.nan).nanmean(0).tolist()
    rows = [
        Result(trial, train, held, own, own - held, frozen)
        for trial, train, held, own, frozen in zip(
            job.trials,
            lately,
            history.held[-1].tolist(),
            base.tolist(),
            state.frozen.tolist(),
            strict=True,
        )
    ]
    # A loss that is no number sorts last.
    return sorted(rows, key=lambda r: r.gain if math.isfinite(r.gain) else -math.inf, reverse=True)


def table(rows: list[Result]) -> Any:
    """The results as a rich table; a row's name tells in what it differs from others."""
    from rich.table import Table

    shown = Table(title="held-out loss, nats a token: best first")
    shown.add_column("", justify="right")
    shown.add_column("adapter", overflow="fold")
    targets = len({r.trial.method.targets for r in rows}) > 1
    if targets:
        shown.add_column("targets", overflow="fold")
    for name in ("train", "held-out", "base", "gain"):
        shown.add_column(name, justify="right")
    frozen = any(row.frozen >= 0 for row in rows)
    if frozen:
        shown.add_column("")
    for number, row in enumerate(rows, 1):
        shown.add_row(
            str(number),
            row.trial.name,
            *([str(row.trial.method.targets)] if targets else []),
            f"{row.train:.3f}",
            f"{row.held:.3f}",
            f"{row.base:.3f}",
            f"{row.gain:+.3f}",
            *([_fate(row)] if frozen else []),
        )
    return shown


def _fate(row: Result) -> str:
    return f"frozen at step {row.frozen}: loss not finite" if row.frozen >= 0 else ""


def timing_line(job: Job, timing: Timing, rounds: int) -> str:
    """How long the batched steps took against the same adapters one after another."""
    k, steps = len(job.trials), job.steps
    text = f"{k} adapters at once: {timing.batched * 1e3:.0f} ms a step"
    if timing.one_by_one is None:
        return text + "."
    ratio = timing.one_by_one / timing.batched
    return (
        f"{text}, {timing.batched * steps:.1f} s for {steps} steps. One after another: "
        f"{timing.one_by_one * 1e3:.0f} ms a step of each, {timing.one_by_one * steps:.1f} s "
        f"(scaled up from {rounds} rounds in this run, of a plain loop without vmap). "
        f"{ratio:.2f} times as fast."
    )


def write_results(path: Path, rows: list[Result], timing: Timing) -> None:
    """The table as JSON."""
    entries = [
        {
            "name": r.trial.name,
            "data": r.trial.data,
            "lr": r.trial.lr,
            "seed": r.trial.seed,
            "train_loss": _plain(r.train),
            "held_out_loss": _plain(r.held),
            "base_loss": _plain(r.base),
            "frozen_at": r.frozen if r.frozen >= 0 else None,
        }
        for r in rows
    ]
    about = {"adapters": entries, "seconds_a_step": timing._asdict()}
    write_bytes(path, (json.dumps(about, indent=2) + "\n").encode())


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON knows no NaN


def draw(path: Path, job: Job, history: History, base: torch.Tensor) -> None:
    """The held-out loss of each adapter over the steps, the base's as a dashed line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(t.data for t in job.trials))
    figure = Figure(figsize=(5 * min(3, len(names)), 4 * -(-len(names) // 3)), layout="tight")
    FigureCanvasAgg(figure)
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(-(-len(names) // 3), min(3, len(names)), place)
        own = [k for k, t in enumerate(job.trials) if t.data == name]
        steps = [0, *history.looks]
        for k in own:
            curve = [base[k].item(), *[losses[k].item() for losses in history.held]]
            axes.plot(steps, curve, marker=".", label=job.trials[k].name)
        axes.axhline(base[own[0]].item(), linestyle="--", color="grey", label="base")
        axes.set(title=name, xlabel="step", ylabel="held-out loss, nats a token")
        if len(own) <= 8:
            axes.legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, dpi=110, format="png")
    write_bytes(path, image.getvalue())

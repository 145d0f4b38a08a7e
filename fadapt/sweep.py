"""``fadapt sweep``: train many adapters at once on one frozen base.

Without arguments it runs on the model and the texts that ship with the package.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fadapt.errors import CheckpointError, ConfigError
from fadapt.peft import save_peft
from fadapt.settings import Settings, add_settings, from_saved, given_settings, of_many

RUNS = Path("runs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``fadapt sweep``."""
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the sweep; returns the exit code."""
    given = given_settings(arguments)
    out = place(given, "sweep")
    return go(stopped(given, out) if given.get("resume") else of_many(given), out, "sweep")


def go(settings: Settings, out: Path, name: str, load: Any = None) -> int:
    """Run ``sweep`` or ``train``: prepare, train, report, write.

    Args:
        settings: of the run.
        out: its folder.
        name: of the command.
        load: as in :func:`fadapt.job.prepare`.
    """
    from rich.console import Console

    from fadapt import loop, report
    from fadapt.job import prepare

    console = Console()
    job = prepare(settings, load)
    base = loop.base_losses(job)
    out.mkdir(parents=True, exist_ok=True)
    console.print(_headline(job), highlight=False, soft_wrap=True)
    try:
        with _bar(console, job) as tell:
            state, history, timing = loop.train(
                job, out, settings.resume, tell, compare=name == "sweep" and len(job.trials) > 1
            )
    except loop.Stopped as stop:
        console.print(
            f"{stop}; go on with: fadapt {name} --resume --out {out}",
            highlight=False,
            soft_wrap=True,
        )
        return 128 + stop.number
    for trial, params in zip(job.trials, job.apart(state.params), strict=True):
        folder = out / "adapters" / trial.name if name == "sweep" else out / "adapter"
        _save(folder, params, trial.method, job.model)
    rows = report.results(job, state, history, base)
    report.write_results(out / "results.json", rows, timing)
    report.draw(out / "loss.png", job, history, base)
    console.print(report.table(rows))
    timed = report.timing_line(job, timing, loop.ROUNDS)
    console.print(timed, highlight=False, soft_wrap=True)
    console.print(f"adapters, results.json and loss.png: {out}", highlight=False, soft_wrap=True)
    return 0


def place(given: dict[str, Any], name: str) -> Path:
    """The folder of the run: the one given, the last one to resume, or the next free one.

    Raises:
        ConfigError: there is none to resume, or the folder given holds another run.
    """
    taken = sorted(RUNS.glob(f"{name}-*"), key=_number)
    if "out" in given:
        out = Path(given["out"])
    elif given.get("resume"):
        if not taken:
            raise ConfigError(f"--resume: there is no run in {RUNS}/; name it with --out.")
        out = taken[-1]
    else:
        out = RUNS / f"{name}-{_number(taken[-1]) + 1 if taken else 1}"
    if not given.get("resume") and any(out.glob("*")):
        raise ConfigError(
            f"--out {out}: the folder is not empty. Go on with the run in it by --resume, or "
            "choose another."
        )
    return out


def stopped(given: dict[str, Any], out: Path) -> Settings:
    """The settings of the run in ``out``, which is to go on.

    Raises:
        ConfigError: other settings were given.
        CheckpointError: there is no state.
    """
    from fadapt.loop import STATE
    from fadapt.storage import read_state

    _, about = read_state(out / STATE)
    return from_saved(about["settings"], given, str(out))


def _number(path: Path) -> int:
    last = path.name.rsplit("-", 1)[-1]
    return int(last) if last.isdecimal() else 0


def _headline(job: Any) -> str:
    from fadapt.bases import base_of
    from fadapt.shell import layers_of

    kinds: dict[str, int] = {}
    for layer in layers_of(job.model, job.unit).values():
        kind = type(base_of(layer)).__name__
        kinds[kind] = kinds.get(kind, 0) + 1
    layers = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    texts = len({t.name for t in job.texts})
    return (
        f"{type(job.model).__name__}: {layers} layers, frozen. {len(job.trials)} adapters "
        f"({job.layout.size:,} numbers each, with padding) on {texts} "
        f"text{'s' if texts > 1 else ''}, {job.steps} steps of {job.settings.batch} windows of "
        f"{job.settings.length} tokens each."
    )


@contextmanager
def _bar(console: Any, job: Any) -> Iterator[Callable[..., None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=job.steps, note="")
        told = 0

        def tell(state: Any, history: Any) -> None:
            nonlocal told
            frozen = int((state.frozen >= 0).sum())
            if frozen > told:
                for k in (state.frozen == state.step - 1).nonzero().flatten().tolist():
                    progress.console.print(
                        f"{job.trials[k].name}: loss not finite at step {state.step - 1}; frozen "
                        "with its last good parameters, the others go on",
                        highlight=False,
                    )
                told = frozen
            loss = history.losses[-1][history.losses[-1].isfinite()]
            note = f"loss {loss.mean():.3f}" if len(loss) else ""
            progress.update(task, completed=state.step, note=note)

        yield tell


def _save(folder: Path, params: Any, method: Any, model: Any) -> None:
    try:
        save_peft(folder, params, method, model)
    except OSError as error:
        raise CheckpointError(
            f"could not write {folder}: {error.strerror}. The state of the run is intact: make "
            "room, and go on with --resume."
        ) from error

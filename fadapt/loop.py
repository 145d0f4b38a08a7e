"""The training loop that ``fadapt sweep`` and ``fadapt train`` share: steps, looks at the held-out
text, the state on disk, and stopping.
"""

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fadapt import training
from fadapt.corpus import IGNORED, dropout_seed, rows_at
from fadapt.errors import CheckpointError
from fadapt.functional import bind
from fadapt.job import Job
from fadapt.storage import read_state, write_state
from fadapt.training import State

STATE = "state.safetensors"
WINDOWS = 16  # of held-out text, evaluated at once for each adapter
ROUNDS = 3  # of the loop over adapters, timed beside the batched steps


class History(NamedTuple):
    """What was measured on the way.

    Attributes:
        losses: the training losses of each step, ``[K]``.
        looks: after how many steps the held-out text was looked at.
        held: the losses there, ``[K]``.
    """

    losses: list[Tensor]
    looks: list[int]
    held: list[Tensor]


class Timing(NamedTuple):
    """Median seconds: of a batched step, and of the same step for one adapter after another."""

    batched: float
    one_by_one: float | None


class Stopped(Exception):
    """A signal asked the run to stop; its state is on disk."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped after {step} steps")
        self.number = number


def train(
    job: Job, out: Path, resume: bool, tell: Callable[[State, History], object], compare: bool
) -> tuple[State, History, Timing]:
    """Make the steps that are left.

    Args:
        job: what to train.
        out: the run's folder.
        resume: whether to go on from the state in it.
        tell: called after each step.
        compare: whether to time the loop over adapters beside it.

    Returns:
        The state after the last step, its ``params`` all of finite held-out loss; what was
        measured; the times of this call's steps.

    Raises:
        Stopped: by SIGINT or SIGTERM.
        CheckpointError: the state cannot be read, belongs to another run, or cannot be written.
    """
    state = training.start(job.rows)
    history = History([], [], [])
    if resume:
        state, history = _read(job, out / STATE)
    else:
        _write(job, out / STATE, state, history)
    held = _held_out(job)
    seconds: list[float] = []
    rounds: list[float] = []
    one_by_one = _one_by_one(job) if compare else None
    first = state.step
    marks = {first + (job.steps - first) * (i + 1) // (ROUNDS + 1) for i in range(ROUNDS)}
    with _signals() as caught:
        while state.step < job.steps:
            if one_by_one is not None and state.step in marks:
                rounds.append(_timed(job, one_by_one, state.step)[0])
            taken, (state, losses) = _timed(job, _step, job, state)
            seconds.append(taken)
            history.losses.append(losses.cpu())
            done = state.step == job.steps
            if done or state.step % job.settings.eval_every == 0:
                state = _look(job, state, history, held, done)
            if caught or done or state.step % job.settings.save_every == 0:
                _write(job, out / STATE, state, history)
            tell(state, history)
            if caught and not done:
                raise Stopped(caught[0], state.step)
    timing = Timing(
        statistics.median(seconds) if seconds else 0.0,
        statistics.median(rounds) if rounds else None,
    )
    return state, history, timing


def _step(job: Job, state: State) -> tuple[State, Tensor]:
    s = job.settings
    tokens, seeds = _batch(job, state.step)
    losses, grads = training.gradients(
        job.forward, job.layout, state.params, job.scales, tokens, seeds
    )
    factor = training.schedule(state.step, job.steps, s.warmup)
    lrs = losses.new_tensor([t.lr * factor for t in job.trials])
    return training.update(state, losses, grads, lrs, s.clip, s.decay), losses


def _batch(job: Job, step: int) -> tuple[Tensor, Tensor | None]:
    size = job.settings.batch
    picked = [
        text.train[rows_at(trial.seed, step, size, len(text.train))]
        for trial, text in zip(job.trials, job.texts, strict=True)
    ]
    seeds = None
    if job.unit.dropout > 0:
        values = [dropout_seed(trial.seed, step) for trial in job.trials]
        seeds = torch.tensor(values, device=job.rows.device)
    return torch.stack(picked), seeds


def _look(job: Job, state: State, history: History, held: Tensor, last: bool) -> State:
    """Evaluate, and note it in ``history``; the state changes if the last step failed."""
    losses = _evaluate(job, state.params, held)
    if last and not losses.isfinite().all():
        # The last step itself may be the one that failed: no later loss would have told.
        bad = ~losses.isfinite()
        state = state._replace(
            params=torch.where(bad[:, None], state.good, state.params),
            frozen=torch.where(bad & (state.frozen < 0), state.step - 1, state.frozen),
        )
        losses = _evaluate(job, state.params, held)
    history.looks.append(state.step)
    history.held.append(losses.cpu())
    return state


def _evaluate(job: Job, rows: Tensor, held: Tensor) -> Tensor:
    return training.evaluate(job.forward, job.layout, rows, job.scales, held, WINDOWS)


def base_losses(job: Job) -> Tensor:
    """The base's own held-out loss on the text of each trial, ``[K]``."""
    texts = {text.name: text.held for text in job.texts}
    values = training.evaluate_base(job.forward, list(texts.values()), WINDOWS)
    names = list(texts)
    return values[[names.index(text.name) for text in job.texts]].cpu()


def _held_out(job: Job) -> Tensor:
    """``[K, windows, length + 1]``: texts with fewer windows are filled up with ignored ones."""
    most = max(len(text.held) for text in job.texts)
    filled = [
        torch.nn.functional.pad(t.held, (0, 0, 0, most - len(t.held)), value=IGNORED)
        for t in job.texts
    ]
    return torch.stack(filled)


def _one_by_one(job: Job) -> Callable[[int], None]:
    """``round(step)``: what one batched step does, by a loop over the adapters."""
    s = job.settings
    loops = [
        training.alone(bind(job.model, trial.method), params, trial.lr, s.clip, s.decay)
        for trial, params in zip(job.trials, job.adapters, strict=True)
    ]

    def make_round(step: int) -> None:
        tokens, seeds = _batch(job, step)
        for k, loop in enumerate(loops):
            loop(tokens[k], None if seeds is None else seeds[k])

    make_round(0)  # the first call allocates
    return make_round


def _write(job: Job, path: Path, state: State, history: History) -> None:
    tensors: dict[str, Any] = state._asdict()
    step = tensors.pop("step")
    tensors |= {n: torch.stack(rows) for n, rows in _rows(history).items() if rows}
    write_state(path, tensors, job.about | {"step": step, "looks": history.looks})


def _rows(history: History) -> dict[str, list[Tensor]]:
    return {"losses": history.losses, "held": history.held}


def _read(job: Job, path: Path) -> tuple[State, History]:
    tensors, about = read_state(path)
    for what, mine in job.about.items():
        if about.get(what) != mine:
            raise CheckpointError(
                f"--resume: the {what} changed since the run in {path.parent} was started, so it "
                "cannot go on as the same run. Start another one with another --out."
            )
    device = job.rows.device
    state = State(step=about["step"], **{n: tensors[n].to(device) for n in State._fields[:-1]})
    losses, held = (list(tensors.get(n, torch.empty(0)).unbind()) for n in ("losses", "held"))
    return state, History(losses, about["looks"], held)


def _timed(job: Job, run: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    device = job.rows.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The stop signals that came, in a list; a second one acts as it did before."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def note(number: Any, _: object) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    try:
        number: Any
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: whoever runs us there stops us in their way
        pass
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

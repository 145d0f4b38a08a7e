"""A progress bar for what takes a while: merging, re-encoding, fine-tuning, generating."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Tell = Callable[..., None]


@contextmanager
def progress_bar(console: Any = None) -> Iterator[Tell]:
    """A bar on the terminal while the block runs, and nothing elsewhere; needs ``rich``.

    Args:
        console: a ``rich.console.Console``; None for rich's own.

    Yields:
        ``tell(what, k, total, value=None)``: what ``progress=`` of :func:`fadapt.merge`, of
        :class:`fadapt.Recode` and of :func:`fadapt.finetune_aqlm` takes, one for all three.

    Example:
        ``with progress_bar() as bar: fadapt.merge(..., aqlm=fadapt.Recode(progress=bar))``
    """
    from rich import get_console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console = get_console() if console is None else console
    with Progress(
        *columns,
        TimeElapsedColumn(),
        transient=True,
        console=console,
        # What is printed goes above the bar; but not, where the bar is on stderr, to stderr too.
        redirect_stdout=not console.stderr,
        disable=not (console.is_terminal or console.is_jupyter),
    ) as bar:
        task = bar.add_task("", total=None)

        def tell(what: str, k: int, total: int, value: float | None = None) -> None:
            text = what if value is None else f"{what} {value:.3g}"
            bar.update(task, completed=k, total=total, description=text)

        yield tell

"""One look for long work: a bar with count, rate and time left, on standard error where a person watches it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


class Bar:
    def __init__(self, progress: Progress, total: int, what: str) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=total)

    def advance(self, steps: int = 1) -> None:
        self._progress.advance(self._task, steps)

    def reach(self, step: int) -> None:
        """Show `step` steps as done, however many were before."""
        self._progress.update(self._task, completed=step)


@contextmanager
def bar(what: str, total: int, console: Console | None = None) -> Iterator[Bar]:
    """A bar for `total` steps; call `.advance(n)` as they are done. Nothing is drawn where no terminal is."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    console = console or Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bar(progress, total, what)


@contextmanager
def status(what: str) -> Iterator[None]:
    """A spinner while something without steps goes on."""
    console = Console(stderr=True)
    with console.status(what) if console.is_terminal else nullcontext():
        yield

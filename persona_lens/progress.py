"""Progress of long work: a callback `(stage, done, total)`, and the bar that shows it on a terminal."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

Progress = Callable[[str, int, int], object]


def silent(stage: str, done: int, total: int) -> None:
    """No progress shown."""


@contextmanager
def progress_bars(enabled: bool | None = None) -> Generator[Progress]:
    """Bars on stderr, one per stage; by default only where stderr is a terminal."""
    if not (sys.stderr.isatty() if enabled is None else enabled):
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, int] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = int(bars.add_task(stage, total=total))
            bars.update(tasks[stage], completed=done, total=total)  # pyright: ignore[reportArgumentType]

        yield show

"""Progress bars with the time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[int, int | None], None]
"""`advance(n, None)` adds n; `advance(done, total)` sets both."""


@contextmanager
def bar(console: Console, text: str, total: int | None = None) -> Iterator[Advance]:
    """A bar that shows what is done, the time taken and the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(text, total=total)

        def advance(number: int, of: int | None) -> None:
            if of is None:
                progress.advance(task, number)
            else:
                progress.update(task, completed=number, total=of)

        yield advance

"""How long steps tell how far they are, in bars with the time left."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress

Unit = Literal["bytes", "steps"]


class Update(Protocol):
    """Called with how much is done by now (not since the last call), and of how much.

    None says nothing new.
    """

    def __call__(self, done: int | None, total: int | None = None, /) -> None: ...


class Progress:
    """Draws bars with the time left; plain lines where the console is not a terminal.

    Args:
        console: Where to; None keeps silent.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(quiet=True)

    def say(self, message: str) -> None:
        """One line about what happened."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int | None, unit: Unit = "bytes") -> Iterator[Update]:
        """A step of `total` bytes or steps (None: unknown); yields what is called as it goes on."""
        if not self._console.is_terminal:
            self.say(f"{title} ({readable(total)})" if total and unit == "bytes" else title)
            yield lambda _done, _total=None: None
            return
        with RichProgress(*_columns(unit), console=self._console) as progress:
            task = progress.add_task(title, total=total)
            yield lambda done, total=None: progress.update(task, completed=done, total=total)
            progress.update(task, completed=progress.tasks[task].total)


def terminal_progress() -> Progress:
    """Progress on this process's standard error."""
    return Progress(Console(stderr=True))


def ignore(_: object) -> None:
    """Hear something and do nothing."""


def _columns(unit: Unit) -> list[ProgressColumn]:
    amount = [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else None
    return [
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        *(amount or [MofNCompleteColumn()]),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]


def readable(size: int) -> str:
    """A number of bytes as people read it: 92.9 MB."""
    amount, units = float(size), iter(("bytes", "kB", "MB", "GB"))
    unit = next(units)
    while amount >= 1000 and unit != "GB":
        amount, unit = amount / 1000, next(units)
    return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"

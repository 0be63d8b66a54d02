"""Work done ahead in threads, given out in order.

Decoding pictures releases the interpreter lock, so threads keep up with training. The work comes
in batches (the rows of one pack), and the look-ahead is counted in them.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar, cast

from plait.errors import ConfigError

Task = TypeVar("Task")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Done(Generic[Task, Value]):
    """What became of one task: its value, or the error that it raised."""

    task: Task
    value: Value | None = None
    error: Exception | None = None

    def result(self) -> Value:
        """The value, or the error raised."""
        if self.error is not None:
            raise self.error
        return cast(Value, self.value)


@dataclass(frozen=True, slots=True)
class Executor:
    """Runs a function over batches of tasks, a bounded number of batches ahead.

    Args:
        workers: Threads. 0 works in the caller's own thread, and never ahead.
        ahead: Batches begun beyond the one that the caller holds.
    """

    workers: int = 2
    ahead: int = 4

    def __post_init__(self) -> None:
        for name, value in [("workers", self.workers), ("ahead", self.ahead)]:
            if value < 0:
                raise ConfigError(f"{name} must be 0 or more, not {value}")

    def map(
        self, function: Callable[[Task], Value], batches: Iterable[Sequence[Task]]
    ) -> Generator[list[Done[Task, Value]], None, None]:
        """What became of each batch, in order; an error stands at the task that raised it.

        Threads start at the first `next()` and have ended when the iterator is exhausted, closed
        or dropped: work that has begun is waited for, the rest is cancelled. A traceback keeps an
        iterator alive, so a loop that may raise closes it (`contextlib.closing`). `batches` is
        only read in the caller's thread; what it raises is raised at once.
        """
        if not self.workers:
            for batch in batches:
                yield [_attempt(function, task) for task in batch]
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="plait-ahead")
        waiting: deque[list[Future[Done[Task, Value]]]] = deque()
        source = iter(batches)
        try:
            while True:
                for batch in islice(source, self.ahead + 1 - len(waiting)):
                    waiting.append([pool.submit(_attempt, function, task) for task in batch])
                if not waiting:
                    return
                done = [future.result() for future in waiting.popleft()]
                yield done
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _attempt(function: Callable[[Task], Value], task: Task) -> Done[Task, Value]:
    try:
        return Done(task, value=function(task))
    except Exception as error:  # any error is the caller's to judge, in its turn
        return Done(task, error=error)

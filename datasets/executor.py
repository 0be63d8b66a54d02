"""Work done ahead in threads, given out in order.

Decoding pictures releases the interpreter lock, so threads keep up with training. The work comes
in batches (the rows of one pack). The look-ahead is bounded in batches, and in what the values
that wait to be given out weigh: no task of a later batch begins while they weigh too much.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar, cast

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
        self,
        function: Callable[[Task], Value],
        batches: Iterable[Sequence[Task]],
        *,
        weigh: Callable[[Value], int] = lambda _: 0,
        most: int | None = None,
    ) -> Generator[list[Done[Task, Value]], None, None]:
        """What became of each batch, in order; an error stands at the task that raised it.

        Threads start at the first `next()` and have ended when the iterator is exhausted, closed
        or dropped: work that has begun is waited for, the rest is cancelled. A traceback keeps an
        iterator alive, so a loop that may raise closes it (`contextlib.closing`). `batches` is
        only read in the caller's thread; what it raises is raised at once.

        Args:
            weigh: What a value weighs (bytes) until it is given out.
            most: No task begins while more than that waits, unless it is of the batch that is
                given out next; a value of each thread may come on top. None is no bound.
        """
        if not self.workers:
            for batch in batches:
                yield [_attempt(function, task) for task in batch]
            return
        scales = _Scales(weigh, most)

        def work(number: int, task: Task) -> Done[Task, Value]:
            scales.wait(number)
            done = _attempt(function, task)
            scales.put(number, done)
            return done

        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="plait-ahead")
        waiting: deque[list[Future[Done[Task, Value]]]] = deque()
        source = enumerate(batches)
        try:
            while True:
                for number, batch in islice(source, self.ahead + 1 - len(waiting)):
                    waiting.append([pool.submit(work, number, task) for task in batch])
                if not waiting:
                    return
                done = [future.result() for future in waiting.popleft()]
                scales.give_out()
                yield done
        finally:
            scales.close()
            pool.shutdown(wait=True, cancel_futures=True)


class _Scales(Generic[Value]):
    """Holds tasks back while what waits to be given out weighs too much."""

    def __init__(self, weigh: Callable[[Value], int], most: int | None) -> None:
        self._weigh, self._most = weigh, most
        self._changed = threading.Condition()
        self._held: dict[int, int] = {}
        self._next = 0
        self._closed = False

    def wait(self, batch: int) -> None:
        """Return when a task of this batch may begin."""
        most = self._most
        if most is None:
            return
        with self._changed:
            # Tasks begin in order, so those of the next batch never wait behind waiting ones.
            self._changed.wait_for(
                lambda: self._closed or batch <= self._next or sum(self._held.values()) <= most
            )

    def put(self, batch: int, done: "Done[Any, Value]") -> None:
        if done.value is not None:
            with self._changed:
                self._held[batch] = self._held.get(batch, 0) + self._weigh(done.value)

    def give_out(self) -> None:
        """The next batch is the caller's now."""
        with self._changed:
            self._held.pop(self._next, None)
            self._next += 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _attempt(function: Callable[[Task], Value], task: Task) -> Done[Task, Value]:
    try:
        return Done(task, value=function(task))
    except Exception as error:  # any error is the caller's to judge, in its turn
        return Done(task, error=error)

"""The engine's controller: one queue in the order of submission, packing that nobody sees."""

import atexit
import queue
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from plait.datasets.packing import best_fit, make_units
from plait.errors import DataError, ModelError
from plait.stream import Document
from plait.trainer.build import Built
from plait.trainer.engine.commands import Command, DropSnapshot, ForwardBackward
from plait.trainer.engine.executor import Executor


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How much the engine computes at once."""

    capacity: int = 4096
    """Positions of a micro-batch at most."""

    max_documents: int | None = None
    """Documents of a micro-batch at most; None is no limit."""


class Engine:
    """Commands go in from any thread and are executed one by one in the order of submission.

    With one rank the executor runs in the controller's own worker thread. An engine that nobody
    holds any more ends like a closed one, once what is queued is done.
    """

    def __init__(self, built: Built, settings: EngineSettings | None = None) -> None:
        self.built, self.settings = built, settings or EngineSettings()
        self._executor = Executor(built)
        self._commands: queue.SimpleQueue[Queued | None] = queue.SimpleQueue()
        self._closed = False
        # Reentrant, because the garbage collector may call `discard` in the middle of `submit`.
        self._lock = threading.RLock()
        # The worker knows the executor only: while it held the engine, no engine would ever go.
        self._worker = threading.Thread(
            target=_work, args=(self._commands, self._executor), name="plait-engine", daemon=True
        )
        self._end = weakref.finalize(self, self._commands.put, None)
        self._end.atexit = False
        # Also for an engine that is already gone, whose worker may still be freeing the model.
        self._at_exit = partial(_finish, self._commands, self._worker)
        atexit.register(self._at_exit)
        self._worker.start()

    def submit(self, command: Command) -> "Future[Any]":
        """Queue a command; its future holds the result, or the error it raised.

        A command cannot be taken back: cancelling its future, as `asyncio.wait_for` does after its
        time, would let an `optim_step` behind it run on half of the gradients.
        """
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:  # so that nothing can be queued behind the end
            if self._closed:
                raise ModelError("this engine is closed; create a new client")
            self._commands.put((command, future))
        return future

    def forward_backward(self, documents: Sequence[Document], backward: bool) -> "Future[Any]":
        """Plan micro-batches and queue them as one command.

        Raises:
            DataError: a document is longer than a micro-batch.
        """
        batches = self.plan(documents)
        return self.submit(ForwardBackward(list(documents), batches, backward))

    def plan(self, documents: Sequence[Document]) -> list[list[int]]:
        """Micro-batches as lists of indices; documents of one group stay together.

        What fits into one micro-batch goes into one, in the order given.
        """
        capacity, most = self.settings.capacity, self.settings.max_documents
        lengths = [document.length for document in documents]
        for document in documents:
            if document.length > capacity:
                raise DataError(
                    f"a datum must fit into a micro-batch of {capacity} positions; this one has "
                    f"{document.length}: shorten it or raise the capacity",
                    document.origin,
                )
        if sum(lengths) <= capacity and (most is None or len(lengths) <= most):
            return [list(range(len(lengths)))] if lengths else []
        groups = [document.group for document in documents]
        units = make_units(list(range(len(lengths))), lengths, groups)
        packs = best_fit(units, capacity=capacity, max_documents=most)
        return [list(indices) for indices in packs]

    def discard(self, snapshot: int) -> None:
        """Forget a snapshot when what is queued is done; never waits, and never fails."""
        with self._lock:
            if not self._closed:
                self.submit(DropSnapshot(snapshot))

    def close(self) -> None:
        """Finish what is queued and stop; idempotent."""
        with self._lock:
            self._closed = True
            self._end()
        self._worker.join()
        atexit.unregister(self._at_exit)


def _finish(commands: "queue.SimpleQueue[Queued | None]", worker: threading.Thread) -> None:
    """At the interpreter's end: a thread that is stopped inside of torch's code aborts it."""
    commands.put(None)
    worker.join()


Queued = tuple[Command, "Future[Any]"]


def _work(commands: "queue.SimpleQueue[Queued | None]", executor: Executor) -> None:
    while (queued := commands.get()) is not None:
        _execute(executor, *queued)
        del queued  # else its documents and results would stay until the next command


def _execute(executor: Executor, command: Command, future: "Future[Any]") -> None:
    try:
        future.set_result(executor.execute(command))
    except BaseException as error:  # the caller's to raise, in the caller's thread
        future.set_exception(error)

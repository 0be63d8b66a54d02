"""The engine's controller: one queue in the order of submission, packing that nobody sees."""

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from plait.datasets.packing import best_fit, make_units
from plait.errors import DataError, ModelError
from plait.stream import Document
from plait.trainer.build import Built
from plait.trainer.engine.commands import Command, ForwardBackward
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

    With one rank the executor runs in the controller's own worker thread.
    """

    def __init__(self, built: Built, settings: EngineSettings | None = None) -> None:
        self.built, self.settings = built, settings or EngineSettings()
        self._executor = Executor(built)
        self._commands: queue.SimpleQueue[tuple[Command, Future[Any]] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        self._worker = threading.Thread(target=self._work, name="plait-engine", daemon=True)
        self._worker.start()

    def submit(self, command: Command) -> "Future[Any]":
        """Queue a command; its future holds the result, or the error it raised."""
        future: Future[Any] = Future()
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

    def close(self) -> None:
        """Finish what is queued and stop; idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._commands.put(None)
        self._worker.join()

    def _work(self) -> None:
        while (queued := self._commands.get()) is not None:
            command, future = queued
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._executor.execute(command))
            except BaseException as error:  # the caller's to raise, in the caller's thread
                future.set_exception(error)

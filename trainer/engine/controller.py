"""The engine's controller: queues in the order of submission, packing that nobody sees."""

import atexit
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from plait.datasets.packing import best_fit, make_units
from plait.errors import DataError, ModelError
from plait.modalities import Limits
from plait.stream import Document
from plait.trainer.build import Built
from plait.trainer.engine import commands
from plait.trainer.engine.commands import Command, DocumentResult, ForwardBackward
from plait.trainer.engine.computing import Slice
from plait.trainer.engine.executor import Executor
from plait.trainer.engine.scheduler import Queued, Scheduler
from plait.trainer.model import LEARN, Objective
from plait.trainer.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How much the engine computes and keeps at once."""

    capacity: int = 4096
    """Positions of a micro-batch at most, those of several runs together."""

    max_documents: int | None = None
    """Documents of a micro-batch at most; None is no limit."""

    sampler_memory_mb: int = 1024
    """Memory for the keys and values of what is sampled, on each language model; it is taken as
    it is needed, and requests wait when it is full."""


class Engine:
    """Runs and views on shared language models. Commands go in from any thread.

    Those of one run are executed in the order of submission; runs take turns, and their documents
    share rows where they may. With one rank the executor runs in the controller's own worker
    thread. An engine that nobody holds any more ends like a closed one, once what is queued is
    done.
    """

    def __init__(self, settings: EngineSettings | None = None) -> None:
        self.settings = settings or EngineSettings()
        self._work = _Work(self.settings)
        self._names = count()
        # Reentrant, because the garbage collector may call `discard` in the middle of `submit`.
        self._lock = threading.RLock()
        # The worker knows the work only: while it held the engine, no engine would ever go.
        self._worker = threading.Thread(target=self._work.loop, name="plait-engine", daemon=True)
        self._end = weakref.finalize(self, self._work.end)
        self._end.atexit = False
        # Also for an engine that is already gone, whose worker may still be freeing models.
        self._at_exit = partial(_finish, self._work, self._worker)
        atexit.register(self._at_exit)
        self._worker.start()

    @property
    def executor(self) -> Executor:
        """The executor of rank 0; only its worker may change anything of it."""
        return self._work.executor

    def new_name(self, kind: str) -> str:
        """A name that no run and no view of this engine has."""
        return f"{kind}{next(self._names)}"

    def submit(self, command: Command) -> "Future[Any]":
        """Queue a command; its future holds the result, or the error it raised.

        A command cannot be taken back: cancelling its future, as `asyncio.wait_for` does after its
        time, would let an `optim_step` behind it run on half of the gradients.
        """
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:  # so that nothing can be queued behind the end
            if self._work.ending:
                raise ModelError("this engine is closed; create a new client")
            self._work.put(Queued(command, future))
        return future

    def create_run(self, spec: ModelSpec, seed: int, limits: Limits) -> tuple[str, Built]:
        """A run of its own, and what renders its samples; waits until it is built."""
        name = self.new_name("run")
        built: Built = self.submit(commands.CreateRun(name, spec, seed, limits)).result()
        return name, built

    def create_view(
        self, spec: ModelSpec, folder: Path | None, limits: Limits
    ) -> tuple[str, Built]:
        """Weights to sample from, those of a checkpoint if one is named; waits until they are
        loaded."""
        name = self.new_name("view")
        built: Built = self.submit(commands.CreateView(name, spec, folder, limits)).result()
        return name, built

    def forward_backward(
        self,
        run: str,
        documents: Sequence[Document],
        objective: Objective = LEARN,
        *,
        backward: bool = True,
    ) -> "Future[Any]":
        """Plan micro-batches and queue them as one command.

        Raises:
            DataError: a document is longer than a micro-batch.
        """
        batches = self.plan(documents)
        return self.submit(ForwardBackward(run, list(documents), batches, objective, backward))

    def plan(self, documents: Sequence[Document]) -> list[list[int]]:
        """Micro-batches as lists of indices; documents of one group stay together, in order.

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

    def discard(self, command: Command) -> None:
        """Forget a run or a view when what is queued is done; never waits, and never fails."""
        with self._lock:
            if not self._work.ending:
                self.submit(command)

    def finish(self, command: Command) -> None:
        """As `discard`, but wait for it; harmless where the engine has ended."""
        with self._lock:
            future = None if self._work.ending else self.submit(command)
        if future is not None:
            future.result()

    def close(self) -> None:
        """Finish what is queued and stop; idempotent."""
        with self._lock:
            self._end()
        self._worker.join()
        atexit.unregister(self._at_exit)


def _finish(work: "_Work", worker: threading.Thread) -> None:
    """At the interpreter's end: a thread that is stopped inside of torch's code aborts it."""
    work.end()
    worker.join()


class _Work:
    """What the worker thread does: turns of runs, and steps of the sampler between them."""

    def __init__(self, settings: EngineSettings) -> None:
        self.executor = Executor(settings.sampler_memory_mb * 1_000_000)
        self.ending = False
        self._scheduler = Scheduler(settings.capacity, settings.max_documents, self._row_of)
        self._changed = threading.Condition()
        self._seconds = {"training": 0.0, "sampling": 0.0}
        """Since both had something to do."""

    def _row_of(self, run: str) -> int | None:
        """The language model whose rows a run's documents may share with others."""
        held = self.executor.runs.get(run)
        return id(held.model.backbone) if held is not None and held.mixes else None

    def put(self, queued: Queued) -> None:
        with self._changed:
            self._scheduler.put(queued)
            self._changed.notify()

    def end(self) -> None:
        """Stop when nothing is left to do."""
        with self._changed:
            self.ending = True
            self._changed.notify()

    def loop(self) -> None:
        while self._wait():
            training = bool(self._scheduler)
            sampling = self.executor.sampling
            if not (training and sampling):
                self._seconds = dict.fromkeys(self._seconds, 0.0)
            behind = self._seconds["sampling"] <= self._seconds["training"]
            kind = "sampling" if sampling and (behind or not training) else "training"
            start = time.perf_counter()
            if kind == "sampling":
                self.executor.sample_step()
            else:
                self._turn()
            self._seconds[kind] += time.perf_counter() - start

    def _wait(self) -> bool:
        """Until there is something to do; False where there never will be."""
        with self._changed:
            while not self._scheduler and not self.executor.sampling:
                if self.ending:
                    return False
                self._changed.wait()
        return True

    def _turn(self) -> None:
        with self._changed:
            row = self._scheduler.next()
        if isinstance(row[0].command, ForwardBackward):
            self._compute(row)
        else:
            self._execute(row[0])

    def _execute(self, queued: Queued) -> None:
        command = queued.command
        try:
            if isinstance(command, commands.Sample):
                self.executor.sample(command, queued.future)
            else:
                queued.future.set_result(self.executor.execute(command))
        except BaseException as error:  # the caller's to raise, in the caller's thread
            queued.future.set_exception(error)
        finally:
            self._done(queued)

    def _done(self, queued: Queued) -> None:
        with self._changed:
            self._scheduler.done(queued)

    def _compute(self, row: Sequence[Queued]) -> None:
        """The next micro-batch of each; a command that is whole then, or fails, ends."""
        slices: list[tuple[Queued, Slice]] = []
        for queued in row:
            try:
                slices.append((queued, self._slice(queued)))
            except BaseException as error:
                self._fail(queued, error)
        results = self.executor.compute([one for _, one in slices])
        for (queued, one), result in zip(slices, results, strict=True):
            if isinstance(result, Exception):
                if one.backward:
                    one.run.abandon(result)
                self._fail(queued, result)
            else:
                self._advance(queued, one, result)

    def _slice(self, queued: Queued) -> Slice:
        command = queued.command
        assert isinstance(command, ForwardBackward)
        run = self.executor.run(command.run)
        if queued.next_batch == 0:
            queued.results = [None] * len(command.documents)
            if command.backward:
                run.begin()
        documents = [command.documents[i] for i in queued.batch]
        return Slice(run, documents, command.objective, command.backward)

    def _advance(self, queued: Queued, one: Slice, results: Sequence[DocumentResult]) -> None:
        command = queued.command
        assert isinstance(command, ForwardBackward)
        for index, result in zip(queued.batch, results, strict=True):
            queued.results[index] = result
        queued.next_batch += 1
        if queued.next_batch == len(command.micro_batches):
            if one.backward:
                one.run.finish()
            self._done(queued)
            queued.future.set_result([result for result in queued.results if result is not None])

    def _fail(self, queued: Queued, error: BaseException) -> None:
        self._done(queued)
        queued.future.set_exception(error)


def facts_of(results: Sequence[DocumentResult]) -> Mapping[str, float]:
    """Sums over documents, named as the Tinker API names metrics: `name:sum`."""
    sums = {
        "loss:sum": sum(result.loss for result in results),
        "weight:sum": sum(result.weight for result in results),
    }
    for result in results:
        for name, value in result.metrics.items():
            sums[f"{name}:sum"] = sums.get(f"{name}:sum", 0.0) + value
    return sums

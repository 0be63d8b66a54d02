"""The engine's controller: queues in the order of submission, packing that nobody sees."""

import atexit
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

from plait.errors import DataError, ModelError, RankDiedError, UnknownNameError
from plait.modalities import Limits
from plait.ranges import check_number
from plait.stream import Document
from plait.trainer.build import Built
from plait.trainer.engine import commands
from plait.trainer.engine.commands import Command, DocumentResult, ForwardBackward, MicroBatch
from plait.trainer.engine.executor import Executor
from plait.trainer.engine.planning import plan
from plait.trainer.engine.retrying import Result
from plait.trainer.engine.scheduler import Kind, Queued, Scheduler, Taken
from plait.trainer.engine.team import Team
from plait.trainer.model import LEARN, Objective
from plait.trainer.ranks.children import check_readable
from plait.trainer.ranks.group import STRATEGIES
from plait.trainer.source import Source
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

    devices: int = 1
    """Ranks that compute together."""

    strategy: str = "ddp"
    """How they share a model; one of `plait.trainer.ranks.group.STRATEGIES`."""

    def __post_init__(self) -> None:
        for name in ("capacity", "sampler_memory_mb", "devices"):
            check_number(name, getattr(self, name), "[1, inf)", whole=True)
        if self.max_documents is not None:
            check_number("max_documents", self.max_documents, "[1, inf)", whole=True)
        if self.strategy not in STRATEGIES:
            raise UnknownNameError("strategy", self.strategy, STRATEGIES)


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
        self._lock = threading.Lock()
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
        return self._work.team.executor

    def new_name(self, kind: str) -> str:
        """A name that no run and no view of this engine has."""
        return f"{kind}{next(self._names)}"

    def submit(self, command: Command) -> "Future[Any]":
        """Queue a command; its future holds the result, or the error it raised.

        A command cannot be taken back: cancelling its future, as `asyncio.wait_for` does after its
        time, would let an `optim_step` behind it run on half of the gradients.
        """
        future = self._put(command)
        if future is None:
            raise ModelError("this engine is closed; create a new client")
        return future

    def _put(self, command: Command) -> "Future[Any] | None":
        """Queue a command; None where the engine has ended."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:  # so that nothing can be queued behind the end
            if self._work.ending:
                return None
            self._work.put(Queued(command, future))
        return future

    def create_run(self, spec: ModelSpec, seed: int, limits: Limits) -> tuple[str, Built]:
        """A run of its own, and what renders its samples; waits until it is built."""
        check_number("seed", seed, "[0, 9223372036854775808)", whole=True)
        name = self.new_name("run")
        built: Built = self.submit(commands.CreateRun(name, spec, seed, limits)).result()
        return name, built

    def create_view(
        self, spec: ModelSpec, source: Source | None, limits: Limits
    ) -> tuple[str, Built]:
        """Weights to sample from, those of a checkpoint if one is named; waits until they are
        loaded."""
        name = self.new_name("view")
        built: Built = self.submit(commands.CreateView(name, spec, source, limits)).result()
        return name, built

    def forward_backward(
        self,
        run: str,
        documents: Sequence[Document],
        objective: Objective = LEARN,
        *,
        backward: bool = True,
        everywhere: bool = False,
    ) -> "Future[Any]":
        """Plan micro-batches and queue them as one command.

        A document without a `sample_id` is called by its number in errors.

        Raises:
            DataError: there is no document, or one is longer than a micro-batch.
            ModelError: several ranks need a loss that can be imported, and it cannot.
        """
        if not documents:
            raise DataError("a forward_backward needs at least one document; there is none")
        if self.settings.devices > 1:
            check_readable(objective.loss.function)
        named = [
            document if document.sample_id else replace(document, sample_id=str(number))
            for number, document in enumerate(documents)
        ]
        batches = self.plan(named)
        return self.submit(ForwardBackward(run, named, batches, objective, backward, everywhere))

    def plan(self, documents: Sequence[Document]) -> list[list[int]]:
        """The micro-batches of these documents, as indices; see `planning.plan`."""
        settings = self.settings
        return plan(documents, settings.capacity, settings.max_documents, ranks=settings.devices)

    def discard(self, command: Command) -> None:
        """Forget a run or a view when what is queued is done; never waits, and never fails.

        The garbage collector calls it in the middle of any line of any thread, also of one that
        holds a lock: it takes none.
        """
        self._work.inbox.put(Queued(command, Future()))

    def finish(self, command: Command) -> None:
        """As `discard`, but wait for it; harmless where the engine has ended."""
        future = self._put(command)
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
        self.team = Team(
            settings.devices, settings.strategy, settings.sampler_memory_mb * 1_000_000
        )
        self.ending = False
        self._scheduler = Scheduler(
            settings.capacity,
            settings.max_documents,
            self._kind_of,
            rows=settings.devices,
            one_model=settings.strategy == "fsdp",
        )
        self.inbox: SimpleQueue[Queued | None] = SimpleQueue()
        """What the worker has not seen yet; None says that no more will come."""

        self._ended = False
        self._seconds = {"training": 0.0, "sampling": 0.0}
        """Since both had something to do."""

    def _kind_of(self, run: str) -> Kind:
        """What a run's micro-batches may share with those of others."""
        held = self.team.executor.runs.get(run)
        if held is None:
            return Kind(run, None)
        model = id(held.model.backbone)
        return Kind(model, model if held.mixes else None)

    def put(self, queued: Queued) -> None:
        self.team.executor.prepare(queued.command)
        self.inbox.put(queued)

    def end(self) -> None:
        """Stop when nothing is left to do; the garbage collector may call it, as `discard`."""
        self.ending = True
        self.inbox.put(None)

    def loop(self) -> None:
        while self._wait():
            training = bool(self._scheduler)
            sampling = self.team.executor.sampling
            if not (training and sampling):
                self._seconds = dict.fromkeys(self._seconds, 0.0)
            behind = self._seconds["sampling"] <= self._seconds["training"]
            kind = "sampling" if sampling and (behind or not training) else "training"
            start = time.perf_counter()
            if kind == "sampling":
                self.team.sample_step()
            else:
                self._turn()
            loss = self.team.take_loss()
            if loss is not None:
                self._fail_under_way(RankDiedError(loss))
            self._seconds[kind] += time.perf_counter() - start
        self.team.close()

    def _wait(self) -> bool:
        """Take in what has come, and wait where there is nothing to do; False where there never
        will be."""
        while True:
            busy = bool(self._scheduler) or self.team.executor.sampling
            try:
                queued = self.inbox.get(block=not busy and not self._ended)
            except Empty:
                return busy
            if queued is None:
                self._ended = True
            else:
                self._scheduler.put(queued)

    def _turn(self) -> None:
        chosen = self._scheduler.next()
        if isinstance(chosen, Queued):
            self._execute(chosen)
        else:
            self._compute(chosen)

    def _execute(self, queued: Queued) -> None:
        command = queued.command
        try:
            if isinstance(command, commands.Sample):
                self.team.sample(command, queued.future)
            else:
                queued.future.set_result(self.team.execute(command))
        except BaseException as error:  # the caller's to raise, in the caller's thread
            queued.future.set_exception(error)
        finally:
            self._done(queued)

    def _done(self, queued: Queued) -> None:
        self.team.executor.ahead.drop(queued.command)
        self._scheduler.done(queued)

    def _compute(self, rows: Sequence[Sequence[Taken]]) -> None:
        """The next micro-batches, on all ranks; a command that is whole then, or fails, ends."""
        there = [[taken for taken in row if self._begun(taken)] for row in rows]
        there = [row for row in there if row]
        if not there:
            return
        try:
            results = self.team.compute([[_batch(taken) for taken in row] for row in there])
        except BaseException as error:
            self._fail_under_way(error)
            return
        pairs = [pair for row, found in zip(there, results, strict=True)
                 for pair in zip(row, found, strict=True)]  # fmt: skip
        for taken, result in pairs:
            _record(taken, result)
        for queued in dict.fromkeys(taken.queued for taken, _ in pairs):
            try:
                self._settle(queued)
            except BaseException as error:
                self._fail(queued, error)

    def _begun(self, taken: Taken) -> bool:
        """Begin a command with its first micro-batch; False where it has failed already."""
        queued, command = taken.queued, taken.queued.command
        assert isinstance(command, ForwardBackward)
        if taken.number == 0:
            queued.results = [None] * len(command.documents)
            try:
                self.team.executor.run(command.run).refuse_spoilt()
                if command.backward:
                    self.team.execute(commands.Begin(command.run))
            except BaseException as error:
                self._fail(queued, error)
                return False
        return not queued.future.done()

    def _settle(self, queued: Queued) -> None:
        command = queued.command
        assert isinstance(command, ForwardBackward)
        if queued.error is not None:
            if command.backward:
                self.team.execute(commands.Abandon(command.run, str(queued.error)))
            self._fail(queued, queued.error)
        elif queued.whole:
            if command.backward:
                self.team.execute(commands.Finish(command.run))
            self._done(queued)
            queued.future.set_result([result for result in queued.results if result is not None])

    def _fail(self, queued: Queued, error: BaseException) -> None:
        self._done(queued)
        queued.future.set_exception(error)

    def _fail_under_way(self, error: BaseException) -> None:
        """What was computed of them went with a rank."""
        for queued in self._scheduler.under_way():
            run = self.team.executor.runs.get(queued.owner)
            assert isinstance(queued.command, ForwardBackward)
            if run is not None and queued.command.backward:
                run.failure = str(error)
            self._fail(queued, error)


def _batch(taken: Taken) -> MicroBatch:
    command = taken.queued.command
    assert isinstance(command, ForwardBackward)
    documents = [command.documents[i] for i in command.micro_batches[taken.number]]
    return MicroBatch(
        command.run, documents, command.objective, command.backward, (taken.number,),
        everywhere=command.everywhere,
    )  # fmt: skip


def _record(taken: Taken, result: Result) -> None:
    queued, command = taken.queued, taken.queued.command
    assert isinstance(command, ForwardBackward)
    if isinstance(result, Exception):
        queued.error = queued.error or result
        return
    queued.computed += 1
    indices = command.micro_batches[taken.number]
    for index, one in zip(indices, result, strict=True):
        queued.results[index] = one


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

"""All ranks as one: rank 0's executor in this process, those of the others in theirs.

Every rank does the same commands in the same order. What only samples is rank 0's alone: where
its language model is sharded, the others lend their shards for each row that it reads. A rank that
dies is started again, with all others, from what rank 0 has.
"""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from plait.errors import ConfigError, ModelError, RankDiedError
from plait.trainer.build import trains_language
from plait.trainer.checkpoint import Snapshot
from plait.trainer.engine import commands
from plait.trainer.engine.commands import Command, MicroBatch
from plait.trainer.engine.executor import Executor
from plait.trainer.engine.restarting import Kept, keep, put_back
from plait.trainer.engine.retrying import Outcome, Result, compute_rows, is_out_of_memory
from plait.trainer.ranks.children import Child, Start, packed, threads_each
from plait.trainer.ranks.group import ALONE, Group, OutOfStepError, Ranks, Seat, refuse_others
from plait.trainer.ranks.sharding import shard_layers

_ONE_RANK = (
    commands.CreateView,
    commands.TakeView,
    commands.SaveView,
    commands.DropView,
    commands.CancelSample,
)
"""Commands that other ranks need not do, or do in part."""

_ATTEMPTS = 3
"""To start the ranks again, before the engine is given up."""


class Team:
    """Rank 0's executor, and what keeps the other ranks beside it.

    Args:
        devices: Ranks, each with a device of its own; on a CPU each is a process.
        strategy: One of `plait.trainer.ranks.group.STRATEGIES`.
        sampler_bytes: Memory for the keys and values of what is sampled, on each language model.

    Raises:
        ConfigError: torch.distributed is in use already.
        RankDiedError: a rank cannot be started.
    """

    def __init__(self, devices: int, strategy: str, sampler_bytes: int) -> None:
        self.devices, self.strategy, self._sampler_bytes = devices, strategy, sampler_bytes
        self._children: list[Child] = []
        self._mirrors: dict[str, Snapshot] = {}
        """Runs with shards as their last step left them, which no rank has whole."""

        self._together = False
        """Whether the other ranks do what rank 0 does."""

        self._restarting = False
        self._loss: str | None = None
        self._end: str | None = None
        """Why nothing can be computed any more."""

        self.executor = self._new_executor(self._start() if devices > 1 else ALONE)

    @property
    def pids(self) -> list[int]:
        """Of the processes of ranks 1 and up."""
        return [child.pid for child in self._children]

    def execute(self, command: Command) -> Any:
        """Do a command on all ranks that it concerns; its result, or error, is rank 0's.

        Raises:
            RankDiedError: a rank ended, and the command was not done; all ranks are as before it.
        """
        self._require()
        if isinstance(command, commands.OptimStep):
            self.executor.run(command.run).refuse_failed()
        if isinstance(command, commands.OptimStep | commands.SaveState | commands.TakeView):
            self.executor.run(command.run).refuse_spoilt()
        if isinstance(command, commands.LoadState):
            return self._load(command)
        if isinstance(command, commands.SaveState):
            return self._save(command)
        if isinstance(command, commands.CreateRun | commands.CreateView | commands.TakeView):
            return self._make(command)
        return self._all(self._told(command), lambda: self.executor.execute(command))

    def take_loss(self) -> str | None:
        """Why ranks were started again since this was last asked, and with them went what was
        computed of calls that are not whole; None where they were not."""
        loss, self._loss = self._loss, None
        return loss

    def _make(self, command: commands.CreateRun | commands.CreateView | commands.TakeView) -> Any:
        """A new run or view, on all ranks that it concerns or on none."""
        try:
            made = self._all(self._told(command), lambda: self.executor.execute(command))
            if isinstance(command, commands.CreateView) and command.source is not None:
                self.executor.load_view(command.view, command.source)
        except Exception:
            if self._end is None:
                self.execute(
                    commands.DropRun(command.run)
                    if isinstance(command, commands.CreateRun)
                    else commands.DropView(command.view)
                )
            raise
        return made

    def _told(self, command: Command) -> Command | None:
        """What the other ranks do at a command."""
        if isinstance(command, commands.TakeView):
            run = self.executor.runs.get(command.run)
            return commands.Gather(command.run, True) if run is not None and run.sharded else None
        if isinstance(command, commands.CreateView) and self.executor.group.sharded:
            alone = trains_language(command.spec)  # it is whole, and rank 0's
            return None if alone else replace(command, source=None)
        if isinstance(command, commands.DropView) and self.executor.group.sharded:
            return command
        return None if isinstance(command, _ONE_RANK) else command

    def _all(self, told: Command | None, mine: Callable[[], Any]) -> Any:
        """Do `mine` here while the other ranks do `told`."""
        if not self._children or told is None:
            return self._alone(mine)
        self._tell_freed()
        self._tell(told)
        result, error = None, None
        self._together = True
        try:
            result = mine()
        except Exception as one:
            error = one
        finally:
            self._together = False
        if isinstance(told, commands.UNANSWERED):
            return self._settled(told, result, error, [])
        theirs = [self._failure_of(child, waits=error is None) for child in self._children]
        result = self._settled(told, result, error, theirs)
        self._mirror(told)
        return result

    def _alone(self, mine: Callable[[], Any]) -> Any:
        try:
            return mine()
        except OutOfStepError as error:
            self._restart(str(error))
            raise

    def _failure_of(self, child: Child, waits: bool) -> Exception | None:
        try:
            child.answer(waits=waits)
        except Exception as error:
            return error
        return None

    def _cut(self, told: Command) -> bool:
        """Whether what rank 0 did at a command goes with another rank, which had a part of it."""
        run = self.executor.runs.get(getattr(told, "run", ""))
        return run is not None and run.sharded

    def _settled(
        self,
        told: Command,
        result: Any,
        error: Exception | None,
        theirs: Sequence[Exception | None],
    ) -> Any:
        """Rank 0's result or error; ranks that do not agree with it are started again."""
        agreed = all(type(one) is type(error) for one in theirs)
        if not agreed or isinstance(error, OutOfStepError):
            died = next((one for one in theirs if isinstance(one, RankDiedError)), None)
            why = died or next((one for one in theirs if one is not None), error)
            undone = self._cut(told) if error is None else died is not None
            self._restart(str(why))
            if undone:
                raise RankDiedError(
                    f"{why}; nothing of this command counts. The ranks are started again, and "
                    "the run goes on from its last step"
                ) from error
        if error is not None:
            raise error
        return result

    def _save(self, command: commands.SaveState) -> str:
        """All ranks bring together what there is, and rank 0 writes it: it alone may fail then."""
        if not command.overwrite:
            command.store.refuse_taken(command.place)
        gather = commands.Gather(command.run, command.weights_only)
        return self.executor.write_state(command, self.gather(gather, command.cursor))

    def gather(self, command: commands.Gather, cursor: Any = None) -> Snapshot:
        """A run as it is, in this rank's memory."""
        made: Snapshot = self._all(command, lambda: self.executor.gather(command, cursor))
        return made

    def _load(self, command: commands.LoadState) -> Any:
        """Rank 0 reads and checks the files, and all take what it has read.

        Returns the cursor that was saved with the state, if the state was asked for.
        """
        snapshot = self.executor.read_state(command)
        self.restore(commands.Restore(command.run, snapshot))
        return None if snapshot.state is None else snapshot.state.extra.get("cursor")

    def restore(self, command: commands.Restore) -> None:
        """Put a run where a snapshot has it, on all ranks."""
        self._all(command, lambda: self.executor.execute(command))

    def compute(self, rows: Sequence[Sequence[MicroBatch]]) -> list[list[Result]]:
        """The micro-batches of at most one row for each rank; what fails is tried in pieces.

        Raises:
            RankDiedError: a rank ended; no run has gradients then.
        """
        self._require()
        return compute_rows(
            rows,
            self._attempt,
            in_step=self.executor.group.sharded,
            release=self.executor.release_memory,
        )

    def _attempt(self, rows: Sequence[Sequence[MicroBatch]]) -> list[Outcome]:
        """One row on each rank, an empty one where there are fewer."""
        backward = any(one.backward for row in rows for one in row)
        beside = rows[0][0].run
        filled = [*rows, *([()] * (self.devices - len(rows)))]
        mine, *theirs = [commands.Compute(row, beside, backward) for row in filled]
        active = self._children if self.executor.group.sharded else self._children[: len(rows) - 1]
        self._tell_freed()
        try:  # all of them, before one rank begins what another will not
            told = [packed(command) for command in theirs]
        except ModelError as error:
            return [error for _ in rows]
        for child, command in zip(active, told, strict=False):
            child.send(command)
        outcomes = [self._here(mine)]
        # One that computes alone may take its time, whatever became of this rank's row.
        waits = not (self.executor.group.sharded and isinstance(outcomes[0], Exception))
        outcomes += [_outcome(child, waits) for child in active]
        lost = next(
            (one for one in outcomes if isinstance(one, RankDiedError | OutOfStepError)), None
        )
        if lost is None:
            return outcomes[: len(rows)]
        self._restart(str(lost))
        raise RankDiedError(
            f"{lost}; the forward_backward calls under way do not count. The ranks are started "
            "again, and runs go on from their last step"
        )

    def _here(self, command: commands.Compute) -> Outcome:
        self._together = True
        try:
            return self.executor.compute(command)
        except Exception as error:
            if is_out_of_memory(error):
                error.__traceback__ = None  # its frames hold the memory that is short
            return error
        finally:
            self._together = False

    def sample(self, command: commands.Sample, future: "Future[Any]") -> None:
        self._require()
        self.executor.sample(command, future)

    def sample_step(self) -> None:
        try:
            self.executor.sample_step()
        except OutOfStepError as error:  # the requests have been told
            with suppress(RankDiedError):  # as whoever wants anything of the engine will be
                self._restart(str(error))

    def close(self) -> None:
        """End the other ranks; idempotent."""
        for child in self._children:
            child.end()
        self._children = []
        self.executor.group.close()

    def _tell_freed(self) -> None:
        freed, self.executor.forgotten = self.executor.forgotten, []
        if freed:
            self._tell(commands.Forget(freed))

    def _tell(self, command: Command) -> None:
        if self._children:
            told = packed(command)
            for child in self._children:
                child.send(told)

    def _lend(self, base: commands.BaseKey) -> None:
        if not self._together:
            self._tell_freed()
            self._tell(commands.Lend(base))

    def _mirror(self, told: Command) -> None:
        """Keep what one dead rank would take with it."""
        if isinstance(told, commands.DropRun):
            self._mirrors.pop(told.run, None)
        if not isinstance(told, commands.CreateRun | commands.OptimStep | commands.Restore):
            return
        run = self.executor.run(told.run)
        if run.sharded:
            mirror = self.gather(commands.Gather(run.name))
            if mirror.state is not None:  # what is pending is lost with a rank, sharded or not
                mirror.state.gradients, mirror.state.pending_weight = {}, 0.0
            self._mirrors[run.name] = mirror

    def _start(self) -> Group:
        accelerator = _accelerator(self.devices)
        refuse_others()  # before processes are started, which takes seconds
        port = find_free_network_port()
        threads, path = threads_each(self.devices), tuple(sys.path)
        seats = [
            Seat(rank, self.devices, port, self.strategy, accelerator)
            for rank in range(self.devices)
        ]
        try:
            for seat in seats[1:]:
                start = Start(seat, threads, self._sampler_bytes, path)
                self._children.append(Child(start))
            for child in self._children:
                child.ready()
            return Ranks(seats[0], shard_layers)
        except BaseException:
            self._end_children()
            raise

    def _end_children(self) -> None:
        for child in self._children:
            child.kill()
        self._children = []

    def _new_executor(self, group: Group) -> Executor:
        executor = Executor(self._sampler_bytes, group)
        executor.lend = self._lend
        return executor

    def _require(self) -> None:
        if self._end is not None:
            raise RankDiedError(self._end)

    def _restart(self, why: str) -> None:
        """New processes, with every run as rank 0 has it: as its last step left it.

        Raises:
            RankDiedError: that does not succeed either; the engine is of no use any more.
        """
        if self._restarting:
            raise RankDiedError(why)
        self._restarting, self._loss = True, why
        try:
            self._start_again(why)
        except Exception as error:
            self._end_children()
            self._end = (
                f"the ranks could not be started again after {why}: {error}; make a new "
                "ServiceClient and go on from the last saved state"
            )
            raise RankDiedError(self._end) from error
        finally:
            self._restarting = False

    def _start_again(self, why: str) -> None:
        self._end_children()
        old = self.executor
        for run in old.runs.values():
            run.lose(f"its gradients went with a rank: {why}")
        kept = keep(old, self._mirrors)
        if old.group.sharded:
            old.fail_samples(RankDiedError(f"{why}; sample again"))
        for left in reversed(range(_ATTEMPTS)):
            try:
                self._build_again(old, kept)
                return
            except RankDiedError:
                self._end_children()
                if not left:
                    raise

    def _build_again(self, old: Executor, kept: Kept) -> None:
        """Every run, and every view that needs others' shards, on new processes."""
        self.executor.group.close()
        group = self._start()
        if group.sharded:
            self.executor = self._new_executor(group)
        else:
            old.group = group
        put_back(kept, self.executor, self._all)


def _accelerator(devices: int) -> str:
    """
    Raises:
        ConfigError: there are GPUs, and fewer than that.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < devices:
        raise ConfigError(
            f"each of several devices must be a GPU of its own; this machine has {gpus} and "
            f"devices is {devices}: lower it, or set CUDA_VISIBLE_DEVICES= to compute on the CPU"
        )
    return "auto" if gpus else "cpu"


def _outcome(child: Child, waits: bool) -> Outcome:
    try:
        found: Outcome = child.answer(waits=waits)
        return found
    except Exception as error:
        return error

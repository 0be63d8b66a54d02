"""The loader: packs of decoded documents, in an order that a restart reproduces exactly.

    for pack in loader:
        stream = plait.stream.pack(pack.documents, pack.inputs)

What is decoded ahead is never part of the state. A pack is ACCOUNTED when it is given to the
training loop: only then are its rows written to the ledger, its failures told to the policy, and
the state moved past it. A framework that fetches ahead of the step by itself (Lightning fetches
one batch) iterates `packs()` and calls `account(pack)` in the step; plain iteration does both.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np

from plait.datasets.absences import Absences
from plait.datasets.assembly import Loaded, Pack, Task, assemble, bytes_of, view_of
from plait.datasets.blend import Share
from plait.datasets.columns import Measured, RowCounts
from plait.datasets.executor import Executor
from plait.datasets.journal import Journal
from plait.datasets.ledger import Ledger, NullLedger
from plait.datasets.planning import counts_of, measure, placed, screen
from plait.datasets.policy import FailurePolicy
from plait.datasets.schedule import Block, Schedule
from plait.datasets.settings import LoaderSettings
from plait.datasets.truncation import truncated
from plait.errors import CheckpointError, ConfigError, DataError, DecodeTimeoutError, Origin
from plait.stream import Document, Item, ItemInputs, Sample

__all__ = ["Loader", "LoaderSettings", "Pack"]


class Loader:
    """Iterates over packs, from wherever its state stands.

    Args:
        samples: Read by one thread at a time.
        indices: The rows to use, each once; the others are held out, and the ledger says so.
        render: From headers to positions; called by one thread at a time.
        load: Decodes one item; called by many threads at once.
        policy: Broken rows, told of in the order of the packs.
        ledger: One of its own; None keeps none.
        shares: The datasets of a blend, in the order of their rows, each with rows of `indices`;
            none is a single dataset.
        journal: Where rows that timed out are written down; None keeps them in memory.
        measured: What `measure` found for these indices; None measures through `render`.
        left_out: Rows that never became samples (a picture without text), and why.
        broken: Held-out rows that could not be read, and why; the policy knows of them already.

    Raises:
        ConfigError: an index twice, or out of range, or `measured` for other indices.
        DataError: no usable row, or whatever the policy raises.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        indices: Iterable[int],
        render: Callable[[Sample], Document],
        load: Callable[[Item], ItemInputs],
        settings: LoaderSettings,
        policy: FailurePolicy | None = None,
        ledger: Ledger | None = None,
        *,
        shares: Sequence[Share] = (),
        journal: Journal | None = None,
        measured: Measured | None = None,
        left_out: Iterable[tuple[Origin, str]] = (),
        broken: Iterable[tuple[Origin, str]] = (),
    ) -> None:
        self.settings = settings
        self.policy = policy or FailurePolicy()
        self.ledger = ledger or NullLedger()
        self.journal = Journal() if journal is None else journal
        self._samples, self._render, self._load = samples, render, load
        self._rendering = threading.Lock()
        chosen = _checked(indices, len(samples))
        if measured is None:
            measured = measure(
                samples,
                self._count,
                indices=chosen,
                policy=self.policy,
                workers=settings.workers,
            )
        self.measured = _screened(measured, chosen, settings, self.policy)
        self._schedule = Schedule(self.measured, settings, shares)
        self._fingerprint = self._schedule.fingerprint()
        self._absent = Absences(samples, self.measured, shares)
        if not isinstance(self.ledger, NullLedger):
            self._absent.add_held_out(chosen, left_out, broken)
        self._plans: dict[int, Block] = {}
        self._epoch = self._next = 0
        self._drawn: dict[str, int] = {}
        self._given: deque[Pack] = deque()
        self._ended = False
        self._live: Generator[Pack, None, None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Pack]:
        """Packs from the state on, each accounted as it is given."""
        live = self.packs()
        try:
            for pack in live:
                self.account(pack)
                yield pack
        finally:
            if self._live is live:
                self.close()

    def plan(self, epoch: int) -> list[tuple[int, ...]]:
        """The packs of an epoch (of a blend: a block), as row numbers in the samples."""
        numbers = self.measured.columns["row"]
        return [tuple(numbers[list(pack)].tolist()) for pack in self._plan(epoch)]

    @property
    def drawn(self) -> dict[str, int]:
        """Rows trained on so far, by dataset, in all epochs together."""
        return dict.fromkeys(self.measured.datasets, 0) | self._drawn

    @property
    def ended(self) -> bool:
        """Whether nothing comes after what was accounted."""
        last = self._ends_before(self._epoch)
        return last or (
            self._next >= len(self._plan(self._epoch)) and self._ends_before(self._epoch + 1)
        )

    def packs(self) -> Iterator[Pack]:
        """Packs from the state on; each must be given to `account`, in order, when it is used.

        Starting again, or loading a state, ends what was started before.
        """
        self.close()
        self._ended = False
        self._live = self._produce()
        return self._live

    def account(self, pack: Pack) -> None:
        """The training loop takes `pack`: record its rows and move the state past it.

        Raises:
            DataError: a row of it broke and the policy does not skip it.
            ConfigError: the pack is not the next one that was given.
        """
        if pack is not next((given for given in self._given if given.documents), None):
            raise ConfigError(
                f"packs are accounted once and in order: pack {pack.index} of epoch {pack.epoch} "
                "is not the next one"
            )
        settled = None
        while settled is not pack:
            settled = self._given.popleft()
            self._settle(settled)
        if self._ended:
            self._settle_empty()

    def state_dict(self) -> dict[str, Any]:
        """What was last accounted, ready for JSON; what is decoded ahead is not part of it."""
        return {
            "epoch": self._epoch,
            "pack": self._next,
            "plan": self._fingerprint,
            "drawn": dict(self._drawn),
            "policy": self.policy.state_dict(),
            "ledger": self.ledger.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            CheckpointError: the rows, their ids, lengths or the settings are others, so that the
                packs would be too; or the ledger is not the checkpoint's.
        """
        if state["plan"] != self._fingerprint:
            raise CheckpointError(
                "a run resumes only on the data it began with: the rows, their ids or lengths, or "
                "the seed, weights, budgets of a pack, views, shuffle, packing or window have "
                "changed; put them back, or begin a new run"
            )
        self.close()
        self.ledger.restore(state["ledger"])
        self.policy.load_state_dict(state["policy"])
        self._epoch, self._next = int(state["epoch"]), int(state["pack"])
        self._drawn = {name: int(count) for name, count in state["drawn"].items()}

    def close(self) -> None:
        """Stop decoding ahead. The state stays; iterating goes on from it."""
        if self._live is not None:
            self._live.close()
            self._live = None
        self._given.clear()

    # What is produced ahead

    def _produce(self) -> Generator[Pack, None, None]:
        settings = self.settings
        executor = Executor(settings.workers, settings.prefetch)
        tasks = self._tasks(self._epoch, self._next)
        barren, fruitless = 0, (self._epoch, self._next) == (0, 0)
        prepared = executor.map(
            self._work, tasks, weigh=bytes_of, most=settings.prefetch_bytes
        )  # fmt: skip
        with closing(prepared) as batches:
            for pack in map(assemble, batches):
                self._write_journal(pack)
                self._given.append(pack)
                if pack.documents:
                    barren, fruitless = 0, False
                    yield pack
                    continue
                barren += 1
                self._settle_empty()
                # An endless loader must not turn for ever over rows that all break.
                if barren >= 2 * max(len(plan) for plan in self._plans.values()):
                    raise _all_broken(pack)  # so many hold a whole epoch
        self._ended = True
        self._settle_empty()
        if fruitless and barren:
            raise _all_broken(pack)

    def _tasks(self, block: int, start: int) -> Iterator[list[Task]]:
        while not self._ends_before(block):
            plan = self._plan(block)
            for index in range(start, len(plan)):
                yield [self._task(block, index, *drawn) for drawn in plan.drawn(index)]
            block, start = block + 1, 0

    def _task(self, block: int, index: int, place: int, epoch: int) -> Task:
        row = self.measured.rows[place]
        view = view_of(self.settings.seed, epoch, row.row, self.settings.views)
        return Task(block, index, row, epoch, view)

    def _plan(self, block: int) -> Block:
        if block not in self._plans:
            self._plans = {e: p for e, p in self._plans.items() if e >= self._epoch}
            self._plans[block] = self._schedule.block(block)
        return self._plans[block]

    def _ends_before(self, block: int) -> bool:
        epochs = self.settings.epochs
        return (epochs is not None and block >= epochs) or self._schedule.ends_before(block)

    def _work(self, task: Task) -> Loaded:
        row = task.row
        try:
            if (timeout := self.journal.error(task.epoch, row.origin)) is not None:
                raise DecodeTimeoutError(timeout.message, timeout.origin)
            # Tokenizers and record files are not promised to be safe for threads; decoding is.
            with self._rendering:
                sample = self._samples[row.row]
                document = self._render(replace(sample, view=task.view))
            if document.length != row.length + row.cut:
                raise DataError(
                    f"a row must keep its length: {row.length + row.cut} positions were planned "
                    f"and {document.length} rendered; the row or its file changed during the run"
                )
            document = truncated(document, row.length)
            return document, tuple(self._load(item) for item in document.items)
        except DataError as error:
            raise placed(error, row.origin) from error

    def _write_journal(self, pack: Pack) -> None:
        """Before a pack is used, what the clock took out of it is safely on the disk."""
        for outcome in pack.outcomes:
            if isinstance(outcome.error, DecodeTimeoutError):
                self.journal.add(outcome.epoch, outcome.origin, outcome.reason)

    def _count(self, sample: Sample) -> RowCounts:
        with self._rendering:
            return counts_of(self._render(sample))

    # What is accounted

    def _settle_empty(self) -> None:
        """Settle packs that came to nothing, once all that was given before them is accounted."""
        if not any(pack.documents for pack in self._given):
            while self._given:
                self._settle(self._given.popleft())

    def _settle(self, pack: Pack) -> None:
        self._tell_policy(pack)
        if pack.index == 0:
            for share, epoch in self._plan(pack.epoch).begun:
                for absent in self._absent.of(share):
                    self.ledger.record(epoch, absent.status, absent.origin, absent.reason)
        for outcome in pack.outcomes:
            self.ledger.record(outcome.epoch, outcome.status, outcome.origin, outcome.reason)
            if outcome.trained:
                dataset = outcome.origin.dataset
                self._drawn[dataset] = self._drawn.get(dataset, 0) + 1
        self._epoch, self._next = pack.epoch, pack.index + 1

    def _tell_policy(self, pack: Pack) -> None:
        # A pack that the policy stops at is not taken: a later run, with another policy, gets it.
        before = self.policy.state_dict()
        try:
            for outcome in pack.outcomes:
                if outcome.error is not None:
                    self.policy.failure(outcome.error)
                elif outcome.trained:
                    self.policy.success()
        except DataError:
            self.policy.load_state_dict(before)
            raise


def _all_broken(pack: Pack) -> DataError:
    last = pack.outcomes[-1]
    return DataError(
        "every row of a whole epoch broke and nothing is left to train on; mend the rows. The "
        f"last: {last.reason}",
        last.origin,
    )


def _checked(indices: Iterable[int], samples: int) -> list[int]:
    chosen = sorted(indices)
    if len(set(chosen)) != len(chosen):
        raise ConfigError("an index may stand only once: a row is used once an epoch")
    if chosen and (chosen[0] < 0 or chosen[-1] >= samples):
        raise ConfigError(
            f"indices go from 0 to {samples - 1}, not from {chosen[0]} to {chosen[-1]}"
        )
    return chosen


def _screened(
    measured: Measured, chosen: Sequence[int], settings: LoaderSettings, policy: FailurePolicy
) -> Measured:
    found = screen(measured, limits=settings, policy=policy)
    refused_rows = [row.row for row in found.refused]
    rows = np.sort(np.concatenate([found.columns["row"], np.array(refused_rows, dtype=np.int64)]))
    if not np.array_equal(rows, np.array(chosen, dtype=np.int64)):
        raise ConfigError("measured must be for the same rows; measure the indices given here")
    if not len(found):
        reason = f"; the first: {found.refused[0].reason}" if found.refused else ""
        raise DataError(
            f"a dataset needs a usable row: of {len(chosen)} rows none can be used{reason}",
            found.refused[0].origin if found.refused else None,
        )
    return found

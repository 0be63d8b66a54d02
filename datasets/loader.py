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

from plait.datasets.assembly import Loaded, Pack, RowOutcome, Task, assemble, view_of
from plait.datasets.executor import Executor
from plait.datasets.ledger import Ledger, NullLedger, RowName, row_name
from plait.datasets.planning import (
    Measured,
    measure,
    origin_of,
    placed,
    plan_epoch,
    positions_by_medium,
    screen,
    unread,
)
from plait.datasets.policy import FailurePolicy
from plait.datasets.settings import LoaderSettings, fingerprint
from plait.errors import CheckpointError, ConfigError, DataError, Origin
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
        measured: Measured | None = None,
        left_out: Iterable[tuple[Origin, str]] = (),
        broken: Iterable[tuple[Origin, str]] = (),
    ) -> None:
        self.settings = settings
        self.policy = policy or FailurePolicy()
        self.ledger = ledger or NullLedger()
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
        self._fingerprint = fingerprint(self.measured, settings)
        self._absent = self._absences(chosen, left_out, broken)
        self._plans: dict[int, list[tuple[int, ...]]] = {}
        self._epoch = self._next = 0
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
        """The packs of an epoch, as row numbers in the samples."""
        rows = self.measured.rows
        return [tuple(rows[place].row for place in pack) for pack in self._plan(epoch)]

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
                "the seed, capacity, max_documents, views, shuffle or window have changed; put "
                "them back, or begin a new run"
            )
        self.close()
        self.ledger.restore(state["ledger"])
        self.policy.load_state_dict(state["policy"])
        self._epoch, self._next = int(state["epoch"]), int(state["pack"])

    def close(self) -> None:
        """Stop decoding ahead. The state stays; iterating goes on from it."""
        if self._live is not None:
            self._live.close()
            self._live = None
        self._given.clear()

    # What is produced ahead

    def _produce(self) -> Generator[Pack, None, None]:
        executor = Executor(self.settings.workers, self.settings.prefetch)
        barren, fruitless = 0, (self._epoch, self._next) == (0, 0)
        with closing(executor.map(self._work, self._tasks(self._epoch, self._next))) as batches:
            for pack in map(assemble, batches):
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

    def _tasks(self, epoch: int, start: int) -> Iterator[list[Task]]:
        settings = self.settings
        while settings.epochs is None or epoch < settings.epochs:
            plan = self._plan(epoch)
            for index in range(start, len(plan)):
                rows = [self.measured.rows[place] for place in plan[index]]
                yield [
                    Task(epoch, index, row, view_of(settings.seed, epoch, row.row, settings.views))
                    for row in rows
                ]
            epoch, start = epoch + 1, 0

    def _plan(self, epoch: int) -> list[tuple[int, ...]]:
        if epoch not in self._plans:
            settings = self.settings
            self._plans = {e: p for e, p in self._plans.items() if e >= self._epoch}
            self._plans[epoch] = plan_epoch(
                self.measured.lengths,
                seed=settings.seed,
                epoch=epoch,
                capacity=settings.capacity,
                max_documents=settings.max_documents,
                groups=self.measured.groups,
                shuffle=settings.shuffle,
                window=settings.window,
            )
        return self._plans[epoch]

    def _work(self, task: Task) -> Loaded:
        try:
            # Tokenizers and record files are not promised to be safe for threads; decoding is.
            with self._rendering:
                sample = self._samples[task.row.row]
                document = self._render(replace(sample, view=task.view))
            if document.length != task.row.length:
                raise DataError(
                    f"a row must keep its length: {task.row.length} positions were planned and "
                    f"{document.length} rendered; the row or its file changed during the run"
                )
            return document, tuple(self._load(item) for item in document.items)
        except DataError as error:
            raise placed(error, task.row.origin) from error

    def _count(self, sample: Sample) -> Mapping[str, int]:
        with self._rendering:
            return positions_by_medium(self._render(sample))

    # What is accounted

    def _settle_empty(self) -> None:
        """Settle packs that came to nothing, once all that was given before them is accounted."""
        if not any(pack.documents for pack in self._given):
            while self._given:
                self._settle(self._given.popleft())

    def _settle(self, pack: Pack) -> None:
        self._tell_policy(pack)
        if pack.index == 0:
            for absent in self._absent:
                self.ledger.record(pack.epoch, absent.status, absent.origin, absent.reason)
        for outcome in pack.outcomes:
            self.ledger.record(pack.epoch, outcome.status, outcome.origin, outcome.reason)
        self._epoch, self._next = pack.epoch, pack.index + 1

    def _tell_policy(self, pack: Pack) -> None:
        # A pack that the policy stops at is not taken: a later run, with another policy, gets it.
        before = self.policy.state_dict()
        try:
            for outcome in pack.outcomes:
                if outcome.error is not None:
                    self.policy.failure(outcome.error)
                elif outcome.status == "used":
                    self.policy.success()
        except DataError:
            self.policy.load_state_dict(before)
            raise

    def _absences(
        self,
        chosen: Sequence[int],
        left_out: Iterable[tuple[Origin, str]],
        broken: Iterable[tuple[Origin, str]],
    ) -> list[RowOutcome]:
        """The rows that no epoch packs: refused, held out, or never a sample."""
        absent = [RowOutcome(r.origin, r.status, r.reason) for r in self.measured.refused]
        if isinstance(self.ledger, NullLedger):
            return absent
        failed = {_name(origin): RowOutcome(origin, "broken", reason) for origin, reason in broken}
        for row in sorted(set(range(len(self._samples))) - set(chosen)):
            origin = self._origin(row)
            whole = RowOutcome(origin, "left_out", "held out by the split")
            absent.append(failed.pop(_name(origin), whole))
        absent += failed.values()
        absent += [RowOutcome(origin, "left_out", reason) for origin, reason in left_out]
        names = [row.origin for row in self.measured.rows] + [row.origin for row in absent]
        seen: set[RowName] = set()
        for origin in names:
            name = _name(origin)
            if name in seen:
                raise ConfigError(
                    f"a ledger needs rows with names of their own: two are called ({origin}); "
                    "give each dataset a name of its own"
                )
            seen.add(name)
        return absent

    def _origin(self, row: int) -> Origin:
        try:
            return origin_of(self._samples[row], row)
        except DataError as error:
            return unread(error, row).origin


def _name(origin: Origin) -> RowName:
    return row_name(origin.dataset, origin.row, origin.file)


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
    found = screen(
        measured,
        capacity=settings.capacity,
        max_documents=settings.max_documents,
        policy=policy,
    )
    if sorted([row.row for row in found.rows] + [row.row for row in found.refused]) != chosen:
        raise ConfigError("measured must be for the same rows; measure the indices given here")
    if not found.rows:
        reason = f"; the first: {found.refused[0].reason}" if found.refused else ""
        raise DataError(
            f"a dataset needs a usable row: of {len(chosen)} rows none can be used{reason}",
            found.refused[0].origin if found.refused else None,
        )
    return found

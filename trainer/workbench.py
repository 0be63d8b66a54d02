"""What training, planning, previewing and sampling all begin with: model, rows, loaders."""

from collections.abc import Callable, Collection, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

from plait.datasets.columns import Measured, RowCounts
from plait.datasets.decoding import Decoder
from plait.datasets.executor import Executor
from plait.datasets.headers import HeaderCache
from plait.datasets.journal import HELD_OUT, Journal
from plait.datasets.ledger import Ledger
from plait.datasets.loader import Loader
from plait.datasets.planning import counts_of, measure, placed, screen
from plait.datasets.policy import FailurePolicy
from plait.datasets.settings import LoaderSettings
from plait.encoders.feature_cache import FeatureCache
from plait.encoders.media_encoder import MediaEncoder
from plait.errors import DataError, DecodeTimeoutError, Origin
from plait.home import home
from plait.stream import Document, Item, Sample, check_placeholders, render
from plait.trainer.build import Built
from plait.trainer.config import RunConfig
from plait.trainer.data import RunData
from plait.trainer.evaluation.reader import Reader, batched
from plait.trainer.evaluation.suite import Suite
from plait.trainer.loading import BATCH, ItemLoader, cacheable

TIMEOUTS = "timeouts.jsonl"
"""In a run's folder: rows that a clock decided about."""


@dataclass
class Workbench:
    """A run's parts, made when they are first needed."""

    config: RunConfig
    built: Built
    data: RunData
    held_out_broken: list[tuple[Origin, str]] = field(default_factory=list)
    """Held-out rows that `check_held_out` could not read, and why."""

    def __post_init__(self) -> None:
        for encoder in self.encoders.values():
            encoder.headers = self.headers

    def render(self, sample: Sample, for_generation: bool = False) -> Document:
        """Render and check guarantee 1: placeholders equal promised features."""
        document = render(sample, self.built.tokenizer, self.built.layout, for_generation)
        check_placeholders(document, self.built.layout.placeholder_id)
        return document

    @cached_property
    def encoders(self) -> dict[str, MediaEncoder]:
        return {name: self.built.model.media_encoder(name) for name in self.built.model.encoders}

    @cached_property
    def decoder(self) -> Decoder:
        """Decodes for all of the run; its processes start with the first sound or film."""
        return Decoder(max(1, self.config.train.workers))

    @cached_property
    def headers(self) -> HeaderCache:
        """Headers of media files, read once for all runs."""
        return HeaderCache(home() / "headers", self.decoder.header)

    @cached_property
    def loading(self) -> ItemLoader:
        config = self.config.train
        caches = {
            name: FeatureCache(
                home() / "features",
                self.built.hashes[f"encoder:{name}"],
                config.cache_memory_mb * 1_000_000,
            )
            for name in cacheable(self.built.model)
        }
        limits = self.config.data.limits
        return ItemLoader(self.encoders, self.config.views, limits, caches, self.decoder)

    @cached_property
    def reader(self) -> Reader:
        return Reader(self.render, self.loading, max(1, self.config.train.workers))

    @cached_property
    def suite(self) -> Suite:
        built = self.built
        return Suite(
            built.model,
            self.reader,
            built.tokenizer,
            built.layout,
            self.data.classes,
            self.config.evaluation,
        )

    @cached_property
    def policy(self) -> FailurePolicy:
        """One budget for the whole run: held-out rows, measuring and loading."""
        broken = self.config.data.broken
        return FailurePolicy(
            on_error=broken.on_error,
            max_consecutive=broken.max_consecutive,
            max_total=broken.max_total,
            too_long=broken.too_long,
        )

    @property
    def loader_settings(self) -> LoaderSettings:
        train = self.config.train
        return LoaderSettings(
            capacity=train.capacity,
            max_documents=train.max_documents,
            max_patches=train.max_patches,
            max_frames=train.max_frames,
            max_squares=train.max_squares,
            packing=train.packing,
            seed=self.config.seed,
            workers=train.workers,
            prefetch=train.prefetch,
            prefetch_bytes=train.prefetch_mb * 1_000_000,
            views=self.config.views.count,
        )

    @cached_property
    def measured(self) -> Measured:
        """What every training row takes, from headers and texts."""
        limits = self.config.data.limits
        try:
            return measure(
                self.data.records,
                self._counts,
                indices=self.data.splits.train,
                policy=self.policy,
                workers=self.config.train.workers,
                prepare=lambda sample: self.headers.read_ahead(sample, limits),
            )
        finally:
            self.headers.flush()

    def _counts(self, sample: Sample) -> RowCounts:
        return counts_of(self.render(sample))

    @property
    def screened(self) -> Measured:
        """The measured rows without those that no pack can hold."""
        return screen(self.measured, limits=self.loader_settings, policy=self.policy)

    def loader(self, ledger: Ledger | None = None) -> Loader:
        """The training rows; what times out is written down beside the ledger."""
        return Loader(
            self.data.records,
            self.data.splits.train,
            self.render,
            self.loading,
            self.loader_settings,
            self.policy,
            ledger,
            shares=self.data.shares,
            journal=Journal(ledger.path.with_name(TIMEOUTS)) if ledger else None,
            measured=self.measured,
            left_out=self.data.left_out,
            broken=self.held_out_broken,
        )

    def check_held_out(self, journal: Journal | None = None) -> Journal:
        """Read every held-out row once, so that none breaks in the middle of a run.

        Where broken rows are skipped they leave their split, with a note, and the ledger calls
        them broken. A row that the journal says timed out is not tried again: a run that goes on
        is measured on the rows that it was measured on.

        Returns:
            The journal, with rows that time out now.

        Raises:
            DataError, FailureBudgetError: as the policy says.
        """
        journal = Journal() if journal is None else journal
        splits = self.data.splits
        notes: dict[int, str] = {}
        for row in [*splits.validation, *splits.test]:
            try:
                self._read(row, journal)
            except DataError as error:
                if isinstance(error, DecodeTimeoutError):
                    journal.add(HELD_OUT, error.origin, error.message)
                self.policy.failure(error)
                notes[row] = f"a held-out row is left out: {error}"
                self.held_out_broken.append((error.origin, error.message))
            else:
                self.policy.success()
        self.data.splits = replace(
            splits,
            validation=[row for row in splits.validation if row not in notes],
            test=[row for row in splits.test if row not in notes],
            notes=(*splits.notes, *notes.values()),
        )
        return journal

    def require_rows(self) -> None:
        """
        Raises:
            DataError: there is no row to test on, or none to train on, or rows are preference
                pairs.
        """
        if not self.data.splits.test:
            raise DataError(
                "a run needs test rows and data.split.test is 0 for this dataset; hold some out"
            )
        rows = self.screened
        if not len(rows):
            refused = rows.refused
            reason = f"; the first: {refused[0].reason}" if refused else ""
            raise DataError(f"a run needs a usable training row and there is none{reason}")
        if self.measured.groups:
            raise DataError(
                f"a run's loss reads each document by itself; {len(self.measured.groups)} rows are "
                "pairs, of which it would learn the rejected answer like the chosen one: write the "
                "chosen ones as messages"
            )

    def _read(self, row: int, journal: Journal) -> None:
        sample = self.data.records[row]
        if (timeout := journal.error(HELD_OUT, sample.origin)) is not None:
            raise timeout
        try:
            for item in self.render(sample).items:
                self.loading(item)
        except DataError as error:
            raise placed(error, sample.origin) from error

    def batches_to_cache(self) -> list[list[Item]]:
        """What the run will read of frozen encoders and the caches lack, in batches to encode.

        Training rows in all their views, held-out rows as they are, each item once. A batch with
        one missing item is encoded whole: the last bits of features may depend on what is encoded
        beside them, and must not depend on where an earlier process was killed. Rows that cannot
        be read are left for the loader to meet.
        """
        splits, views = self.data.splits, range(self.config.views.count)
        found: dict[str, dict[str, Item]] = {name: {} for name in self.loading.caches}
        for row in splits.train:
            for item in self.items(row):
                for view in views:
                    self._note(found, replace(item, view=view))
        for row in [*splits.validation, *splits.test]:
            for item in self.items(row):
                self._note(found, item)
        return [
            [items[key] for key in keys]
            for name, items in found.items()
            for keys in batched(list(items), BATCH)
            if any(self.loading.caches[name].get(key) is None for key in keys)
        ]

    def keep_caches(self, names: Collection[str]) -> None:
        """Keep features of these encoders alone; the others are encoded each time."""
        for name in self.loading.caches.keys() - names:
            del self.loading.caches[name]

    def items(self, row: int) -> Sequence[Item]:
        """The media of a row; none of one that cannot be rendered."""
        try:
            return self.render(self.data.records[row]).items
        except DataError:
            return ()

    def _note(self, found: dict[str, dict[str, Item]], item: Item) -> None:
        if item.plan.encoder in found:
            with suppress(DataError):
                found[item.plan.encoder].setdefault(self.loading.key(item), item)

    def cache_features(self, batches: Sequence[Sequence[Item]], done: Callable[[int], None]
                       ) -> None:  # fmt: skip
        """Encode batches and keep their features; `done` is called with each batch's size."""
        executor = Executor(max(1, self.config.train.workers), ahead=2)
        with closing(executor.map(self.loading.decode, batches)) as decoded:
            for results in decoded:
                good = [(r.task, r.value) for r in results if r.value is not None]
                if good:
                    self.loading.keep(*zip(*good, strict=True))
                done(len(results))

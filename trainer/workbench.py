"""What training, planning, previewing and sampling all begin with: model, rows, loaders."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from plait.datasets.executor import Executor
from plait.datasets.fetch import home
from plait.datasets.ledger import Ledger
from plait.datasets.loader import Loader
from plait.datasets.planning import Measured, measure, placed, positions_by_medium, screen
from plait.datasets.policy import FailurePolicy
from plait.datasets.settings import LoaderSettings
from plait.encoders.feature_cache import FeatureCache
from plait.encoders.media_encoder import MediaEncoder
from plait.errors import DataError
from plait.stream import Document, Item, Sample, check_placeholders, render
from plait.trainer.build import Built
from plait.trainer.config import RunConfig
from plait.trainer.data import RunData
from plait.trainer.evaluation.reader import Reader
from plait.trainer.evaluation.suite import Suite
from plait.trainer.loading import BATCH, ItemLoader, cacheable


@dataclass
class Workbench:
    """A run's parts, made when they are first needed."""

    config: RunConfig
    built: Built
    data: RunData

    def render(self, sample: Sample, for_generation: bool = False) -> Document:
        """Render and check guarantee 1: placeholders equal promised features."""
        document = render(sample, self.built.tokenizer, self.built.layout, for_generation)
        check_placeholders(document, self.built.layout.placeholder_id)
        return document

    @cached_property
    def encoders(self) -> dict[str, MediaEncoder]:
        return {name: self.built.model.media_encoder(name) for name in self.built.model.encoders}

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
            if config.cache_features
        }
        return ItemLoader(self.encoders, self.config.views, self.config.data.limits, caches)

    @cached_property
    def reader(self) -> Reader:
        return Reader(self.render, self.loading, max(1, self.config.train.workers))

    @cached_property
    def suite(self) -> Suite:
        built = self.built
        return Suite(built.model, self.reader, built.tokenizer, built.layout, self.data.classes)

    @property
    def policy(self) -> FailurePolicy:
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
            seed=self.config.seed,
            workers=train.workers,
            prefetch=train.prefetch,
            views=self.config.views.count,
        )

    @cached_property
    def measured(self) -> Measured:
        """Positions of every training row, from headers and texts."""
        return measure(
            self.data.records,
            lambda sample: positions_by_medium(self.render(sample)),
            indices=self.data.splits.train,
            policy=self.policy,
            workers=0,
        )

    @property
    def screened(self) -> Measured:
        """The measured rows without those that no pack can hold."""
        train = self.config.train
        return screen(
            self.measured,
            capacity=train.capacity,
            max_documents=train.max_documents,
            policy=self.policy,
        )

    def loader(self, ledger: Ledger | None = None) -> Loader:
        return Loader(
            self.data.records,
            self.data.splits.train,
            self.render,
            self.loading,
            self.loader_settings,
            self.policy,
            ledger,
            measured=self.measured,
            left_out=self.data.left_out,
        )

    def check_held_out(self) -> None:
        """Read every held-out row once, so that none breaks in the middle of a run.

        Where broken rows are skipped they leave their split, with a note.

        Raises:
            DataError: a row is broken and none is skipped.
        """
        splits = self.data.splits
        notes: dict[int, str] = {}
        for row in [*splits.validation, *splits.test]:
            try:
                self._read(row)
            except DataError as error:
                if self.policy.on_error == "raise":
                    raise
                notes[row] = f"a held-out row is left out: {error}"
        self.data.splits = replace(
            splits,
            validation=[row for row in splits.validation if row not in notes],
            test=[row for row in splits.test if row not in notes],
            notes=(*splits.notes, *notes.values()),
        )

    def _read(self, row: int) -> None:
        sample = self.data.records[row]
        try:
            for item in self.render(sample).items:
                self.loading(item)
        except DataError as error:
            raise placed(error, sample.origin) from error

    def items_to_cache(self) -> list[Item]:
        """Items of frozen encoders that the run will read and no cache holds yet, each once.

        Training rows in all their views, held-out rows as they are. Rows that cannot be read are
        left for the loader to meet.
        """
        views = range(self.config.views.count)
        wanted: dict[str, Item] = {}
        splits = self.data.splits
        for row in splits.train:
            for item in self._items(row):
                for view in views:
                    self._want(wanted, replace(item, view=view))
        for row in [*splits.validation, *splits.test]:
            for item in self._items(row):
                self._want(wanted, item)
        return list(wanted.values())

    def _items(self, row: int) -> Sequence[Item]:
        try:
            return self.render(self.data.records[row]).items
        except DataError:
            return ()

    def _want(self, wanted: dict[str, Item], item: Item) -> None:
        cache = self.loading.caches.get(item.plan.encoder)
        if cache is None:
            return
        try:
            key = self.loading.key(item)
        except DataError:
            return
        if key not in wanted and cache.get(key) is None:
            wanted[key] = item

    def cache_features(self, items: Sequence[Item], done: Callable[[int], None]) -> None:
        """Encode `items` and keep their features; `done` is called with each batch's size."""
        executor = Executor(max(1, self.config.train.workers), ahead=2)
        for results in executor.map(self.loading.decode, _batches(items)):
            good = [(r.task, r.value) for r in results if r.value is not None]
            for name in dict.fromkeys(item.plan.encoder for item, _ in good):
                mine = [(item, value) for item, value in good if item.plan.encoder == name]
                self.loading.keep(*zip(*mine, strict=True))
            done(len(results))


def _batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]

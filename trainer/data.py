"""A run's rows: opened, split, and their classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from plait.datasets.apart import split_apart
from plait.datasets.blend import Joined, Share
from plait.datasets.fetch import dataset_folder
from plait.datasets.records import Records, open_records
from plait.datasets.splits import Splits
from plait.errors import ConfigError, DataError, Origin
from plait.stream import Sample
from plait.trainer.config import FETCHED, BlendEntry, DataConfig


@dataclass(slots=True)
class RunData:
    """Rows, numbered through all datasets, and their split.

    `classes` are the labels of training rows, sorted; `shares` are the datasets, in the order of
    their rows.
    """

    records: Sequence[Sample]
    splits: Splits
    classes: list[str]
    shares: list[Share]
    left_out: list[tuple[Origin, str]]
    """Files that never became rows, and why."""

    def samples(self, rows: list[int]) -> list[Sample]:
        return [self.records[row] for row in rows]

    @property
    def test(self) -> list[Sample]:
        return self.samples(self.splits.test)

    @property
    def validation(self) -> list[Sample]:
        return self.samples(self.splits.validation)

    def dataset_of(self, row: int) -> str:
        """The name of a row's dataset."""
        return next(share.name for share in self.shares if row in share.rows)


def open_data(config: DataConfig, progress: Callable[[int, int], None] | None = None) -> RunData:
    """Open and split the rows that `config` names.

    Each dataset is split by itself; then what shows nearly the same as a held-out row of another
    one is held out with it.

    Args:
        progress: Called with (done, all) while near-duplicates are looked for: each picture is
            hashed, then compared.

    Raises:
        FetchError: a dataset has not been fetched yet.
        DataError, ConfigError: one cannot be read, or two have one name.
    """
    entries = config.datasets
    opened = open_datasets(config)
    _check_names(opened)
    options = [entry.split or config.split for entry in entries]
    found = split_apart(opened, options, limits=config.limits, progress=progress)
    joined = Joined(opened)
    notes = [note for records in opened for note in records.notes()]
    splits = _joined_splits(found, joined.starts)
    splits = replace(splits, notes=(*splits.notes, *notes))
    labels = {label for label in (_label(joined, row) for row in splits.train) if label}
    shares = [
        Share(
            name=records.name,
            rows=range(start, start + len(records)),
            weight=entry.weight,
            epochs=entry.epochs,
        )
        for records, entry, start in zip(opened, entries, joined.starts, strict=False)
    ]
    left_out = [
        (Origin(records.name, None, item.file), item.reason)
        for records in opened
        for item in records.left_out
    ]
    rows = opened[0] if len(opened) == 1 else joined
    return RunData(rows, splits, sorted(labels), shares, left_out)


def locate(path: str) -> Path:
    return dataset_folder(path.removeprefix(FETCHED)) if path.startswith(FETCHED) else Path(path)


def open_datasets(config: DataConfig) -> list[Records]:
    """Every dataset that `config` names, in its order; nothing is split."""
    return [_open(entry) for entry in config.datasets]


def _open(entry: BlendEntry) -> Records:
    data = entry.data
    return open_records(
        locate(data.path or ""),
        name=data.name or "",
        dialect=data.dialect,
        media_dir=data.media_dir,
        captions=data.captions,
        remote=bool(data.remote),
    )


def _check_names(opened: Sequence[Records]) -> None:
    seen: dict[str, Path] = {}
    for records in opened:
        if records.name in seen:
            raise ConfigError(
                f"the datasets of a blend need names of their own; {seen[records.name]} and "
                f"{records.path} are both called {records.name!r}: give one a data.name"
            )
        seen[records.name] = records.path


def _joined_splits(found: Sequence[Splits], starts: Sequence[int]) -> Splits:
    """The splits of all datasets, their rows numbered through."""
    pairs = list(zip(found, starts, strict=False))
    return Splits(
        train=[row + start for one, start in pairs for row in one.train],
        validation=[row + start for one, start in pairs for row in one.validation],
        test=[row + start for one, start in pairs for row in one.test],
        moved=sum(one.moved for one in found),
        notes=tuple(note for one in found for note in one.notes),
    )


def _label(samples: Sequence[Sample], row: int) -> str:
    try:
        return samples[row].label
    except DataError:
        return ""  # a broken row is the loader's to report

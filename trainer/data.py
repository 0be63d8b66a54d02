"""A run's rows: opened, split, and their classes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from plait.datasets.fetch import dataset_folder
from plait.datasets.records import Records, open_records
from plait.datasets.splits import Splits, split
from plait.errors import DataError, Origin
from plait.stream import Sample
from plait.trainer.config import FETCHED, DataConfig


@dataclass(slots=True)
class RunData:
    """Rows and their split. `classes` are the labels of training rows, sorted."""

    records: Records
    splits: Splits
    classes: list[str]

    def samples(self, rows: list[int]) -> list[Sample]:
        return [self.records[row] for row in rows]

    @property
    def test(self) -> list[Sample]:
        return self.samples(self.splits.test)

    @property
    def validation(self) -> list[Sample]:
        return self.samples(self.splits.validation)

    @property
    def left_out(self) -> list[tuple[Origin, str]]:
        """Files that never became rows, and why."""
        name = self.records.name
        return [(Origin(name, None, item.file), item.reason) for item in self.records.left_out]


def open_data(config: DataConfig, progress: Callable[[int, int], None] | None = None) -> RunData:
    """Open and split the rows that `config` names.

    Args:
        progress: Called with (done, all) while near-duplicates are looked for: each picture is
            hashed, then compared.

    Raises:
        FetchError: the dataset has not been fetched yet.
        DataError, ConfigError: it cannot be read.
    """
    records = open_records(
        locate(config.path),
        dialect=config.dialect,
        media_dir=config.media_dir,
        captions=config.captions,
    )
    splits = split(records, config.split, limits=config.limits, progress=progress)
    splits = replace(splits, notes=(*splits.notes, *records.notes()))
    labels = {label for label in (_label(records, row) for row in splits.train) if label}
    return RunData(records, splits, sorted(labels))


def locate(path: str) -> Path:
    return dataset_folder(path.removeprefix(FETCHED)) if path.startswith(FETCHED) else Path(path)


def _label(records: Records, row: int) -> str:
    try:
        return records[row].label
    except DataError:
        return ""  # a broken row is the loader's to report

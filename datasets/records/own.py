"""Samples from a reader of one's own."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from plait.datasets.records.base import Records
from plait.errors import DataError, Origin
from plait.stream import Sample


class OwnRecords(Records):
    """What a user's function gave: a sequence is asked row by row, anything else is listed once.

    A sample without an id or an origin gets its number and the dataset's path.
    """

    dialect = "own"

    def __init__(self, path: Path, samples: Iterable[Sample], *, name: str) -> None:
        super().__init__(path, name=name)
        self._samples = samples if isinstance(samples, Sequence) else list(samples)
        self.refuse_empty("see what the reader gives")

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, row: int) -> Sample:
        origin = Origin(self.name, row, str(self.path))
        try:
            found = self._samples[row]
        except DataError as error:
            raise error.at(origin) from None
        if not isinstance(found, Sample):
            raise DataError(
                f"a reader must give plait.Sample objects; it gave {type(found).__name__}", origin
            )
        # The row's number names it in the ledger, so it is ours even where the reader says a file.
        origin = Origin(self.name, row, found.origin.file or origin.file)
        return replace(found, id=found.id or f"{self.path.name}#{row}", origin=origin)

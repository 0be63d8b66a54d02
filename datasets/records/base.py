"""What every reader is: an immutable, lazy sequence of samples."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from plait.errors import DataError, Origin
from plait.stream import Sample


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file that is not a row of the dataset, and why; the ledger accounts for it."""

    file: str
    reason: str


class Records(Sequence[Sample], ABC):
    """Rows by number, from 0, the same numbers every time.

    `len()` reads no row. A row that cannot be used raises `DataError`, with its place, each time
    it is asked for. Reading is safe from several threads, and the object can be pickled.
    """

    dialect: str
    """How rows are read, by name; "mixed" where each row says it for itself."""

    def __init__(self, path: Path, *, name: str) -> None:
        self.path, self.name = path, name
        self.left_out: tuple[LeftOut, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample(self, row: int) -> Sample:
        """Row `row`, 0 <= row < len(self)."""

    @overload
    def __getitem__(self, row: int) -> Sample: ...
    @overload
    def __getitem__(self, row: slice) -> list[Sample]: ...
    def __getitem__(self, row: int | slice) -> Sample | list[Sample]:
        if isinstance(row, slice):
            return [self.sample(number) for number in range(*row.indices(len(self)))]
        number = row + len(self) if row < 0 else row
        if not 0 <= number < len(self):
            raise IndexError(f"row {row} of dataset {self.name}, which has {len(self)} rows")
        return self.sample(number)

    def notes(self) -> list[str]:
        """Sentences for the user about what is not used of the rows; may read all of them."""
        return []

    def __repr__(self) -> str:
        return f"<{len(self)} {self.dialect} records of {self.name!r}>"

    def refuse_empty(self, remedy: str) -> None:
        if not len(self):
            raise DataError(
                f"a dataset must have rows; this one has none; {remedy}",
                Origin(self.name, None, str(self.path)),
            )

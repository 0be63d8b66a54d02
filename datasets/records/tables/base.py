"""What every table file is: rows as plain objects, by number, read when they are asked for."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

from plait.datasets.records.base import LeftOut
from plait.datasets.records.media import MediaFinder
from plait.errors import DataError, Origin

MAX_ROW_BYTES = 16_000_000
"""Bytes of one row at most: a longer line is a broken file, or media that belong beside it."""

Row = dict[str, Any]

BARE = "[]"
"""The one key of a row that is written as a bare JSON list."""


class Table(ABC):
    """Rows by number, from 0, the same every time; safe from several threads, and picklable.

    Args:
        max_row_bytes: A longer row raises when it is asked for, and is not read.

    Raises:
        DataError: the file cannot be read, or is no such table.
    """

    kind: ClassVar[str]
    endings: ClassVar[tuple[str, ...]]
    """What its files' names end in, in lower case."""

    columns: tuple[str, ...] | None = None
    """The keys that every row has, where the file says so; None where each row has its own."""

    left_out: tuple[LeftOut, ...] = ()
    """What lies in the file and is no row."""

    def __init__(self, file: Path, max_row_bytes: int = MAX_ROW_BYTES) -> None:
        self.file, self.max_row_bytes = file, max_row_bytes

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, number: int) -> Row:
        """Row `number`, 0 <= number < len(self).

        Raises:
            DataError: it cannot be read or parsed, or is too long. The place is not said.
        """

    def name(self, number: int) -> str:
        """What a row is called that has no id of its own."""
        return f"{self.file.name}#{number}"

    def place(self, number: int) -> str:
        """Where a row lies, for messages."""
        del number
        return str(self.file)

    def finder(self, number: int, given: MediaFinder) -> MediaFinder:
        """What finds the media of a row; the one that is given where they lie outside."""
        del number
        return given

    def unread(self, number: int) -> list[str]:
        """What lies beside a row and is not read."""
        del number
        return []

    def check_size(self, size: int) -> None:
        if size > self.max_row_bytes:
            raise DataError(
                f"a row must have at most {self.max_row_bytes:,} bytes; this one has {size:,}; "
                "keep its media in files of their own, mend the file, or raise max_row_bytes"
            )


class IndexedTable(Table):
    """A table whose rows are stretches of the file's bytes; 16 bytes a row are held."""

    what: ClassVar[str]
    """What messages call the file, with its article."""

    def __init__(self, file: Path, max_row_bytes: int = MAX_ROW_BYTES) -> None:
        super().__init__(file, max_row_bytes)
        try:
            with file.open("rb") as content:
                self._state = _state(content)
                self._bounds = self.index(content)
        except OSError as error:
            raise DataError(
                f"{self.what} must be readable; {error.strerror}; mend the path",
                Origin(file=str(file)),
            ) from error

    @abstractmethod
    def index(self, content: BinaryIO) -> NDArray[np.int64]:
        """(rows, 2): the first and one past the last byte of each row."""

    @abstractmethod
    def parse(self, content: bytes) -> Row:
        """The row that these bytes are."""

    def __len__(self) -> int:
        return len(self._bounds)

    def row(self, number: int) -> Row:
        return self.parse(self.read(number))

    def read(self, number: int) -> bytes:
        """The bytes of a row."""
        start, stop = (int(bound) for bound in self._bounds[number])
        self.check_size(stop - start)
        try:
            with self.file.open("rb") as content:
                if _state(content) != self._state:
                    raise DataError(
                        "a dataset must not change while it is read; this file did; open it again"
                    )
                content.seek(start)
                return content.read(stop - start)
        except OSError as error:
            raise DataError(
                f"{self.what} must stay readable; {error.strerror}; open it again"
            ) from error


def _state(content: BinaryIO) -> tuple[int, int]:
    facts = os.fstat(content.fileno())
    return facts.st_size, facts.st_mtime_ns

"""CSV: a header, then a row a record; a quoted cell may run over lines.

Cells are parted by commas, or by the semicolons or tabs that spreadsheets write in many countries:
the header's line says which.
"""

import csv
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

from plait.datasets.records.tables.base import MAX_ROW_BYTES, IndexedTable, Row
from plait.errors import DataError, Origin

_NAMES = {",": "comma", ";": "semicolon", "\t": "tab"}


class CsvTable(IndexedTable):
    """One row a record after the header, whose columns are named without regard to capitals.

    A space in a name is read as "_", so that a spreadsheet's "File name" is `file_name`. Opening
    reads the file once, to find where records end, and keeps none of it.
    """

    kind: ClassVar[str] = "csv"
    what: ClassVar[str] = "a CSV"
    endings: ClassVar[tuple[str, ...]] = (".csv", ".tsv")

    def __init__(self, file: Path, max_row_bytes: int = MAX_ROW_BYTES) -> None:
        self._header: list[str] = []
        self._delimiter = ","
        super().__init__(file, max_row_bytes)
        self.columns = tuple(self._header)

    def index(self, content: BinaryIO) -> NDArray[np.int64]:
        bounds, lines = array("q"), _Lines(content, self.max_row_bytes)
        start = 0
        try:
            self._delimiter = _delimiter(content, self.max_row_bytes)
            for cells in csv.reader(lines, strict=True, delimiter=self._delimiter):
                if cells and not self._header:
                    self._header = ["_".join(cell.lower().split()) for cell in cells]
                elif cells:
                    bounds.extend((start, lines.position))
                start = lines.position
        except (csv.Error, DataError) as error:
            raise _refused(error).at(Origin(file=str(self.file))) from error
        doubled = {name for name in self._header if self._header.count(name) > 1}
        if doubled:
            raise DataError(
                f"a CSV's columns must have names of their own; {doubled.pop()!r} comes twice; "
                "rename one",
                Origin(file=str(self.file)),
            )
        return np.frombuffer(bounds, np.int64).reshape(-1, 2).copy()

    def parse(self, content: bytes) -> Row:
        try:
            lines = _decoded(content).splitlines(keepends=True)
            (cells,) = csv.reader(lines, strict=True, delimiter=self._delimiter)
        except csv.Error as error:
            raise _refused(error) from error
        if len(cells) != len(self._header):
            raise DataError(
                f"a CSV row must have {len(self._header)} cells, as the header has; this one has "
                f"{len(cells)}; quote a text that contains a {_NAMES[self._delimiter]}"
            )
        return dict(zip(self._header, cells, strict=True))


def _delimiter(content: BinaryIO, most: int) -> str:
    """What parts the header's cells: of those that may, the one that stands there most often."""
    line = next(filter(str.strip, _Lines(content, most)), "")
    content.seek(0)
    bare = re.sub(r'"[^"]*"', "", line)
    return max(_NAMES, key=bare.count)


class _Lines(Iterator[str]):
    """The file's lines, and how many bytes of it have been given."""

    def __init__(self, content: BinaryIO, most: int) -> None:
        self.position, self._content, self._most = 0, content, most

    def __next__(self) -> str:
        line = self._content.readline(self._most + 1)
        if not line:
            raise StopIteration
        if len(line) > self._most:
            raise DataError(
                f"a row must have at most {self._most:,} bytes; a line of this CSV has more; mend "
                "the file, or raise max_row_bytes"
            )
        self.position += len(line)
        return _decoded(line)


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("a CSV must be UTF-8; this one is not; save it as UTF-8") from error


def _refused(error: csv.Error | DataError) -> DataError:
    if isinstance(error, DataError):
        return error
    return DataError(f"a CSV must be well formed; {error}; mend the quotes around that cell")

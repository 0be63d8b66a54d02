"""A CSV with a row a picture: `file`, `text`, and perhaps `class`."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from plait.datasets.records.base import Records, refuse_unknown
from plait.datasets.records.captions import CaptionOptions, first_folder
from plait.errors import DataError, Origin
from plait.modalities import Image
from plait.stream import Sample

COLUMNS = {
    "picture": ("file", "image", "filename"),
    "text": ("text", "caption"),
    "class": ("class", "label"),
}
"""What each column may be called; capitals and spaces around do not matter."""


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where each column is; `label` is None where the table has no class."""

    count: int
    picture: int
    text: int
    label: int | None


class CsvRecords(Records):
    """One row a line after the header, in the file's order.

    Without a class column the class is the first folder of a relative path. The table is held in
    memory: a quoted text may run over lines, so rows cannot be found without reading them.
    """

    dialect: ClassVar[str] = "csv"
    suffix: ClassVar[str] = ".csv"
    options: ClassVar[frozenset[str]] = frozenset({"captions", "media_dir"})

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        captions: CaptionOptions | None = None,
        media_dir: str | Path | None = None,
    ) -> None:
        super().__init__(path, name=name)
        self.captions = captions or CaptionOptions()
        self.file = self.table()
        self.media_dir = Path(media_dir) if media_dir is not None else self.file.parent
        try:
            header, *self._rows = _read(self.file) or [[]]
            self._columns = _columns(header)
        except DataError as error:
            raise error.at(Origin(name, None, str(self.file))) from None
        self.refuse_empty("add a row for each picture under the header")

    def __len__(self) -> int:
        return len(self._rows)

    def notes(self) -> list[str]:
        whole = (cells for cells in self._rows if len(cells) == self._columns.count)
        return self.captions.notes(cells[self._columns.text] for cells in whole)

    def sample(self, row: int) -> Sample:
        cells, columns = self._rows[row], self._columns
        here = Origin(self.name, row, str(self.file))
        if len(cells) != columns.count:
            raise DataError(
                f"a CSV row must have {columns.count} cells, as the header has; this one has "
                f"{len(cells)}; quote a text that contains a comma",
                here,
            )
        relative = cells[columns.picture].strip().replace("\\", "/")
        if not relative or "\0" in relative:
            raise DataError("a CSV row must name its picture; the cell is empty; fill it", here)
        label = first_folder(relative) if columns.label is None else cells[columns.label].strip()
        picture = self.media_dir / relative
        origin = Origin(self.name, row, str(picture))
        return self.captions.sample(Image(picture), cells[columns.text], label, relative, origin)


def _read(file: Path) -> list[list[str]]:
    """Every row that is not blank, the header first."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return [cells for cells in csv.reader(lines, strict=True) if cells]
    except UnicodeDecodeError as error:
        raise DataError("a CSV must be UTF-8; this one is not; save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(
            f"a CSV must be well formed; {error}; mend the quotes around that cell"
        ) from error
    except OSError as error:
        raise DataError(f"a CSV must be readable; {error.strerror}; mend the path") from error


def _columns(header: list[str]) -> _Columns:
    """Find the columns by name.

    Raises:
        DataError: a column is missing, doubled or unknown.
    """
    names = [cell.strip().lower() for cell in header]
    known = [name for group in COLUMNS.values() for name in group]
    found = {
        role: [place for place, name in enumerate(names) if name in group]
        for role, group in COLUMNS.items()
    }
    for role, places in found.items():
        if len(places) > 1 or (not places and role != "class"):
            said = [names[place] for place in places] or names
            raise DataError(
                f"a CSV header must have one {role} column, named {' or '.join(COLUMNS[role])}; "
                f"this one has {', '.join(said) or 'nothing'}; rename its columns"
            )
    refuse_unknown("CSV column", names, known)
    label = found["class"][0] if found["class"] else None
    return _Columns(len(names), found["picture"][0], found["text"][0], label)

"""What every dialect's reader is: an immutable, lazy sequence of samples."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, overload

from plait.errors import ConfigError, DataError, Origin, UnknownNameError
from plait.modalities import Image, Part, Text
from plait.stream import Sample

PICTURE_MARK = "<image>"
"""Where a picture stands inside a text."""


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

    dialect: ClassVar[str]
    suffix: ClassVar[str] = ""
    """The ending of this dialect's table file; empty where it has none."""

    options: ClassVar[frozenset[str]]
    """The options of `open_records` that this dialect takes."""

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

    @classmethod
    def tables(cls, folder: Path) -> list[Path]:
        """The table files of this dialect directly in `folder`."""
        if not cls.suffix:
            return []
        found = (p for p in folder.iterdir() if p.suffix.lower() == cls.suffix and p.is_file())
        return sorted(p for p in found if not p.name.startswith("."))

    def table(self) -> Path:
        """The path itself, or the one table in the folder it names."""
        if not self.path.is_dir():
            return self.path
        found = self.tables(self.path)
        if len(found) == 1:
            return found[0]
        names = ", ".join(p.name for p in found)
        if found:
            raise ConfigError(f"{self.path} holds several tables ({names}); give the path of one")
        raise DataError(
            f"dialect {self.dialect!r} needs a {self.suffix} file; this folder holds none; add "
            "one or name another dialect",
            Origin(self.name, None, str(self.path)),
        )

    def refuse_empty(self, remedy: str) -> None:
        if not len(self):
            raise DataError(
                f"a dataset must have rows; this one has none; {remedy}",
                Origin(self.name, None, str(self.path)),
            )


def refuse_unknown(kind: str, keys: Sequence[str], known: Sequence[str]) -> None:
    """Raise `DataError` for the first key that is not known, offering the nearest one."""
    for key in keys:
        if key not in known:
            raise DataError(str(UnknownNameError(kind, key, known)))


def interleave(text: str, pictures: Sequence[Image]) -> tuple[Part, ...]:
    """The text with its `<image>` marks replaced, in order; text is otherwise kept as it is.

    There must be as many pictures as marks: the caller has counted.
    """
    parts: list[Part] = []
    for number, piece in enumerate(text.split(PICTURE_MARK)):
        if number:
            parts.append(pictures[number - 1])
        if piece:
            parts.append(Text(piece))
    return tuple(parts)


def type_name(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else "a number")

"""A file and its caption a row: {"file": "frog.png", "text": "A frog.", "class": "animals"}."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from plait.datasets.records.captions import CaptionOptions, first_folder
from plait.datasets.records.dialects.base import Dialect, Draft
from plait.datasets.records.media import MediaFinder, medium_of
from plait.datasets.records.values import text_of
from plait.errors import DataError

COLUMNS: dict[str, tuple[str, ...]] = {
    "file": ("file", "filename", "file_name", "image", "audio", "video"),
    "text": ("text", "caption"),
    "class": ("class", "label"),
}
"""What each column may be called."""


@dataclass(frozen=True)
class Captions(Dialect):
    """One picture, sound or film a row: which, its ending says, or else the column's name.

    Without a class the first folder of a relative path is it.
    """

    options: CaptionOptions = field(default_factory=CaptionOptions)

    name: ClassVar[str] = "captions"
    keys: ClassVar[tuple[str, ...]] = (*(n for group in COLUMNS.values() for n in group), "id")

    def fits(self, keys: frozenset[str]) -> bool:
        return all(keys & set(COLUMNS[role]) for role in ("file", "text"))

    def draft(
        self,
        row: Mapping[str, Any],
        side: str,  # noqa: ARG002  (a row is one document)
        finder: MediaFinder,
    ) -> Draft:
        column, label = _column(row, "file"), _column(row, "class", needed=False)
        held = row[column]
        if isinstance(held, str):
            held = held.strip().replace("\\", "/") if "://" not in held else held.strip()
        if not held:
            raise DataError(f"a row must name its file; {column} is empty; fill it")
        name = held if isinstance(held, str) else ""
        if isinstance(held, Mapping):
            name = str(held.get("path") or "")
        short = name if len(name) < 1024 and not name.startswith("data:") else ""
        medium = medium_of(short) or (column if column in ("image", "audio", "video") else None)
        if medium is None:
            raise DataError(
                f"a file's ending must say whether it is a picture, a sound or a film; that of "
                f"{name[:80]!r} does not; rename it, or call the column image, audio or video"
            )
        cell = text_of(row, label).strip() if label else first_folder(short)
        part = finder.part(medium, held)
        text = text_of(row, _column(row, "text"))
        own = text_of(row, "id") or (short if isinstance(held, str) else "")
        return Draft(self.options.messages(part, text, cell), id=own, label=cell)


def check_columns(columns: tuple[str, ...]) -> None:
    """Refuse a table without one column for the file and one for the text.

    Raises:
        DataError: one is missing or doubled.
    """
    row = dict.fromkeys(columns, "")
    for role in COLUMNS:
        _column(row, role, needed=role != "class")


def _column(row: Mapping[str, Any], role: str, *, needed: bool = True) -> str:
    found = [name for name in COLUMNS[role] if row.get(name) is not None]
    if len(found) > 1 or (needed and not found):
        has = ", ".join(found) or ", ".join(row)
        raise DataError(
            f"captions must have one {role} column, named {' or '.join(COLUMNS[role])}; there is "
            f"{has[:200] or 'nothing'}; rename its columns"
        )
    return found[0] if found else ""

"""The rows of a table as samples: a table gives the keys, a dialect their meaning."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from plait.datasets.records.base import Records
from plait.datasets.records.captions import CaptionOptions
from plait.datasets.records.dialects import (
    Dialect,
    Draft,
    check_keys,
    dialect_of,
    keys_of,
)
from plait.datasets.records.dialects.captions import Captions, check_columns
from plait.datasets.records.media import MediaFinder
from plait.datasets.records.tables import Row, Table
from plait.datasets.records.values import text_of
from plait.errors import ConfigError, DataError, Origin
from plait.stream import Sample

MIXED = "mixed"
"""The dialect of rows of several; each row says its own."""

_RECOGNISED_FROM = 64  # rows that are looked at to name the dialect
_NOTED_FROM = 10_000  # rows that are looked at for notes


@dataclass(frozen=True, slots=True)
class Place:
    """A row's number in its table, what it is called without an id of its own, and where it is."""

    number: int
    name: str
    origin: Origin


@dataclass(frozen=True)
class Reading:
    """How rows of objects become samples.

    Args:
        forced: The only dialect that rows may be of; None lets each row say its own.
    """

    finder: MediaFinder
    forced: Dialect | None = None
    captions: CaptionOptions | None = None

    def dialect(self, row: Row) -> Dialect:
        """The dialect of a row.

        Raises:
            DataError: it has none, or another than the one that is forced.
        """
        if self.forced is None:
            found = dialect_of(row)
        elif self.forced.fits(keys_of(row)):
            found = self.forced
        else:
            raise DataError(
                f"rows must be of the dialect {self.forced.name!r}, which was asked for; this one "
                f"has {', '.join(sorted(keys_of(row)))[:200] or 'no keys'}; mend it, or name no "
                "dialect"
            )
        return Captions(self.captions) if self.captions and found.name == "captions" else found

    def sample(
        self, row: Row, side: str, sides: tuple[str, ...], finder: MediaFinder, place: Place
    ) -> Sample:
        """One document of a row: `side` of `sides`, which are those of the rows before it.

        Raises:
            DataError: the row cannot be used.
        """
        try:
            draft = self._draft(row, side, sides, finder)
        except DataError as error:
            raise error.at(place.origin) from None
        own = draft.id or place.name
        return Sample(
            messages=draft.messages,
            parts=draft.parts,
            id=f"{own}-{side}" if side else own,
            label=draft.label,
            origin=place.origin,
            group=place.number if side else None,
        )

    def _draft(self, row: Row, side: str, sides: tuple[str, ...], finder: MediaFinder) -> Draft:
        """One document of a row, its id and label read too."""
        dialect = self.dialect(row)
        if dialect.sides != sides:
            raise DataError(
                f"rows of the dialect {dialect.name!r} make {len(dialect.sides)} documents, those "
                f"before it {len(sides)}; keep them in a file of their own"
            )
        check_keys(keys_of(row), dialect)
        draft = dialect.draft(row, side, finder)
        label = row.get("label")
        if isinstance(label, bool):  # whether an answer is wanted, as KTO's rows say it
            row = {**row, "label": str(label).lower()}
        return Draft(
            draft.messages,
            draft.parts,
            draft.side,
            draft.id or text_of(row, "id"),
            draft.label or (text_of(row, "label") if "label" in dialect.keys else ""),
        )


class TableRecords(Records):
    """The samples of a table, in its order; a preference row is two, one after the other.

    The two documents of a row have its number as `group`, and numbers of their own as rows.
    """

    def __init__(self, path: Path, table: Table, reading: Reading, *, name: str) -> None:
        super().__init__(path, name=name)
        self.table, self.reading = table, reading
        self.left_out = table.left_out
        here = Origin(name, None, str(table.file))
        found = [dialect for dialect in map(self._named, range(self._looked_at)) if dialect]
        names = sorted({dialect.name for dialect in found})
        self._recognised = tuple(names)
        self.dialect = names[0] if len(names) == 1 else MIXED
        self.sides = found[0].sides if found else ("",)
        try:
            self._check_columns(found)
        except DataError as error:
            raise error.at(here) from None
        if reading.captions is not None and "captions" not in names:
            raise ConfigError(
                f"rows of the dialect {self.dialect!r} take no 'captions'; leave it out"
            )
        self.refuse_empty("add a row")

    @property
    def _looked_at(self) -> int:
        return min(len(self.table), _RECOGNISED_FROM)

    def _named(self, number: int) -> Dialect | None:
        try:
            return self.reading.dialect(self.table.row(number))
        except DataError:
            return None  # a broken row is told of when it is read

    def _check_columns(self, found: list[Dialect]) -> None:
        """Refuse a table whose header already says that no row can be read."""
        columns = self.table.columns
        if columns is None:
            return
        named = frozenset(columns)
        if not found:
            if self.reading.forced is None and not len(self.table):
                dialect_of(dict.fromkeys(columns, ""))
            check_columns(columns)
        for dialect in found[:1]:
            check_keys(named, dialect)
            if dialect.name == "captions":
                check_columns(columns)

    def __len__(self) -> int:
        return len(self.table) * len(self.sides)

    def sample(self, row: int) -> Sample:
        number, which = divmod(row, len(self.sides))
        side, file = self.sides[which], self.table.place(number)
        origin = Origin(self.name, row, f"{file}, its row {number}, {side}" if side else file)
        try:
            found = self.table.row(number)
        except DataError as error:
            raise error.at(origin) from None
        finder = self.table.finder(number, self.reading.finder)
        place = Place(number, self.table.name(number), origin)
        return self.reading.sample(found, side, self.sides, finder, place)

    def rows(self) -> Iterator[Row | None]:
        """Each row of the table as it is; None where it cannot be read."""
        for number in range(len(self.table)):
            row = None
            with suppress(DataError):
                row = self.table.row(number)
            yield row

    def unread(self, most: int | None = None) -> Counter[str]:
        """Of how many of the first `most` rows (or all) each key is not read."""
        found: Counter[str] = Counter()
        for number, row in enumerate(islice(self.rows(), most)):
            found.update(self.table.unread(number))
            if row is not None:
                with suppress(DataError):
                    dialect = self.reading.dialect(row)
                    found.update(check_keys(keys_of(row), dialect))
        return found

    def notes(self) -> list[str]:
        said = [f"{self.name}: {len(self.table)} rows of {self.table.kind}, {self._said_dialect()}"]
        unread = self.unread(_NOTED_FROM)
        if unread:
            part = len(self.table) > _NOTED_FROM
            where = f" of the first {_NOTED_FROM} rows" if part else ""
            keys = ", ".join(f"{key} ({count})" for key, count in sorted(unread.items()))
            said.append(f"{self.name}: not read{where}, with how many rows have it: {keys}")
        if len(self.sides) > 1:
            said.append(
                f"{self.name}: each row is two documents of one group; a loss that does not read "
                "groups learns the rejected answer like the chosen one"
            )
        options = self.reading.captions
        if options is not None:
            said += options.notes(self._texts())
        return said

    def _said_dialect(self) -> str:
        if self.reading.forced is not None:
            return f"dialect {self.dialect}, as asked for"
        if self.dialect == MIXED and self._recognised:
            return f"each in its own dialect ({', '.join(self._recognised)})"
        return f"recognised as dialect {self.dialect}"

    def _texts(self) -> Iterator[str]:
        for row in islice(self.rows(), _NOTED_FROM):
            texts = [row.get(key) for key in ("text", "caption")] if row else []
            yield from (text for text in texts if isinstance(text, str))

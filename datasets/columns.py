"""What planning knows of the rows, in columns: a million rows take some 150 MB.

A row as an object (`MeasuredRow`) is made when somebody asks for it.
"""

from array import array
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from plait.datasets.ledger import Status
from plait.errors import Origin, printable

IntColumn = NDArray[np.int64]
TextColumn = NDArray[Any]
"""Of numpy's variable-width strings: 16 bytes a row, and the text where it is longer."""

NONE = -1
"""Where a row has no group, or its origin no number."""

BUDGETED = ("patches", "frames")
"""What a row takes of a pack's budgets, beside positions and documents."""

_CHUNK = 8192
_FIXED = ("row", "origin_row", "dataset", "group", *BUDGETED, "media_end", "learned", "cut")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts:
    """What a row takes, from headers and texts alone.

    Args:
        positions: By medium ({"text": 12, "image": 9}).
        patches: Positions that pictures fill.
        frames: Frames that are read of films.
        media_end: Positions up to the end of the last media item; these are never cut off.
        learned: Positions up to and with the first that carries loss.
    """

    positions: Mapping[str, int]
    patches: int = 0
    frames: int = 0
    media_end: int = 0
    learned: int = 1


@dataclass(frozen=True, slots=True)
class MeasuredRow:
    """A row that can be packed. `group` is (dataset, group), or None; `id` is the sample's.

    `cut` positions are cut off its end, which `counts` no longer has.
    """

    row: int
    origin: Origin
    counts: RowCounts
    group: Hashable | None = None
    id: str = ""
    cut: int = 0

    @property
    def positions(self) -> Mapping[str, int]:
        """Positions by medium."""
        return self.counts.positions

    @property
    def length(self) -> int:
        return sum(self.counts.positions.values())


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row that is in no plan, and why."""

    row: int
    origin: Origin
    status: Status
    reason: str
    group: Hashable | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Rows that can be used, in columns, and rows that cannot; both in the order of their numbers.

    `columns` are "row", its number in the samples; "origin_row"; "dataset" and "group", places in
    `datasets` and `groups`; and the numbers of `RowCounts`. `positions` are columns by medium.
    """

    columns: Mapping[str, IntColumn]
    positions: Mapping[str, IntColumn]
    files: TextColumn
    ids: TextColumn
    datasets: tuple[str, ...] = ()
    groups: tuple[Hashable, ...] = ()
    refused: tuple[RefusedRow, ...] = ()

    @classmethod
    def of(cls, rows: Iterable[MeasuredRow], refused: Iterable[RefusedRow] = ()) -> "Measured":
        """From row objects, in the order of their numbers."""
        builder = MeasuredBuilder()
        for row in rows:
            builder.add(row)
        return builder.done(refused)

    def __len__(self) -> int:
        return len(self.columns["row"])

    @property
    def lengths(self) -> IntColumn:
        """Positions of each usable row, without what is cut off."""
        total = np.zeros(len(self), dtype=np.int64)
        for column in self.positions.values():
            total += column
        return total

    @property
    def rows(self) -> "Rows":
        """The usable rows as objects, each made when it is asked for."""
        return Rows(self)

    def taken(self, keep: NDArray[Any], refused: Iterable[RefusedRow]) -> "Measured":
        """The rows that `keep` (a mask, or places) names, with other refused ones."""
        return Measured(
            {name: column[keep] for name, column in self.columns.items()},
            {medium: column[keep] for medium, column in self.positions.items()},
            self.files[keep],
            self.ids[keep],
            self.datasets,
            self.groups,
            tuple(refused),
        )


class Rows(Sequence[MeasuredRow]):
    """A view of `Measured` as row objects."""

    def __init__(self, measured: Measured) -> None:
        self._measured = measured

    def __len__(self) -> int:
        return len(self._measured)

    @overload
    def __getitem__(self, place: int) -> MeasuredRow: ...
    @overload
    def __getitem__(self, place: slice) -> list[MeasuredRow]: ...
    def __getitem__(self, place: int | slice) -> MeasuredRow | list[MeasuredRow]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        found = self._measured
        facts = {name: int(column[place]) for name, column in found.columns.items()}
        positions = {medium: int(column[place]) for medium, column in found.positions.items()}
        return MeasuredRow(
            facts["row"],
            self.origin(place),
            RowCounts(
                positions={medium: count for medium, count in positions.items() if count},
                **{name: facts[name] for name in (*BUDGETED, "media_end", "learned")},
            ),
            None if facts["group"] == NONE else found.groups[facts["group"]],
            str(found.ids[place]),
            facts["cut"],
        )

    def origin(self, place: int) -> Origin:
        """The place of a row alone."""
        found = self._measured
        row = int(found.columns["origin_row"][place])
        dataset = found.datasets[int(found.columns["dataset"][place])]
        return Origin(dataset, None if row == NONE else row, str(found.files[place]))


@dataclass(slots=True)
class _Names:
    """Numbers for names, in order of appearance."""

    numbers: dict[Hashable, int] = field(default_factory=dict)

    def __call__(self, name: Hashable) -> int:
        return self.numbers.setdefault(name, len(self.numbers))


class _Texts:
    """Texts in columns of `_CHUNK`, so that never all of them are Python objects at once."""

    def __init__(self) -> None:
        self._done: list[TextColumn] = []
        self._some: list[str] = []

    def add(self, text: str) -> None:
        self._some.append(text)
        if len(self._some) == _CHUNK:
            self._done.append(text_column(self._some))
            self._some = []

    def column(self) -> TextColumn:
        return np.concatenate([*self._done, text_column(self._some)])


def text_column(texts: Sequence[str]) -> TextColumn:
    """Texts as numpy's variable-width strings."""
    return np.array(texts, dtype=np.dtypes.StringDType())


class MeasuredBuilder:
    """Collects rows, in the order of their numbers, into columns."""

    def __init__(self) -> None:
        self._fixed = array("q")
        self._rows = 0
        self._positions: dict[str, array[int]] = {}
        self._files, self._ids = _Texts(), _Texts()
        self._datasets, self._groups = _Names(), _Names()

    def add(self, row: MeasuredRow) -> None:
        """The next usable row."""
        origin, counts = row.origin, row.counts
        # One tuple a row, in the order of `_FIXED`: this is done a million times.
        self._fixed.extend((
            row.row,
            NONE if origin.row is None else origin.row,
            self._datasets(origin.dataset),
            NONE if row.group is None else self._groups(row.group),
            counts.patches,
            counts.frames,
            counts.media_end,
            counts.learned,
            row.cut,
        ))  # fmt: skip
        for medium in counts.positions:
            if medium not in self._positions:
                self._positions[medium] = array("q", bytes(8 * self._rows))
        for medium, column in self._positions.items():
            column.append(counts.positions.get(medium, 0))
        self._rows += 1
        self._files.add(origin.file)
        self._ids.add(printable(row.id))

    def done(self, refused: Iterable[RefusedRow] = ()) -> Measured:
        """All rows that were added."""
        fixed = np.frombuffer(self._fixed, dtype=np.int64).reshape(-1, len(_FIXED))
        return Measured(
            {name: fixed[:, place].copy() for place, name in enumerate(_FIXED)},
            {name: np.array(column, dtype=np.int64) for name, column in self._positions.items()},
            self._files.column(),
            self._ids.column(),
            tuple(str(name) for name in self._datasets.numbers),
            tuple(self._groups.numbers),
            tuple(refused),
        )

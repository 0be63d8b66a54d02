"""The rows that no pack holds (refused, held out, never a sample) and why, for the ledger."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from plait.datasets.assembly import RowOutcome
from plait.datasets.blend import Share
from plait.datasets.columns import NONE, Measured
from plait.datasets.ledger import RowName, row_name
from plait.datasets.planning import origin_of, unread
from plait.errors import ConfigError, DataError, Origin
from plait.stream import Sample

_ROW_BITS = 40


@dataclass(frozen=True, slots=True)
class _Absent:
    """A row that is in no pack, with its number where it has one."""

    outcome: RowOutcome
    row: int | None = None


class Absences:
    """By share of the blend: the ledger has them once in each epoch of their dataset."""

    def __init__(
        self, samples: Sequence[Sample], measured: Measured, shares: Sequence[Share]
    ) -> None:
        self._samples, self._measured, self._shares = samples, measured, shares
        self._by_share: list[list[RowOutcome]] = [[] for _ in shares] or [[]]
        self._sort(
            _Absent(RowOutcome(r.origin, r.status, r.reason), r.row) for r in measured.refused
        )

    def of(self, share: int) -> list[RowOutcome]:
        """What the ledger says in each epoch of a dataset."""
        return self._by_share[share]

    def add_held_out(
        self,
        chosen: Sequence[int],
        left_out: Iterable[tuple[Origin, str]],
        broken: Iterable[tuple[Origin, str]],
    ) -> None:
        """Add the rows that are not `chosen`, and what never was a row.

        Raises:
            ConfigError: two rows have one name.
        """
        failed = {_name(origin): RowOutcome(origin, "broken", reason) for origin, reason in broken}
        held_out = np.setdiff1d(np.arange(len(self._samples)), np.array(chosen, dtype=np.int64))
        found = []
        for row in held_out.tolist():
            origin = self._origin(row)
            whole = RowOutcome(origin, "left_out", "held out by the split")
            found.append(_Absent(failed.pop(_name(origin), whole), row))
        found += [_Absent(outcome) for outcome in failed.values()]
        found += [_Absent(RowOutcome(origin, "left_out", reason)) for origin, reason in left_out]
        self._sort(found)
        self._check_names()

    def _sort(self, absent: Iterable[_Absent]) -> None:
        for one in absent:
            self._by_share[self._share_of(one)].append(one.outcome)

    def _share_of(self, absent: _Absent) -> int:
        for number, share in enumerate(self._shares):
            if absent.row in share.rows if absent.row is not None else (
                absent.outcome.origin.dataset == share.name
            ):  # fmt: skip
                return number
        return 0

    def _origin(self, row: int) -> Origin:
        try:
            return origin_of(self._samples[row], row)
        except DataError as error:
            return unread(error, row).origin

    def _check_names(self) -> None:
        """Every row must have a name of its own."""
        measured = self._measured
        rows = measured.columns["origin_row"]
        numbered = (measured.columns["dataset"] << _ROW_BITS) + rows
        codes, first, counts = np.unique(
            numbered[rows != NONE], return_index=True, return_counts=True
        )
        if (counts > 1).any():
            place = np.flatnonzero(rows != NONE)[first[counts > 1][0]]
            raise _same_names(measured.rows.origin(int(place)))
        numbers = {name: number for number, name in enumerate(measured.datasets)}
        seen: set[RowName] = set()
        absent = [outcome.origin for outcomes in self._by_share for outcome in outcomes]
        lone = np.flatnonzero(rows == NONE).tolist()
        for origin in [*(measured.rows.origin(place) for place in lone), *absent]:
            code = (numbers.get(origin.dataset, len(numbers)) << _ROW_BITS) + (origin.row or 0)
            at = int(np.searchsorted(codes, code))
            packed = origin.row is not None and at < len(codes) and codes[at] == code
            if packed or _name(origin) in seen:
                raise _same_names(origin)
            seen.add(_name(origin))

    def __len__(self) -> int:
        return sum(len(absent) for absent in self._by_share)


def _name(origin: Origin) -> RowName:
    return row_name(origin.dataset, origin.row, origin.file)


def _same_names(origin: Origin) -> ConfigError:
    return ConfigError(
        f"a ledger needs rows with names of their own: two are called ({origin}); give each "
        "dataset a name of its own"
    )

"""Which adapter each stretch of a packed row uses, and what the kernels walk over because of it.

Shape letters: T positions, N positions that have an adapter, G adapters, B blocks of positions.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Kept = TypeVar("Kept")


class Group(NamedTuple):
    """The positions of one adapter.

    `pieces` are the numbers of its pieces (see `Segments.sizes`). In adapter order (see
    `Segments.order`) its positions are `places` places from `first` on.
    """

    adapter: int
    pieces: tuple[int, ...]
    first: int
    places: int


class Blocks(NamedTuple):
    """What a GPU kernel walks over, int32 on its device.

    `order` (N,): positions in adapter order. `blocks` (B, 3): first place, places and adapter of
    each block. `ranges` (G, 2): first place and places of each adapter, zero without positions.
    """

    order: Tensor
    blocks: Tensor
    ranges: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Stretches [start, stop) of a row of `length` positions. Built once per batch.

    Positions outside of all stretches have no adapter. What the kernels need besides is made when
    it is first asked for, and kept.

    Args:
        bounds: In row order, without overlap; a stretch may be empty.
        adapters: The number of each stretch's adapter, or None for the base alone. An adapter may
            have any number of stretches.

    Raises:
        ValueError: stretches that overlap, leave the row, or are not as many as `adapters`.
    """

    bounds: Sequence[tuple[int, int]]
    adapters: Sequence[int | None]
    length: int
    sizes: tuple[int, ...] = field(init=False)
    """Positions of the pieces that make up the row, neighbours of one adapter joined."""

    groups: tuple[Group, ...] = field(init=False)
    """Adapters that have positions, by number."""

    _kept: dict[Hashable, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.bounds, self.adapters, self.length)
        pieces = _pieces(self.bounds, self.adapters, self.length)
        object.__setattr__(self, "sizes", tuple(size for size, _ in pieces))
        object.__setattr__(self, "groups", _groups(pieces))

    @property
    def highest(self) -> int:
        """The largest adapter number that has positions; -1 without any."""
        return self.groups[-1].adapter if self.groups else -1

    def order(self, device: torch.device) -> Tensor:
        """(N,) int64: the positions that have an adapter, adapter by adapter."""
        return self.keep(("order", device), lambda: _order(self.sizes, self.groups).to(device))

    def blocks(self, device: torch.device, rows: int, adapters: int) -> Blocks:
        """Blocks of at most `rows` positions of one adapter each, for `adapters` adapters."""

        def made() -> Blocks:
            ranges = torch.zeros(adapters, 2, dtype=torch.int32)
            cut: list[tuple[int, int, int]] = []
            for group in self.groups:
                ranges[group.adapter] = torch.tensor([group.first, group.places])
                for at in range(0, group.places, rows):
                    held = min(rows, group.places - at)
                    cut.append((group.first + at, held, group.adapter))
            table = torch.tensor(cut, dtype=torch.int32).reshape(-1, 3)
            order = self.order(device).to(torch.int32)
            return Blocks(order, table.to(device), ranges.to(device))

        return self.keep(("blocks", device, rows, adapters), made)

    def keep(self, name: Hashable, make: Callable[[], Kept]) -> Kept:
        """What `make` returns, made once per `name`."""
        if name not in self._kept:
            self._kept[name] = make()
        kept: Kept = self._kept[name]
        return kept


def _check(bounds: Sequence[tuple[int, int]], adapters: Sequence[int | None], length: int) -> None:
    if len(bounds) != len(adapters):
        raise ValueError(
            f"every stretch needs an adapter's number or None; got {len(bounds)} stretches and "
            f"{len(adapters)} numbers"
        )
    before = 0
    for start, stop in bounds:
        if not before <= start <= stop <= length:
            raise ValueError(
                f"stretches must come in row order, without overlap, inside 0..{length}; got "
                f"({start}, {stop}) after position {before}"
            )
        before = stop
    negative = [number for number in adapters if number is not None and number < 0]
    if negative:
        raise ValueError(
            f"adapters are numbered from 0; got {negative[0]}: use None for no adapter"
        )


def _pieces(
    bounds: Sequence[tuple[int, int]], adapters: Sequence[int | None], length: int
) -> list[tuple[int, int | None]]:
    """(positions, adapter) from the row's start to its end; no piece is empty."""
    pieces: list[tuple[int, int | None]] = []

    def put(size: int, adapter: int | None) -> None:
        if pieces and pieces[-1][1] == adapter:
            size += pieces.pop()[0]
        if size:
            pieces.append((size, adapter))

    at = 0
    for (start, stop), adapter in zip(bounds, adapters, strict=True):
        if start < stop:
            put(start - at, None)
            put(stop - start, adapter)
            at = stop
    put(length - at, None)
    return pieces


def _groups(pieces: Sequence[tuple[int, int | None]]) -> tuple[Group, ...]:
    mine: dict[int, list[int]] = {}
    for number, (_, adapter) in enumerate(pieces):
        if adapter is not None:
            mine.setdefault(adapter, []).append(number)
    groups = []
    first = 0
    for adapter in sorted(mine):
        places = sum(pieces[number][0] for number in mine[adapter])
        groups.append(Group(adapter, tuple(mine[adapter]), first, places))
        first += places
    return tuple(groups)


def _order(sizes: Sequence[int], groups: Sequence[Group]) -> Tensor:
    rows = torch.split(torch.arange(sum(sizes)), list(sizes)) if sizes else ()
    parts = [rows[number] for group in groups for number in group.pieces]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

"""What sequences have read so far, in the form in which a model reads on.

`KeyMemory` keeps keys and values in slots; prompts that begin alike share them. `RowMemory` serves
models that mix positions by other means than attention: it keeps the rows and reads them again.

Shape letters: T positions of a piece, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from plait.errors import ModelError
from plait.kernels.interval_attention import Intervals, Linked
from plait.trainer.backbone import Backbone
from plait.trainer.rows import Deeper, Rows, join, join_deeper, join_positions
from plait.trainer.sampling.arena import Arena
from plait.trainer.sampling.cache import SlotCache

MOST_LINKS = 2
"""Stretches of others that a place reads; what would need more is copied."""

_FIRST_SLOTS = 1024


@dataclass(slots=True, eq=False)
class Place:
    """Where a sequence, or the prompt of several, is kept.

    Its positions are those of `links`, one behind another, and then its own.
    """

    start: int
    capacity: int
    """Positions of its own at most."""

    links: "tuple[tuple[Place, int], ...]" = ()
    """Places whose first positions this one begins with, and how many of each one's own."""

    filled: int = 0
    """Positions of its own that are written."""

    users: int = 1
    """Those that keep it open: its sequence, and places that begin with it."""

    copies: "tuple[tuple[Place, int], ...]" = ()
    """As `links`, to be copied to this one's beginning before it is first read."""

    row: Rows | None = None
    """`RowMemory`: what was read."""

    @property
    def before(self) -> int:
        """Positions that stand in others."""
        return sum(length for _, length in self.links)

    @property
    def length(self) -> int:
        """All positions so far."""
        return self.before + self.filled


@dataclass(slots=True)
class Piece:
    """The next T positions of a place.

    Args:
        hi: (T,) one past the last position that each may attend, counted from the sequence's
            beginning.
    """

    place: Place
    embeddings: Tensor
    positions: Tensor
    hi: Tensor
    adapter: str | None = None
    deeper: Deeper | None = None

    @property
    def length(self) -> int:
        """T."""
        return len(self.embeddings)


class Memory(Protocol):
    """Places are opened, read into and closed."""

    slots: int
    """Positions kept at most."""

    @property
    def held(self) -> bool:
        """Whether it has taken memory of the device."""

    def open(self, capacity: int, source: Place | None = None, length: int = 0) -> Place | None:
        """Room for `capacity` positions behind the first `length` ones of `source`, which need
        not be read yet; None where there is none now."""

    def close(self, place: Place, kept: int | None = None) -> None:
        """Give a place back; what links to it keeps it until it is closed as well.

        Args:
            kept: Of its own positions, how many the others may read; None is all of them.
        """

    def needed(self, prompt: int, more: int, samples: int, at_once: int | None = None) -> int:
        """Positions kept for `samples` that grow by `more` behind one prompt, all of them or some
        at once."""

    def read(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """The last hidden states (T, H) of each piece; they count as read."""


class KeyMemory:
    """Keys and values in slots.

    Args:
        slots: Positions kept at most; memory for them is taken as they are needed.
    """

    def __init__(self, backbone: Backbone, slots: int) -> None:
        self.backbone, self.slots = backbone, slots
        first = min(slots, _FIRST_SLOTS)
        self.arena, self.cache = Arena(first), SlotCache(backbone.layers, first)
        self.shares = not has_windows(backbone)
        """Whether places link to others or copy them: a window counts keys back from a query,
        over the border of a link."""

    @property
    def held(self) -> bool:
        return any(layer.is_initialized for layer in self.cache.layers)

    def open(self, capacity: int, source: Place | None = None, length: int = 0) -> Place | None:
        if source is not None:
            self._copy(source)  # what links to it must not wait until it is read itself
        begins = _links(source, length) if source else ()
        copied = not self.shares or len(begins) > MOST_LINKS
        before = length if copied else 0
        start = self._take(before + capacity)
        if start is None:
            return None
        for place, _ in begins:
            place.users += 1
        if copied:
            return Place(start, before + capacity, filled=before, copies=begins)
        return Place(start, capacity, links=begins)

    def _take(self, length: int) -> int | None:
        if length == 0:
            return 0
        start = self.arena.take(length)
        while start is None and self.arena.size < self.slots:
            size = min(self.slots, max(2 * self.arena.size, length))
            self.cache.grow(size)  # first: it may find no memory
            self.arena.grow(size)
            start = self.arena.take(length)
        return start

    def close(self, place: Place, kept: int | None = None) -> None:
        place.users -= 1
        if place.users == 0:
            if place.capacity:
                self.arena.give(place.start, place.capacity)
            for other, _ in (*place.links, *place.copies):
                self.close(other)
        elif kept is not None and kept < place.capacity:
            self.arena.give(place.start + kept, place.capacity - kept)
            place.capacity, place.filled = kept, min(place.filled, kept)

    def needed(self, prompt: int, more: int, samples: int, at_once: int | None = None) -> int:
        if samples <= 1:
            return prompt + more
        return prompt + (at_once or samples) * (more if self.shares else prompt + more)

    def _copy(self, place: Place) -> None:
        at = place.start
        for other, length in place.copies:
            self.cache.copy(other.start, at, length)
            at += length
        copied, place.copies = place.copies, ()
        for other, _ in copied:
            self.close(other)

    def read(self, pieces: Sequence[Piece]) -> list[Tensor]:
        _check_room(pieces)
        for piece in pieces:
            self._copy(piece.place)
        # In the order of their slots, so that no interval begins before the one before it.
        order = sorted(range(len(pieces)), key=lambda number: pieces[number].place.start)
        ordered = [pieces[number] for number in order]
        rows = self._rows(ordered)
        with self.backbone.adapters_of(rows):
            hidden = self.backbone.read(rows, self.cache)
        parts = torch.split(hidden, [piece.length for piece in ordered])
        made = dict(zip(order, parts, strict=True))
        for piece in pieces:
            piece.place.filled += piece.length
        return [made[number] for number in range(len(pieces))]

    def _rows(self, pieces: Sequence[Piece]) -> Rows:
        lengths = [piece.length for piece in pieces]
        starts = [0, *accumulate(lengths)]
        slots, los, his = [], [], []
        for piece, length in zip(pieces, lengths, strict=True):
            place = piece.place
            first = place.start + place.filled
            slots.append(torch.arange(first, first + length))
            los.append(torch.full((length,), place.start))
            his.append(piece.hi + (place.start - place.before))
        own = torch.cat(slots)
        self.cache.slots = own.to(self.backbone.device)
        return Rows(
            torch.cat([piece.embeddings for piece in pieces]),
            join_positions([piece.positions for piece in pieces]),
            Intervals(torch.cat(los), torch.cat(his), own, links=_linked(pieces, starts)),
            list(pairwise(starts)),
            [piece.adapter for piece in pieces],
            join_deeper([piece.deeper for piece in pieces], lengths),
        )


def _check_room(pieces: Sequence[Piece]) -> None:
    """Refuse to write where another sequence's positions are."""
    for piece in pieces:
        place = piece.place
        if place.filled + piece.length > place.capacity:
            raise ModelError(
                f"a sequence may grow to the {place.capacity} positions that it was opened with; "
                f"it has {place.filled}, and {piece.length} more are read"
            )


def _links(source: Place, length: int) -> tuple[tuple[Place, int], ...]:
    """The places that hold the first `length` positions of `source`."""
    links: list[tuple[Place, int]] = []
    for place, held in (*source.links, (source, length)):
        taken = min(held, length)
        if taken:
            links.append((place, taken))
        length -= taken
    return tuple(links)


def _linked(pieces: Sequence[Piece], starts: Sequence[int]) -> tuple[Linked, ...]:
    """What pieces see of others' stretches: at each depth, in the order of these stretches."""
    depth = max((len(piece.place.links) for piece in pieces), default=0)
    found = []
    for level in range(depth):
        seen = [
            (place.start, place.start + length, start, piece.length)
            for piece, start in zip(pieces, starts, strict=False)
            for place, length in piece.place.links[level : level + 1]
        ]
        seen.sort()
        queries = torch.cat([torch.arange(start, start + count) for _, _, start, count in seen])
        counts = torch.tensor([count for *_, count in seen])
        lo = torch.tensor([lo for lo, *_ in seen]).repeat_interleave(counts)
        hi = torch.tensor([hi for _, hi, *_ in seen]).repeat_interleave(counts)
        found.append(Linked(queries, Intervals(lo, hi)))
    return tuple(found)


class RowMemory:
    """Whole rows, read again for every piece; for models that cannot be packed."""

    def __init__(self, backbone: Backbone, slots: int) -> None:
        self.backbone, self.slots = backbone, slots
        self._held = 0
        """Positions of all places that are open."""

    @property
    def held(self) -> bool:
        return self._held > 0

    def open(self, capacity: int, source: Place | None = None, length: int = 0) -> Place | None:
        if self._held + capacity + length > self.slots:
            return None
        self._held += capacity + length
        if source is None:
            return Place(0, capacity)
        source.users += 1
        return Place(0, capacity + length, filled=length, copies=((source, length),))

    def close(self, place: Place, kept: int | None = None) -> None:  # noqa: ARG002
        place.users -= 1
        if place.users == 0:
            self._held -= place.capacity
            place.row = None
            for other, _ in place.copies:
                self.close(other)

    def needed(self, prompt: int, more: int, samples: int, at_once: int | None = None) -> int:
        if samples <= 1:
            return prompt + more
        return prompt + (at_once or samples) * (prompt + more)

    def read(self, pieces: Sequence[Piece]) -> list[Tensor]:
        _check_room(pieces)
        rows = [_whole(piece) for piece in pieces]
        hidden = [self._hidden(row)[-p.length :] for row, p in zip(rows, pieces, strict=True)]
        for piece, row in zip(pieces, rows, strict=True):  # once none can fail any more
            place = piece.place
            copied, place.copies = place.copies, ()
            for other, _ in copied:
                self.close(other)
            place.row, place.filled = row, place.filled + piece.length
        return hidden

    def _hidden(self, rows: Rows) -> Tensor:
        with self.backbone.adapters_of(rows):
            return self.backbone.read(rows)


def _whole(piece: Piece) -> Rows:
    """What a place has read so far, and a piece behind it."""
    visible = Intervals(torch.zeros_like(piece.hi), piece.hi)
    bounds, adapters = [(0, piece.length)], [piece.adapter]
    more = Rows(piece.embeddings, piece.positions, visible, bounds, adapters, piece.deeper)
    before = _row(piece.place)
    return _appended(before, more) if before else more


def _row(place: Place) -> Rows | None:
    """What a place has read, or begins with."""
    for source, length in place.copies:
        row = _row(source)
        assert row is not None
        return _first(row, length)
    return place.row


def _appended(before: Rows, more: Rows) -> Rows:
    """One document of both; what `more` sees is counted from its beginning already."""
    rows = join([before, more])
    rows.visible = Intervals(
        torch.cat([before.visible.lo, more.visible.lo]),
        torch.cat([before.visible.hi, more.visible.hi]),
    )
    rows.bounds, rows.adapters = [(0, rows.length)], before.adapters
    return rows


def _first(rows: Rows, length: int) -> Rows:
    """The first positions of a document."""
    return Rows(
        rows.embeddings[:length],
        rows.positions[..., :length],
        Intervals(rows.visible.lo[:length], rows.visible.hi[:length]),
        [(0, length)],
        rows.adapters,
        rows.deeper.part(0, length) if rows.deeper else None,
    )


def has_windows(backbone: Backbone) -> bool:
    """Whether some layer sees a number of keys back, not all."""
    config = backbone.language.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    windowed = any("sliding" in kind or "chunk" in kind or "local" in kind for kind in kinds)
    return windowed or getattr(config, "sliding_window", None) is not None

"""Grouped LoRA in plain torch: a few matrix products an adapter, added in place.

An adapter's pieces of the row are read where they lie. Where they are many and short, its rows are
gathered first: a product of a few rows costs as much as one of sixty.

Shape letters: T positions, n_g positions of adapter g, I inputs, O outputs, r_g rank of adapter g,
K channels of either side.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from plait.kernels.grouped_lora.machine import Adapters
from plait.kernels.grouped_lora.segments import Group, Segments

GATHER_BELOW = 64
"""Mean positions of a piece under which gathering is the faster way, measured on two cores."""


def add(x: Tensor, out: Tensor, adapters: Adapters) -> Tensor | None:
    """See `machine.Machine`; the result holds x A_g^T, scaled, (n_g, r_g) one after another."""
    a, b, scales, segments = adapters
    read, write = _Rows(x, segments), _Rows(out, segments)
    size = sum(group.places * len(a[group.adapter]) for group in segments.groups)
    low = torch.empty(size, device=x.device)
    for group, part in zip(segments.groups, _parts(low, adapters), strict=True):
        g = group.adapter
        read.shrink(group, a[g].float(), scales[g], part)
        write.expand(group, part, b[g].float().T)
    return low


def gradients(
    grad: Tensor,
    x: Tensor | None,
    grad_x: Tensor | None,
    low: Tensor | None,
    adapters: Adapters,
) -> tuple[list[Tensor], list[Tensor]]:
    """See `machine.Machine`. With l = scale x A^T: dB = dy^T l, dl = scale dy B, dA = dl^T x."""
    a, b, scales, segments = adapters
    read = _Rows(grad, segments)
    read_x = None if x is None else _Rows(x, segments)
    write = None if grad_x is None else _Rows(grad_x, segments)
    parts = [None] * len(segments.groups) if low is None else _parts(low, adapters)
    found_a: dict[int, Tensor] = {}
    found_b: dict[int, Tensor] = {}
    for group, part in zip(segments.groups, parts, strict=True):
        g = group.adapter
        if part is not None:
            found_b[g] = read.outer(group, part, turned=True)
        if read_x is None and write is None:
            continue
        slope = torch.empty(group.places, len(a[g]), device=grad.device)
        read.shrink(group, b[g].float().T, scales[g], slope)
        if read_x is not None:
            found_a[g] = read_x.outer(group, slope)
        if write is not None:
            write.expand(group, slope, a[g].float())
    return [] if x is None else _whole(found_a, a), [] if low is None else _whole(found_b, b)


class _Rows:
    """The rows of x (T, K), group by group; `expand` writes to x, the others read it."""

    def __init__(self, x: Tensor, segments: Segments) -> None:
        self._x = x
        self._segments = segments
        self._pieces = torch.split(x, list(segments.sizes)) if segments.sizes else ()

    def _gathers(self, group: Group) -> bool:
        return len(group.pieces) > 1 and group.places < GATHER_BELOW * len(group.pieces)

    def _index(self, group: Group) -> Tensor:
        """(n_g,) the group's positions."""
        return self._segments.order(self._x.device)[group.first : group.first + group.places]

    def _read(self, group: Group, low: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of x in float32, with their rows of `low` (n_g, r)."""
        if self._gathers(group):
            yield self._x.index_select(0, self._index(group)).float(), low
            return
        pieces = [self._pieces[number] for number in group.pieces]
        for piece, part in zip(pieces, _apportioned(low, pieces), strict=True):
            yield piece.float(), part

    def shrink(self, group: Group, factor: Tensor, scale: float, low: Tensor) -> None:
        """factor (r, K): scale x factor^T into `low` (n_g, r)."""
        for piece, part in self._read(group, low):
            torch.addmm(part, piece, factor.T, beta=0, alpha=scale, out=part)

    def outer(self, group: Group, low: Tensor, turned: bool = False) -> Tensor:
        """low (n_g, r): low^T x (r, K) in float32, or x^T low (K, r) where `turned`."""
        total: Tensor | None = None
        for piece, part in self._read(group, low):
            left, right = (piece, part) if turned else (part, piece)
            total = left.T @ right if total is None else total.addmm_(left.T, right)
        assert total is not None
        return total

    def expand(self, group: Group, low: Tensor, factor: Tensor) -> None:
        """low (n_g, r), factor (r, K): x += low factor in place."""
        if self._gathers(group):
            index = self._index(group)
            here = self._x.index_select(0, index)
            self._x.index_copy_(0, index, _added(here, low, factor))
            return
        pieces = [self._pieces[number] for number in group.pieces]
        for piece, part in zip(pieces, _apportioned(low, pieces), strict=True):
            _added(piece, part, factor)


def _added(out: Tensor, low: Tensor, factor: Tensor) -> Tensor:
    if out.dtype == torch.float32:
        return out.addmm_(low, factor)
    return out.add_(low @ factor)  # summed in float32 and rounded once


def _apportioned(low: Tensor, pieces: list[Tensor]) -> tuple[Tensor, ...]:
    """low (n, r), cut as the pieces are."""
    if len(pieces) == 1:
        return (low,)
    return torch.split(low, [len(piece) for piece in pieces])


def _whole(found: dict[int, Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """A gradient for every factor: zero for an adapter without positions."""
    return [
        found[g] if g in found else torch.zeros_like(factor, dtype=torch.float32)
        for g, factor in enumerate(factors)
    ]


def _parts(low: Tensor, adapters: Adapters) -> list[Tensor]:
    """Views (n_g, r_g) of the flat tensor, one a group."""
    groups = adapters.segments.groups
    ranks = [len(adapters.a[group.adapter]) for group in groups]
    sizes = [group.places * rank for group, rank in zip(groups, ranks, strict=True)]
    flat = torch.split(low, sizes) if sizes else ()
    return [part.view(-1, rank) for part, rank in zip(flat, ranks, strict=True)]

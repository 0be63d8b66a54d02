"""Embedded documents on their way through a language model.

Shape letters: T positions of a row, M positions that media fill, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from plait.kernels.interval_attention import Intervals


@dataclass(slots=True, eq=False)
class Deeper:
    """Media features that the first layers add to the hidden states ("deepstack").

    `mask` (T,) says at which positions, `layers` holds their features (M, H).
    """

    mask: Tensor
    layers: tuple[Tensor, ...]

    @classmethod
    def joined(
        cls, length: int, found: Sequence[tuple[Tensor, tuple[Tensor, ...]]]
    ) -> "Deeper | None":
        """Those of a row of `length` positions; None where no encoder has any.

        Args:
            found: Of each encoder that has some: positions (P,), and for each layer (P, H). One
                with fewer layers adds nothing to the later ones.
        """
        if not found:
            return None
        index = torch.cat([places for places, _ in found])
        order = index.argsort()
        depth = max(len(stack) for _, stack in found)
        padded = [
            (*stack, *[torch.zeros_like(stack[0])] * (depth - len(stack))) for _, stack in found
        ]
        layers = tuple(torch.cat(layer)[order] for layer in zip(*padded, strict=True))
        mask = torch.zeros(length, dtype=torch.bool, device=index.device)
        mask[index] = True
        return cls(mask, layers)

    def part(self, start: int, stop: int) -> "Deeper":
        """Positions [start, stop)."""
        before, inside = int(self.mask[:start].sum()), int(self.mask[start:stop].sum())
        layers = tuple(layer[before : before + inside] for layer in self.layers)
        return Deeper(self.mask[start:stop], layers)

    def keywords(self) -> dict[str, Any]:
        """As transformers' models read them."""
        return {
            "visual_pos_masks": self.mask[None],
            "deepstack_visual_embeds": list(self.layers),
        }


@dataclass(slots=True, eq=False)
class Rows:
    """Documents, one behind another.

    Args:
        embeddings: (T, H).
        positions: (T,) or (3, T).
        visible: The keys that each position sees.
        bounds: Each document's (start, stop).
        adapters: Each document's adapter, None for the base alone.
        deeper: Features for deeper layers, where a document's media have any.
    """

    embeddings: Tensor
    positions: Tensor
    visible: Intervals
    bounds: Sequence[tuple[int, int]]
    adapters: Sequence[str | None]
    deeper: Deeper | None = None

    @property
    def length(self) -> int:
        """T."""
        return len(self.embeddings)

    def apart(self) -> list["Rows"]:
        """Each document by itself."""
        visible = torch.stack([self.visible.lo, self.visible.hi])
        return [
            Rows(
                self.embeddings[start:stop],
                self.positions[..., start:stop],
                Intervals(*(visible[:, start:stop] - start)),
                [(0, stop - start)],
                [adapter],
                self.deeper.part(start, stop) if self.deeper else None,
            )
            for (start, stop), adapter in zip(self.bounds, self.adapters, strict=True)
        ]


def joined_visible(parts: Sequence[Intervals], starts: Sequence[int]) -> Intervals:
    """Intervals of rows that are put one behind another, each from its start on."""
    lo = torch.cat([part.lo + start for part, start in zip(parts, starts, strict=True)])
    hi = torch.cat([part.hi + start for part, start in zip(parts, starts, strict=True)])
    return Intervals(lo, hi)


def join(parts: Sequence[Rows]) -> Rows:
    """Rows one behind another, those of several runs too."""
    if len(parts) == 1:
        return parts[0]
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.length)
    del starts[-1]
    return Rows(
        torch.cat([part.embeddings for part in parts]),
        join_positions([part.positions for part in parts]),
        joined_visible([part.visible for part in parts], starts),
        [
            (start + a, start + b)
            for part, start in zip(parts, starts, strict=True)
            for a, b in part.bounds
        ],
        [adapter for part in parts for adapter in part.adapters],
        join_deeper([part.deeper for part in parts], [part.length for part in parts]),
    )


def join_positions(parts: Sequence[Tensor]) -> Tensor:
    """(T,) or (3, T); beside positions of three axes a text's one stands three times."""
    rank = max(part.ndim for part in parts)
    return torch.cat([part if part.ndim == rank else part.expand(3, -1) for part in parts], dim=-1)


def join_deeper(parts: Sequence[Deeper | None], lengths: Sequence[int]) -> Deeper | None:
    """Features of several rows; rows without any have nothing at their positions."""
    starts = accumulate(lengths, initial=0)
    found = [
        (part.mask.nonzero().flatten() + start, part.layers)
        for part, start in zip(parts, starts, strict=False)
        if part is not None
    ]
    return Deeper.joined(sum(lengths), found)

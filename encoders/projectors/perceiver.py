"""A resampler: learned queries read an item's features, so that each takes so many positions.

Source: Alayrac et al., Flamingo (2022), section 3.1.1; here the queries read the features alone.
Shape letters: G groups, L features of a group, Q queries, D channels of the resampler.
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from plait.encoders.base import Grid, Shape
from plait.encoders.projectors.base import Projector, check_count, drawn_linear
from plait.errors import ConfigError


class Perceiver(Projector):
    """`positions` positions for each item, or for each of its time rows with `per_row`.

    Features know their place by fixed sines and cosines of their time, row and column, added to
    them.

    Args:
        positions: Queries, each of which becomes a position.
        per_row: Each time row by itself: a film keeps its frames.
        layers: Cross-attention and feed-forward layers.
        width: D, or the features' own channels, rounded up to whole heads.
        heads: Of the attention.

    Raises:
        ConfigError: an option is below 1, or the heads do not divide the width.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding_std: float,
        generator: torch.Generator,
        positions: int = 16,
        per_row: bool = False,
        layers: int = 2,
        width: int | None = None,
        heads: int = 4,
    ) -> None:
        super().__init__()
        for name, value in {"positions": positions, "layers": layers, "heads": heads}.items():
            check_count("perceiver", name, value)
        inner = -(-inputs // heads) * heads if width is None else width
        check_count("perceiver", "width", inner)
        if inner % heads:
            raise ConfigError(
                f"the heads of projector 'perceiver' must divide its width; {heads} do not "
                f"divide {inner}"
            )
        self.positions, self.per_row = positions, per_row
        self.norm = nn.LayerNorm(inputs)
        self.enter = drawn_linear(inputs, inner, 1.0, 1.0, generator)
        self.queries = nn.Parameter(torch.randn(positions, inner, generator=generator))
        self.layers = nn.ModuleList(_Layer(inner, heads, generator) for _ in range(layers))
        self.last_norm = nn.LayerNorm(inner)
        self.out = drawn_linear(inner, outputs, 1.0, embedding_std, generator)

    def plan(self, shape: Shape) -> Shape:
        if self.per_row:
            return Shape((shape.grid[0], 1, self.positions), shape.seconds)
        return Shape((1, 1, self.positions), shape.seconds[:1])

    def forward(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(N, inputs) -> (M, outputs)."""
        entered = self.enter(self.norm(features))
        places = [sines(grid, entered.shape[1]) for grid in grids]
        if places:
            entered = entered + torch.cat(places).to(entered)
        lengths = [
            length
            for time, height, width in grids
            for length in ([height * width] * time if self.per_row else [time * height * width])
        ]
        keys, mask = _padded(entered, lengths)
        read = self.queries.expand(len(lengths), -1, -1)
        for layer in self.layers:
            read = layer(read, keys, mask)
        projected: Tensor = self.out(self.last_norm(read.flatten(0, 1)))
        return projected


class _Layer(nn.Module):
    """Queries read the features, then a feed-forward network; each added to what was."""

    def __init__(self, width: int, heads: int, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm, self.key_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        # No biases: that of the keys cancels in the softmax and would never learn.
        self.query = _without_bias(width, width, generator)
        self.key = _without_bias(width, width, generator)
        self.value = _without_bias(width, width, generator)
        self.mix = drawn_linear(width, width, 1.0, 1.0, generator)
        self.wide_norm = nn.LayerNorm(width)
        self.widen = drawn_linear(width, 4 * width, 1.0, 1.0, generator)
        self.narrow = drawn_linear(4 * width, width, 1.0, 1.0, generator)

    def forward(self, read: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """(G, Q, D), (G, L, D), (G, L) -> (G, Q, D)."""
        normed = self.key_norm(keys)
        attended = F.scaled_dot_product_attention(
            self._split(self.query(self.query_norm(read))),
            self._split(self.key(normed)),
            self._split(self.value(normed)),
            attn_mask=mask[:, None, None, :],
        )
        read = read + self.mix(attended.transpose(1, 2).flatten(2))
        wide: Tensor = self.narrow(F.gelu(self.widen(self.wide_norm(read))))
        return read + wide

    def _split(self, rows: Tensor) -> Tensor:
        """(G, L, D) -> (G, heads, L, D / heads)."""
        groups, length, width = rows.shape
        return rows.reshape(groups, length, self.heads, width // self.heads).transpose(1, 2)


def sines(grid: Grid, width: int) -> Tensor:
    """(N, width): sines and cosines of each position's time, row and column, a third each.

    Wavelengths grow from 2 pi to 10,000 times that, as in Vaswani et al. (2017).
    """
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid)).reshape(prod(grid), 3)
    steps = -(-width // 6)
    rates = 10_000.0 ** (-torch.arange(steps) / steps)
    angles = places[:, None, :].float() * rates[:, None]
    return torch.cat([angles.sin(), angles.cos()], dim=1).flatten(1)[:, :width]


def _padded(rows: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(G, L, D) groups filled up with zeros, and (G, L) where there are features."""
    if not lengths:
        return rows[:, None], rows.new_zeros(0, 1, dtype=torch.bool)
    groups = pad_sequence(list(torch.split(rows, list(lengths))), batch_first=True)
    counts = torch.tensor(lengths, device=rows.device)
    return groups, torch.arange(groups.shape[1], device=rows.device) < counts[:, None]


def _without_bias(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=inputs**-0.5, generator=generator)
    return layer

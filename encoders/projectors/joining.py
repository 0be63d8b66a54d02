"""Projectors that join neighbouring time rows of an item: stacked, or by a strided convolution.

Shape letters: T time rows of an item, S positions of a row, K rows joined, C channels.
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.encoders.base import Grid, Shape
from plait.encoders.projectors.base import Projector, check_count, drawn_linear
from plait.encoders.projectors.simple import Mlp
from plait.errors import ConfigError


def joined(shape: Shape, rows: int) -> Shape:
    """A shape after each `rows` time rows have become one, which begins with the first."""
    time, height, width = shape.grid
    return Shape((-(-time // rows), height, width), shape.seconds[::rows])


class Stack(Projector):
    """The channels of `frames` time rows side by side, then an `Mlp`; the last group is filled
    up with zeros."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding_std: float,
        generator: torch.Generator,
        frames: int = 2,
    ) -> None:
        super().__init__()
        check_count("stack", "frames", frames)
        self.frames = frames
        self.mlp = Mlp(inputs * frames, outputs, embedding_std, generator)

    def plan(self, shape: Shape) -> Shape:
        return joined(shape, self.frames)

    def forward(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(N, inputs) -> (M, outputs)."""
        items = torch.split(features, [prod(grid) for grid in grids])
        stacked = [self._stack(item, grid) for item, grid in zip(items, grids, strict=True)]
        empty = features.new_zeros(0, features.shape[1] * self.frames)
        projected: Tensor = self.mlp(torch.cat([empty, *stacked]), grids)
        return projected

    def _stack(self, item: Tensor, grid: Grid) -> Tensor:
        """(T * S, C) -> (ceil(T / K) * S, K * C)."""
        time, channels = grid[0], item.shape[1]
        rows = F.pad(item.reshape(time, -1, channels), (0, 0, 0, 0, 0, -time % self.frames))
        groups = rows.reshape(-1, self.frames, *rows.shape[1:]).transpose(1, 2)
        return groups.reshape(-1, self.frames * channels)


class Conv(Projector):
    """A strided convolution over the time rows of each item, GELU, then an `Mlp`.

    Each cell of the grid is a sequence of its own, with zeros before and behind it.

    Raises:
        ConfigError: the kernel is even, so that it would have no middle, or narrower than the
            stride, so that rows would be lost.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding_std: float,
        generator: torch.Generator,
        stride: int = 2,
        kernel: int = 3,
    ) -> None:
        super().__init__()
        check_count("conv", "stride", stride)
        check_count("conv", "kernel", kernel)
        if kernel % 2 == 0 or kernel < stride:
            raise ConfigError(
                "the kernel of projector 'conv' is odd and at least its stride; got a kernel of "
                f"{kernel} and a stride of {stride}"
            )
        self.stride = stride
        self.norm = nn.LayerNorm(inputs)
        self.conv = nn.Conv1d(inputs, inputs, kernel, stride, padding=kernel // 2)
        drawn = drawn_linear(inputs * kernel, inputs, 1.0, 1.0, generator)
        with torch.no_grad():
            self.conv.weight.copy_(drawn.weight.reshape(inputs, inputs, kernel))
            self.conv.bias.zero_()  # type: ignore[union-attr]
        self.mlp = Mlp(inputs, outputs, embedding_std, generator)

    def plan(self, shape: Shape) -> Shape:
        return joined(shape, self.stride)

    def forward(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(N, inputs) -> (M, outputs)."""
        normed = self.norm(features)
        items = normed.split([prod(grid) for grid in grids])
        longest = max((grid[0] for grid in grids), default=1)
        cells = [_cells(item, grid[0], longest) for item, grid in zip(items, grids, strict=True)]
        # Behind a shorter item stand zeros, just as behind an item that is alone.
        empty = normed[:0, :, None].expand(-1, -1, longest)
        convolved = self.conv(torch.cat([empty, *cells]))
        parts = convolved.split([height * width for _, height, width in grids])
        rows = [
            part[..., : -(-grid[0] // self.stride)].permute(2, 0, 1).flatten(0, 1)
            for part, grid in zip(parts, grids, strict=True)
        ]
        joined_rows = torch.cat(rows) if rows else convolved.flatten(1)
        projected: Tensor = self.mlp(F.gelu(joined_rows), grids)
        return projected


def _cells(item: Tensor, time: int, longest: int) -> Tensor:
    """(T * S, C) -> (S, C, longest), filled up with zeros."""
    cells = item.reshape(time, -1, item.shape[1]).permute(1, 2, 0)
    return F.pad(cells, (0, longest - time))

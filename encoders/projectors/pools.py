"""Pools, which make a grid smaller; they have no parameters, so pooled features can be cached.

Shape letters: N positions, C channels.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.encoders.base import Grid, Shape
from plait.errors import ConfigError
from plait.stream import Encoded


class Pool(Protocol):
    """A parameter-free map of grids."""

    def plan(self, shape: Shape) -> Shape:
        """The shape that `__call__` makes of this one."""

    def width(self, width: int) -> int:
        """The channels that `__call__` makes of so many."""

    def __call__(self, encoded: Encoded) -> Encoded: ...

    def describe(self) -> str:
        """The pool and its settings as a stable string, for cache keys."""


class KeepGrid:
    """Every feature takes a position."""

    def plan(self, shape: Shape) -> Shape:
        return shape

    def width(self, width: int) -> int:
        return width

    def __call__(self, encoded: Encoded) -> Encoded:
        return encoded

    def describe(self) -> str:
        return "keep"


class GridPool:
    """Adaptive average pooling of each frame's grid to `height` x `width`.

    Neighbouring cells overlap where the sizes do not divide (7 to 3: rows 0-2, 2-4, 4-6), and a
    grid smaller than asked is repeated, so that every item takes the same number of positions.
    """

    def __init__(self, height: int, width: int) -> None:
        if min(height, width) < 1:
            raise ConfigError(
                f"a pooled grid needs at least one row and column; got {height} x {width}"
            )
        self.height, self.columns = height, width

    def plan(self, shape: Shape) -> Shape:
        return Shape((shape.grid[0], self.height, self.columns), shape.seconds)

    def width(self, width: int) -> int:
        return width

    def __call__(self, encoded: Encoded) -> Encoded:
        return Encoded(
            self._pool(encoded.embeddings, encoded.grid),
            tuple(self._pool(layer, encoded.grid) for layer in encoded.layers),
            *self.plan(Shape(encoded.grid, encoded.seconds)),
        )

    def _pool(self, features: Tensor, grid: Grid) -> Tensor:
        frames = features.reshape(*grid, -1).movedim(-1, 1)
        pooled = F.adaptive_avg_pool2d(frames, (self.height, self.columns))
        return pooled.movedim(1, -1).flatten(0, 2)

    def describe(self) -> str:
        return f"grid {self.height}x{self.columns}"


class TimePool:
    """Averages of `frames` neighbouring time rows; the last may be of fewer.

    Raises:
        ConfigError: `frames` is not a whole number of at least 1.
    """

    def __init__(self, frames: int) -> None:
        if not isinstance(frames, int) or frames < 1:
            raise ConfigError(f"time rows are pooled by whole numbers of at least 1; got {frames}")
        self.frames = frames

    def plan(self, shape: Shape) -> Shape:
        time, height, width = shape.grid
        return Shape((-(-time // self.frames), height, width), shape.seconds[:: self.frames])

    def width(self, width: int) -> int:
        return width

    def __call__(self, encoded: Encoded) -> Encoded:
        return Encoded(
            self._pool(encoded.embeddings, encoded.grid),
            tuple(self._pool(layer, encoded.grid) for layer in encoded.layers),
            *self.plan(Shape(encoded.grid, encoded.seconds)),
        )

    def _pool(self, features: Tensor, grid: Grid) -> Tensor:
        groups = torch.split(features.reshape(grid[0], -1, features.shape[-1]), self.frames)
        return torch.cat([rows.mean(dim=0) for rows in groups])

    def describe(self) -> str:
        return f"time {self.frames}"


class PoolChain:
    """Several pools, one after another."""

    def __init__(self, *pools: Pool) -> None:
        self.pools = pools

    def plan(self, shape: Shape) -> Shape:
        for pool in self.pools:
            shape = pool.plan(shape)
        return shape

    def width(self, width: int) -> int:
        for pool in self.pools:
            width = pool.width(width)
        return width

    def __call__(self, encoded: Encoded) -> Encoded:
        for pool in self.pools:
            encoded = pool(encoded)
        return encoded

    def describe(self) -> str:
        return ", ".join(pool.describe() for pool in self.pools)


def pool_of(grid: tuple[int, int] | None, frames: int) -> Pool:
    """The pool of an encoder's settings: first each frame's grid, then neighbouring frames.

    Raises:
        ConfigError: a size is below 1.
    """
    pools: list[Pool] = [] if grid is None else [GridPool(*grid)]
    if frames != 1:
        pools.append(TimePool(frames))
    if len(pools) > 1:
        return PoolChain(*pools)
    return pools[0] if pools else KeepGrid()

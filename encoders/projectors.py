"""Pools, which make a grid smaller, and projectors, which map features to the language model.

A pool has no parameters, so pooled features can be cached. Shape letters: N positions, C channels.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.encoders.base import Grid, Shape
from plait.errors import ConfigError, UnknownNameError
from plait.stream import Encoded

_GELU_SECOND_MOMENT = 0.4252
"""E[gelu(z)^2] for standard normal z: what the second layer of `Mlp` reads at the start."""


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


class Projector(nn.Module, ABC):
    """From the features of items to embeddings of the language model.

    `forward` takes the features (N, C) of several items one after another, and their grids, and
    returns the embeddings of each item as if it were alone. It is entered once per micro-batch,
    with (0, C) and no grids where nothing is read.
    """

    def plan(self, shape: Shape) -> Shape:
        """The shape of an item's embeddings; that of its features where nothing is joined."""
        return shape

    @abstractmethod
    def forward(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(N, inputs) -> (M, outputs)."""


class Linear(Projector):
    """One affine map; features of unit variance come out with the spread of word embeddings."""

    def __init__(
        self, inputs: int, outputs: int, embedding_std: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.linear = _linear(inputs, outputs, 1.0, embedding_std, generator)

    def forward(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:  # noqa: ARG002
        """(N, inputs) -> (N, outputs)."""
        projected: Tensor = self.linear(features)
        return projected


class Mlp(Projector):
    """LayerNorm, Linear, GELU, Linear; its output starts with the spread of word embeddings.

    The spread lies in the last layer's weights, not in a fixed factor: Adam moves each weight by
    about the learning rate, so small weights let the output find the model's space within tens of
    steps, where a factor would scale the movement down with the output.
    """

    def __init__(
        self, inputs: int, outputs: int, embedding_std: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.widen = _linear(inputs, outputs, 1.0, 1.0, generator)
        self.out = _linear(outputs, outputs, _GELU_SECOND_MOMENT, embedding_std, generator)

    def forward(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:  # noqa: ARG002
        """(N, inputs) -> (N, outputs)."""
        projected: Tensor = self.out(F.gelu(self.widen(self.norm(features))))
        return projected


class Identity(Projector):
    """For towers whose features already are the language model's embeddings."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding_std: float,  # noqa: ARG002  (as every projector)
        generator: torch.Generator,  # noqa: ARG002
    ) -> None:
        super().__init__()
        if inputs != outputs:
            raise ConfigError(
                "projector 'identity' needs an encoder as wide as the language model: the encoder "
                f"has {inputs} channels, the model {outputs}; use 'linear' or 'mlp'"
            )

    def forward(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:  # noqa: ARG002
        """(N, C) -> (N, C)."""
        return features


def _linear(
    inputs: int, outputs: int, second_moment: float, std: float, generator: torch.Generator
) -> nn.Linear:
    """A layer whose output has this spread when its inputs have this second moment."""
    layer = nn.Linear(inputs, outputs)
    spread = std / math.sqrt(inputs * second_moment)
    nn.init.normal_(layer.weight, std=spread, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


PROJECTORS: dict[str, Callable[..., Projector]] = {
    "linear": Linear,
    "mlp": Mlp,
    "identity": Identity,
}
POOLS: dict[str, type[Pool]] = {"keep": KeepGrid, "grid": GridPool}


def create_projector(
    name: str,
    inputs: int,
    outputs: int,
    *,
    embedding_std: float,
    generator: torch.Generator,
    **options: Any,
) -> Projector:
    """A projector by name.

    Args:
        inputs: The encoder's width.
        outputs: The language model's hidden size.
        embedding_std: The standard deviation of the language model's embedding table.
        generator: A CPU generator; the only source of the initial weights.
        options: Of the projector itself.

    Raises:
        UnknownNameError: no projector has this name.
        ConfigError: it does not take these options.
    """
    if name not in PROJECTORS:
        raise UnknownNameError("projector", name, PROJECTORS)
    make = PROJECTORS[name]
    known = inspect.signature(make).parameters
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of projector {name!r}", option, list(known)[4:])
    return make(inputs, outputs, embedding_std, generator, **options)


def create_pool(name: str, **options: Any) -> Pool:
    """A pool by name: `create_pool("grid", height=3, width=3)`.

    Raises:
        UnknownNameError: no pool has this name.
        ConfigError: it does not take these options.
    """
    if name not in POOLS:
        raise UnknownNameError("pool", name, POOLS)
    try:
        return POOLS[name](**options)
    except TypeError as error:
        raise ConfigError(f"pool {name!r} does not take {options}: {error}") from error

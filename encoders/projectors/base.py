"""What every projector is, and how its layers are drawn.

Shape letters: N positions before, M after, C channels.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from plait.encoders.base import Grid, Shape
from plait.errors import ConfigError


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


def drawn_linear(
    inputs: int, outputs: int, second_moment: float, std: float, generator: torch.Generator
) -> nn.Linear:
    """A layer whose output has this spread when its inputs have this second moment."""
    layer = nn.Linear(inputs, outputs)
    spread = std / math.sqrt(inputs * second_moment)
    nn.init.normal_(layer.weight, std=spread, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def check_count(projector: str, name: str, value: int) -> None:
    """
    Raises:
        ConfigError: an option that counts something is not a whole number of at least 1.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f"{name} of projector {projector!r} is a whole number of at least 1; got {value!r}"
        )

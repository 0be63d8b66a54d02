"""Projectors that map each position by itself.

Shape letters: N positions, C channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.encoders.base import Grid
from plait.encoders.projectors.base import Projector, drawn_linear
from plait.errors import ConfigError

_GELU_SECOND_MOMENT = 0.4252
"""E[gelu(z)^2] for standard normal z: what the second layer of `Mlp` reads at the start."""


class Linear(Projector):
    """One affine map; features of unit variance come out with the spread of word embeddings."""

    def __init__(
        self, inputs: int, outputs: int, embedding_std: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.linear = drawn_linear(inputs, outputs, 1.0, embedding_std, generator)

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
        self.widen = drawn_linear(inputs, outputs, 1.0, 1.0, generator)
        self.out = drawn_linear(outputs, outputs, _GELU_SECOND_MOMENT, embedding_std, generator)

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

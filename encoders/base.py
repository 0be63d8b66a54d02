"""What every encoder is: a tower that reads one medium and returns a grid of features.

Shape letters: N positions of one item, C channels.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from plait.stream import Encoded
from plait.stream.types import bytes_of

Grid = tuple[int, int, int]
"""(time, height, width) in positions."""


class Shape(NamedTuple):
    """The grid of an item, and when each of its time rows begins, for media that have time."""

    grid: Grid
    seconds: tuple[float, ...] = ()


Inputs = Mapping[str, Tensor]
"""What `process` made of one item."""


def weights_folder(weights: str | Path) -> Path:
    """The local folder of some weights: a folder, or a name that `weights.resolve` knows.

    Raises:
        PlaitError: as `resolve`.
    """
    if Path(weights).is_dir():
        return Path(weights)
    from plait.encoders.weights import resolve

    return Path(resolve(str(weights)))


class Encoder(nn.Module, ABC):
    """A tower for one medium. A subclass sets `width` and writes the four abstract methods;
    one that reads sound or film also `seconds` and `wanted`.

    The positions of one item are its grid in row-major order. `bidirectional` says that the
    language model reads them in both directions, as one group.
    """

    medium: ClassVar[str]
    name: str
    width: int
    """Channels of the features."""
    bidirectional: bool = False

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.trainable = False

    @abstractmethod
    def plan(self, header: Any) -> Grid:
        """The grid that `forward` will return, from the facts of a media part's header alone.

        Raises:
            MediaError: this encoder cannot read such an item.
        """

    def seconds(self, header: Any, grid: Grid) -> tuple[float, ...]:  # noqa: ARG002
        """When each time row of `plan`'s grid begins; () for media without time."""
        return ()

    def wanted(self, header: Any) -> Any:  # noqa: ARG002
        """What decoding is asked for: an `AudioRequest`, a `FrameSampling`; None for pictures."""
        return None

    @abstractmethod
    def process(self, media: Any) -> dict[str, Tensor]:
        """CPU tensors of one decoded item, without a batch dimension; thread-safe.

        A picture is uint8 (H, W, 3), a sound float32 (samples,), a film `plait.modalities.Frames`.
        """

    @abstractmethod
    def forward(self, inputs: Sequence[Inputs]) -> list[Encoded]:
        """Features (N, C) of each item, on the tower's device.

        Items may be of unequal sizes; each result equals that of the item encoded alone.
        """

    @abstractmethod
    def processing(self) -> str:
        """Every setting of `process` that changes its result, as a stable string."""

    @property
    def device(self) -> torch.device:
        """Where the tower is; the CPU for one without parameters."""
        first = next(self.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """What the tower computes in; float32 for one without parameters."""
        first = next(self.parameters(), None)
        return torch.float32 if first is None else first.dtype

    def set_trainable(self, trainable: bool) -> Self:
        """Train the tower, or freeze it: no gradients, and in eval mode whatever is asked.

        What trains is kept in float32: small steps would vanish in a narrower dtype.
        """
        self.trainable = trainable
        self.requires_grad_(trainable)
        if trainable:
            self.float()
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As in torch, except that a frozen tower and every BatchNorm stay in eval mode.

        The running statistics of a BatchNorm come from millions of pictures; batches of packed
        fine-tuning data would ruin them, and make items depend on their neighbours.
        """
        super().train(mode and self.trainable)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.training = False
        return self

    def fingerprint(self) -> str:
        """SHA-256 of the weights, their dtype and the processing: reads every weight."""
        digest = hashlib.sha256(f"{type(self).__qualname__}\n{self.processing()}\n".encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(bytes_of(tensor))
        return digest.hexdigest()

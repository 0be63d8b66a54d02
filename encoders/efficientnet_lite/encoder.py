"""EfficientNet-Lite0 as an encoder: 224 x 224 pictures to 49 features of 1280 channels."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from plait.encoders.base import Encoder, Grid, Inputs, weights_folder
from plait.encoders.efficientnet_lite.model import WIDTH, EfficientNetLite0
from plait.errors import ConfigError
from plait.modalities import ImageHeader
from plait.stream import Encoded

ARCHITECTURE = "efficientnet_lite0"
SIZE = 224
GRID: Grid = (1, SIZE // 32, SIZE // 32)


class EfficientNetLite(Encoder):
    """Frozen or trained EfficientNet-Lite0; every picture takes a grid of 7 x 7 features.

    Args:
        weights: A folder with `model.safetensors` and `config.json`, or any name that
            `plait.encoders.weights.resolve` knows.

    Raises:
        ConfigError: the folder does not hold these weights.
    """

    medium = "image"
    width = WIDTH

    def __init__(self, weights: str | Path, name: str = "efficientnet_lite") -> None:
        super().__init__(name)
        model = EfficientNetLite0()
        _load_weights(model, weights_folder(weights))
        # Convolutions on a CPU run 1.7 times as fast with the channels innermost.
        self.model = model.to(memory_format=torch.channels_last)

    def plan(self, header: ImageHeader) -> Grid:  # noqa: ARG002  (every picture takes the same)
        return GRID

    def process(self, array: NDArray[np.uint8]) -> dict[str, Tensor]:
        """Fit (H, W, 3) into 224 x 224 on white; kept as bytes, a quarter of the floats' size.

        Nothing is cropped, because a caption may speak of the edge, and nothing is stretched,
        because a shape tells the class. White is what transparent pictures already stand on.
        """
        picture = torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)
        scale = SIZE / max(picture.shape[1:])
        height, width = (max(1, round(side * scale)) for side in picture.shape[1:])
        fitted = tv.resize(
            picture, [height, width], interpolation=InterpolationMode.BILINEAR, antialias=True
        )
        square = torch.full((3, SIZE, SIZE), 255, dtype=torch.uint8)
        top, left = (SIZE - height) // 2, (SIZE - width) // 2
        square[:, top : top + height, left : left + width] = fitted
        return {"pixels": square}

    def forward(self, inputs: Sequence[Inputs]) -> list[Encoded]:
        pixels = torch.stack([item["pixels"] for item in inputs]).to(self.device)
        scaled = (pixels.to(self.dtype) - 127) / 128  # the range the weights were trained with
        maps = self.model(scaled.contiguous(memory_format=torch.channels_last))
        return [Encoded(embeddings, grid=GRID) for embeddings in maps.flatten(2).transpose(1, 2)]

    def processing(self) -> str:
        return f"fit {SIZE} on white, bilinear antialias, (x - 127) / 128"


def _load_weights(model: EfficientNetLite0, folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state = load_file(folder / "model.safetensors")
        model.load_state_dict(state)
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise ConfigError(
            "encoder 'efficientnet_lite' needs a folder with the config.json and "
            f"model.safetensors that `plait fetch` makes; {str(folder)!r} is not one: {error}"
        ) from error
    if config.get("architecture") != ARCHITECTURE:
        raise ConfigError(
            f"encoder 'efficientnet_lite' needs a config.json with architecture {ARCHITECTURE!r}; "
            f"that of {str(folder)!r} has {config.get('architecture')!r}"
        )

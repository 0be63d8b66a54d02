"""Any CLIP, SigLIP, SigLIP2, DINOv2 or ViT checkpoint as an encoder.

Shape letters: B items, P patches of an item, D values of a patch, C channels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from plait.encoders.attention import EVERYTHING, attending, stretches
from plait.encoders.base import Encoder, Grid, Inputs, weights_folder
from plait.encoders.hf_vision.model import load_tower
from plait.encoders.hf_vision.sizes import check_plannable, processed_size
from plait.errors import MediaError, UnknownNameError
from plait.modalities import ImageHeader
from plait.stream import Encoded

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class HfVision(Encoder):
    """The patches of a transformers vision tower; class tokens and registers are dropped.

    Args:
        weights: A checkpoint folder, or a hub id or other name that
            `plait.encoders.weights.resolve` knows. Only its vision tower is kept in memory.
        layer: -1 is the tower's output with its final norm, where it has one; -2 what enters its
            last layer, without the norm, as LLaVA takes it. Later layers are not loaded.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        ConfigError: the weights, the layer or the image processor cannot be used.
    """

    medium = "image"

    def __init__(
        self,
        weights: str | Path,
        layer: int = -1,
        dtype: str = "float32",
        name: str = "hf_vision",
    ) -> None:
        super().__init__(name)
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise UnknownNameError("dtype", dtype, DTYPES)
        tower = load_tower(weights_folder(weights), layer, DTYPES[dtype])
        check_plannable(tower.processor)
        self.model, self.processor = tower.model, tower.processor
        self.family, self.extra_tokens = tower.family, tower.extra_tokens
        self.layer = layer
        self.width = int(tower.config.hidden_size)
        self.patch_size = _pair(tower.config.patch_size)
        self.by_patches = hasattr(tower.processor, "max_num_patches")
        trained = getattr(tower.config, "image_size", None)
        self.trained_size = None if trained is None else _pair(trained)

    def plan(self, header: ImageHeader) -> Grid:
        height, width = processed_size(self.processor, header.height, header.width)
        rows, columns = height // self.patch_size[0], width // self.patch_size[1]
        if not rows or not columns:
            raise MediaError(
                f"a picture must hold at least one patch of {self.patch_size} pixels; it is "
                f"processed to {width} x {height}; use a larger one"
            )
        return 1, rows, columns

    def process(self, array: NDArray[np.uint8]) -> dict[str, Tensor]:
        made = self.processor(
            images=[array], input_data_format="channels_last", return_tensors="pt"
        )
        if not self.by_patches:
            return {"pixels": made["pixel_values"][0]}
        shape = made["spatial_shapes"][0]
        # The processor pads to the most patches; the batch's own longest item will do.
        return {"patches": made["pixel_values"][0, : int(shape.prod())], "shape": shape}

    def forward(self, inputs: Sequence[Inputs]) -> list[Encoded]:
        if self.by_patches:
            return self._encode_patches(inputs)
        results: dict[int, Encoded] = {}
        by_size: dict[tuple[int, ...], list[int]] = {}
        for number, item in enumerate(inputs):
            by_size.setdefault(tuple(item["pixels"].shape), []).append(number)
        for numbers in by_size.values():
            pixels = torch.stack([inputs[number]["pixels"] for number in numbers])
            encoded = self._encode_pixels(pixels.to(self.device, self.dtype))
            results.update(zip(numbers, encoded, strict=True))
        return [results[number] for number in range(len(inputs))]

    def _encode_pixels(self, pixels: Tensor) -> list[Encoded]:
        """(B, 3, H, W) -> B items."""
        height, width = pixels.shape[-2:]
        options = {}
        if self.family.resizes and (height, width) != self.trained_size:
            options["interpolate_pos_encoding"] = True
        with attending(EVERYTHING):
            hidden = self.model(pixel_values=pixels, **options).last_hidden_state
        grid = (1, height // self.patch_size[0], width // self.patch_size[1])
        return [Encoded(item, grid=grid) for item in hidden[:, self.extra_tokens :]]

    def _encode_patches(self, inputs: Sequence[Inputs]) -> list[Encoded]:
        """Items of (P, D) patches, padded to the longest; each sees itself."""
        patches = pad_sequence([item["patches"] for item in inputs], batch_first=True)
        lengths = [len(item["patches"]) for item in inputs]
        longest = patches.shape[1]
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        shapes = torch.stack([item["shape"] for item in inputs])
        with attending(stretches(lengths, longest, self.device)):
            hidden = self.model(
                pixel_values=patches.to(self.device, self.dtype),
                pixel_attention_mask=mask.to(self.device),
                spatial_shapes=shapes.to(self.device),
            ).last_hidden_state
        return [
            Encoded(item[:length], grid=(1, rows, columns))
            for item, length, (rows, columns) in zip(hidden, lengths, shapes.tolist(), strict=True)
        ]

    def processing(self) -> str:
        return f"layer {self.layer}\n{self.processor.to_json_string()}"


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width

"""Qwen3-VL's own tower: pictures of any size, features for deeper layers of its language model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from plait.encoders import attention
from plait.encoders.attention import EVERYTHING, attending
from plait.encoders.base import Encoder, Grid, Inputs
from plait.errors import MediaError
from plait.modalities import ImageHeader
from plait.stream import Encoded


class Qwen3VLVision(Encoder):
    """Wraps the tower of a loaded model, so that its weights are held once; it then attends here.

    The embeddings already are the language model's: use the projector "identity" and the pool
    "keep". `layers` holds the deepstack features, in the order of the language model's layers.

    Args:
        tower: A transformers `Qwen3VLVisionModel`, as `model.model.visual`.
        processor: The checkpoint's image processor (Qwen2VLImageProcessor).
    """

    medium = "image"

    def __init__(self, tower: Any, processor: Any, name: str = "qwen3_vl") -> None:
        super().__init__(name)
        attention.register()
        tower.set_attn_implementation(attention.NAME)
        self.tower = tower
        self.processor = processor
        config: Any = tower.config
        self.width = int(config.out_hidden_size)
        self.merge = int(config.spatial_merge_size)

    def plan(self, header: ImageHeader) -> Grid:
        cell = self.processor.patch_size * self.merge
        try:
            height, width = smart_resize(
                header.height,
                header.width,
                factor=cell,
                min_pixels=self.processor.size["shortest_edge"],
                max_pixels=self.processor.size["longest_edge"],
            )
        except ValueError as error:
            raise MediaError(
                f"Qwen3-VL cannot read a picture of {header.width} x {header.height}: {error}; "
                "crop it"
            ) from error
        return 1, height // cell, width // cell

    def process(self, array: NDArray[np.uint8]) -> dict[str, Tensor]:
        made = self.processor(
            images=[array], input_data_format="channels_last", return_tensors="pt"
        )
        return {"patches": made["pixel_values"], "grid": made["image_grid_thw"][0]}

    def forward(self, inputs: Sequence[Inputs]) -> list[Encoded]:
        patches = torch.cat([item["patches"] for item in inputs]).to(self.device, self.dtype)
        grids = torch.stack([item["grid"] for item in inputs]).to(self.device)
        with attending(EVERYTHING):  # it calls attention item by item
            out = self.tower(patches, grid_thw=grids, return_dict=True)
        cells = [(t, h // self.merge, w // self.merge) for t, h, w in grids.tolist()]
        lengths = [t * h * w for t, h, w in cells]
        embeddings = out.pooler_output.split(lengths)
        layers = [feature.split(lengths) for feature in out.deepstack_features]
        return [
            Encoded(embeddings[number], tuple(layer[number] for layer in layers), cell)
            for number, cell in enumerate(cells)
        ]

    def processing(self) -> str:
        return str(self.processor.to_json_string())

"""Patches of a picture's pixels as features: whatever is learned is learned by the projector.

Shape letters: H rows, W columns of pixels, N patches.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plait.encoders.base import Encoder, Grid, Inputs
from plait.encoders.pixels import PLACES, check_sizes, cubes, fitted, patches_of, places
from plait.modalities import ImageHeader
from plait.stream import Encoded


class Patches(Encoder):
    """Patches of `patch` x `patch` pixels, flattened, with their row and column; no parameters.

    Args:
        patch: Pixels of a patch's side.
        max_side: Pixels of the longer side, a whole number of patches; a larger picture is made
            smaller. Both sides become whole patches, at least one.

    Raises:
        ConfigError: a number is out of range.
    """

    medium = "image"

    def __init__(self, patch: int = 16, max_side: int = 224, name: str = "patches") -> None:
        super().__init__(name)
        check_sizes(patch, max_side)
        self.patch, self.max_side = patch, max_side
        self.width = patch * patch * 3 + 2 * PLACES

    def plan(self, header: ImageHeader) -> Grid:
        return 1, *patches_of(header.height, header.width, self.patch, self.max_side)

    def process(self, array: NDArray[np.uint8]) -> dict[str, Tensor]:
        """(H, W, 3) -> (N, width)."""
        height, width = array.shape[:2]
        rows, columns = patches_of(height, width, self.patch, self.max_side)
        picture = torch.from_numpy(np.ascontiguousarray(array))[None]
        pixels = cubes(fitted(picture, rows, columns, self.patch), 1, self.patch)
        grid = (1, rows, columns)
        return {
            "patches": torch.cat([pixels, places(grid, 2)], dim=1),
            "grid": torch.tensor(grid),
        }

    def forward(self, inputs: Sequence[Inputs]) -> list[Encoded]:
        made = []
        for item in inputs:
            time, height, width = item["grid"].tolist()
            made.append(Encoded(item["patches"], (), (time, height, width)))
        return made

    def processing(self) -> str:
        return f"patches of {self.patch}, longer side at most {self.max_side}, x / 127.5 - 1"

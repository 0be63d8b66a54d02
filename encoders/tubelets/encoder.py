"""Cubes of a film's pixels as features: whatever is learned is learned by the projector.

Shape letters: F frames, H rows, W columns of pixels, N cubes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from plait.encoders.base import Encoder, Grid, Inputs
from plait.encoders.pixels import PLACES, check_sizes, cubes, fitted, patches_of, places
from plait.modalities import Frames, FrameSampling, VideoHeader
from plait.ranges import check_number
from plait.stream import Encoded


class Tubelets(Encoder):
    """Cubes of `frames` x `patch` x `patch` pixels, flattened, with their place; no parameters.

    The last cubes of a film are filled up with its last frame.

    Args:
        frames: Frames of a cube.
        patch: Pixels of a cube's side.
        max_side: Pixels of the longer side, a whole number of patches; a larger film is made
            smaller. Both sides become whole patches, at least one.
        fps, max_frames, count: Which frames are read, as `FrameSampling`; a sample's own sampling
            comes first.

    Raises:
        ConfigError: a number is out of range.
    """

    medium = "video"

    def __init__(
        self,
        frames: int = 2,
        patch: int = 16,
        max_side: int = 112,
        fps: float | None = 2.0,
        max_frames: int | None = 32,
        count: int | None = None,
        name: str = "tubelets",
    ) -> None:
        super().__init__(name)
        check_number("frames", frames, "[1, 64]", whole=True)
        check_sizes(patch, max_side)
        self.frames, self.patch, self.max_side = frames, patch, max_side
        self.sampling = FrameSampling(fps=fps, max_frames=max_frames, count=count)
        self.width = frames * patch * patch * 3 + 3 * PLACES

    def wanted(self, header: VideoHeader) -> FrameSampling:
        return header.sampling or self.sampling

    def plan(self, header: VideoHeader) -> Grid:
        count = len(self.wanted(header).times(header.seconds))
        return self._grid(count, header.height, header.width)

    def seconds(self, header: VideoHeader, grid: Grid) -> tuple[float, ...]:  # noqa: ARG002
        return self.wanted(header).times(header.seconds)[:: self.frames]

    def process(self, film: Frames) -> dict[str, Tensor]:
        """(F, H, W, 3) -> (N, width)."""
        grid = self._grid(*film.pixels.shape[:3])
        pixels = fitted(
            torch.from_numpy(np.ascontiguousarray(film.pixels)), grid[1], grid[2], self.patch
        )
        missing = grid[0] * self.frames - len(pixels)
        filled = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
        flat = cubes(filled, self.frames, self.patch)
        return {
            "cubes": torch.cat([flat, places(grid, 3)], dim=1),
            "grid": torch.tensor(grid),
            "seconds": torch.tensor(film.seconds)[:: self.frames],
        }

    def forward(self, inputs: Sequence[Inputs]) -> list[Encoded]:
        made = []
        for item in inputs:
            time, height, width = item["grid"].tolist()
            seconds = tuple(item["seconds"].tolist())
            made.append(Encoded(item["cubes"], (), (time, height, width), seconds))
        return made

    def processing(self) -> str:
        return (
            f"cubes of {self.frames} x {self.patch} x {self.patch}, longer side at most "
            f"{self.max_side}, x / 127.5 - 1"
        )

    def _grid(self, count: int, height: int, width: int) -> Grid:
        return -(-count // self.frames), *patches_of(height, width, self.patch, self.max_side)

"""VideoMAE checkpoints as encoders of films.

Shape letters: B films, F frames, H rows, W columns, N positions.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from plait.encoders.attention import EVERYTHING, attending
from plait.encoders.base import Encoder, Grid, Inputs, weights_folder
from plait.encoders.hf_video.model import load_tower
from plait.encoders.hf_vision.encoder import DTYPES
from plait.encoders.hf_vision.sizes import processed_size
from plait.errors import MediaError, UnknownNameError
from plait.modalities import Frames, FrameSampling, VideoHeader
from plait.stream import Encoded


class HfVideo(Encoder):
    """The tubelets of a VideoMAE tower, which reads one fixed number of frames of every film.

    A film's frames are taken uniformly; where it has fewer, some are read twice.

    Args:
        weights: A checkpoint folder, or a name that `plait.encoders.weights.resolve` knows.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        ConfigError: the weights or the processor cannot be used.
    """

    medium = "video"

    def __init__(self, weights: str | Path, dtype: str = "float32", name: str = "hf_video") -> None:
        super().__init__(name)
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise UnknownNameError("dtype", dtype, DTYPES)
        tower = load_tower(weights_folder(weights), DTYPES[dtype])
        self.model, self.processor, self.width = tower.model, tower.processor, tower.width
        self.frames, self.tubelet = tower.frames, tower.tubelet
        self.grid: Grid = (
            tower.frames // tower.tubelet,
            tower.image[0] // tower.patch[0],
            tower.image[1] // tower.patch[1],
        )

    def wanted(self, header: VideoHeader) -> FrameSampling:
        return header.sampling or FrameSampling(count=self.frames)

    def plan(self, header: VideoHeader) -> Grid:
        """
        Raises:
            MediaError: the sample's own sampling asks for another number of frames.
        """
        count = len(self.wanted(header).times(header.seconds))
        if count != self.frames:
            raise MediaError(
                f"encoder {self.name!r} reads {self.frames} frames of a film; the sample's "
                f"sampling asks for {count}: leave it out, or set its count to {self.frames}"
            )
        processed_size(self.processor, header.height, header.width)  # refuses thin strips
        return self.grid

    def seconds(self, header: VideoHeader, grid: Grid) -> tuple[float, ...]:  # noqa: ARG002
        times = self.wanted(header).times(header.seconds)
        return times[:: self.tubelet][: self.grid[0]]

    def process(self, film: Frames) -> dict[str, Tensor]:
        """(F, 3, H, W) pixels as the checkpoint's own processor makes them."""
        made = self.processor(
            [list(film.pixels)], input_data_format="channels_last", return_tensors="pt"
        )
        begins = torch.tensor(film.seconds)[:: self.tubelet][: self.grid[0]]
        return {"pixels": made["pixel_values"][0], "seconds": begins}

    def forward(self, inputs: Sequence[Inputs]) -> list[Encoded]:
        pixels = torch.stack([item["pixels"] for item in inputs]).to(self.device, self.dtype)
        with attending(EVERYTHING):
            hidden = self.model(pixel_values=pixels).last_hidden_state
        return [
            Encoded(rows, (), self.grid, tuple(item["seconds"].tolist()))
            for rows, item in zip(hidden, inputs, strict=True)
        ]

    def processing(self) -> str:
        return f"{self.frames} frames\n{self.processor.to_json_string()}"

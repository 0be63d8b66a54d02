"""Any image encoder over the frames of a film.

Shape letters: F frames, H rows, W columns, C channels.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor

from plait.encoders.base import Encoder, Grid, Inputs
from plait.errors import ConfigError, MediaError
from plait.modalities import Frames, FrameSampling, ImageHeader, VideoHeader
from plait.stream import Encoded

_AT_ONCE = 32
"""Frames that the image encoder reads together: a long film must not take the whole memory."""

_SECONDS = "frame seconds"
"""Among what the image encoder reads of each frame: when it begins."""


class VideoFrames(Encoder):
    """The image encoder's features of each frame; a film's grid is (frames, height, width).

    Args:
        image: The name of a registered image encoder.
        weights: Its weights, where it needs some.
        image_options: Its other keyword arguments.
        fps, max_frames, count: Which frames are read, as `FrameSampling`; a sample's own sampling
            comes first.

    Raises:
        ConfigError: the encoder reads something else than pictures, or the sampling is unusable.
        UnknownNameError: no encoder has this name, or it takes no such option.
    """

    medium = "video"

    def __init__(
        self,
        image: str,
        weights: str | None = None,
        image_options: Mapping[str, Any] | None = None,
        fps: float | None = 1.0,
        max_frames: int | None = 64,
        count: int | None = None,
        name: str = "video",
    ) -> None:
        from plait.encoders.registry import create

        super().__init__(name)
        given = dict(image_options or {}) | ({} if weights is None else {"weights": weights})
        self.image = create(image, **given)
        if self.image.medium != "image":
            raise ConfigError(
                "encoder 'video' needs an encoder of pictures for its frames; "
                f"{image!r} reads {self.image.medium}"
            )
        self.sampling = FrameSampling(fps=fps, max_frames=max_frames, count=count)
        self.width, self.bidirectional = self.image.width, self.image.bidirectional

    def set_trainable(self, trainable: bool) -> Self:
        """As for every encoder; the image encoder keeps its modes by the same switch."""
        self.image.set_trainable(trainable)
        return super().set_trainable(trainable)

    def wanted(self, header: VideoHeader) -> FrameSampling:
        return header.sampling or self.sampling

    def plan(self, header: VideoHeader) -> Grid:
        time, height, width = self.image.plan(_picture(header))
        if time != 1:
            raise MediaError(
                f"a frame must be one time row; image encoder {self.image.name!r} plans {time}"
            )
        return len(self.wanted(header).times(header.seconds)), height, width

    def seconds(self, header: VideoHeader, grid: Grid) -> tuple[float, ...]:  # noqa: ARG002
        return self.wanted(header).times(header.seconds)

    def process(self, film: Frames) -> dict[str, Tensor]:
        """What the image encoder makes of each frame, stacked: each entry is (F, ...)."""
        frames = [self.image.process(pixels) for pixels in film.pixels]
        made = {name: torch.stack([frame[name] for frame in frames]) for name in frames[0]}
        return made | {_SECONDS: torch.tensor(film.seconds)}

    def forward(self, inputs: Sequence[Inputs]) -> list[Encoded]:
        frames = [
            {name: rows[number] for name, rows in item.items() if name != _SECONDS}
            for item in inputs
            for number in range(len(item[_SECONDS]))
        ]
        encoded: list[Encoded] = []
        for first in range(0, len(frames), _AT_ONCE):
            encoded += self.image(frames[first : first + _AT_ONCE])
        rest = iter(encoded)
        times = [item[_SECONDS].tolist() for item in inputs]
        return [_joined(list(islice(rest, len(begins))), begins) for begins in times]

    def processing(self) -> str:
        return f"frames, each: {type(self.image).__qualname__}\n{self.image.processing()}"


def _picture(header: VideoHeader) -> ImageHeader:
    """A frame's facts as those of a picture."""
    return ImageHeader(header.width, header.height, header.format, "RGB", header.bytes)


def _joined(frames: Sequence[Encoded], seconds: Sequence[float]) -> Encoded:
    """Frames of one size as one film."""
    layers = zip(*(frame.layers for frame in frames), strict=True)
    return Encoded(
        torch.cat([frame.embeddings for frame in frames]),
        tuple(torch.cat(layer) for layer in layers),
        (len(frames), *frames[0].grid[1:]),
        tuple(seconds),
    )

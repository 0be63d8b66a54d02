"""Media parts as bytes, on their way to a server."""

import io
from typing import Any

import numpy as np
from PIL import Image as PILImage

from plait.errors import ConfigError
from plait.modalities import Audio, Image, MediaPart, Video
from plait.modalities.sources import STORED, read_stored


def file_of(part: MediaPart) -> bytes:
    """The file's bytes; pictures in memory become PNG.

    Raises:
        ConfigError: a sound or a film that is no file.
    """
    source: Any = part.source  # type: ignore[attr-defined]
    if isinstance(source, STORED):
        return read_stored(source)
    if isinstance(part, Image):
        picture = PILImage.fromarray(part.decode()) if isinstance(source, np.ndarray) else source
        written = io.BytesIO()
        picture.save(written, "PNG")
        return written.getvalue()
    raise ConfigError(f"a {part.medium} in memory cannot be sent: write it to a file first")


def options_of(part: MediaPart) -> dict[str, Any]:
    """What is said of the file: which stretch, which frames, with what sound."""
    said: dict[str, Any] = {}
    if isinstance(part, Audio | Video):
        if part.start:
            said["start"] = part.start
        if part.end is not None:
            said["end"] = part.end
    if isinstance(part, Video):
        if part.sound is not None:
            said["sound"] = part.sound
        if part.sampling is not None:
            wish = part.sampling
            said["sampling"] = {"fps": wish.fps, "max_frames": wish.max_frames, "count": wish.count}
    return said

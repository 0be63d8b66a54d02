"""How large a media file may be, and how long one may take, before it is refused."""

from dataclasses import dataclass, fields

import PIL.Image

from plait.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds that protect the machine; all but the last are checked before anything is decoded.

    Raises:
        ConfigError: a bound is below 1, or above the one that Pillow itself keeps.
    """

    max_image_pixels: int = 64_000_000
    """Width times height. 64 million pixels decode to 192 MB; a 61-megapixel camera passes."""

    max_image_bytes: int = 64 * 1024 * 1024
    """Bytes of the file; an in-memory picture counts its pixels' bytes."""

    max_audio_seconds: float = 3600.0
    """Of a sound after its cut. An hour at 48 kHz decodes to 690 MB of float32."""

    max_audio_samples: int = 200_000_000
    """In one channel at the file's own rate: 800 MB of float32, more than an hour at 48 kHz."""

    max_audio_bytes: int = 1024 * 1024 * 1024
    """Bytes of a sound's file, or of the film that it is in."""

    max_video_seconds: float = 4 * 3600.0
    """Of a film after its cut."""

    max_video_bytes: int = 8 * 1024 * 1024 * 1024
    """Bytes of a film's file; only what is asked for is read."""

    max_video_pixels: int = 9_000_000
    """Width times height of a frame: 4096 x 2160 passes."""

    max_video_frames: int = 512
    """Frames that are read of one film."""

    max_video_memory: int = 2 * 1024 * 1024 * 1024
    """Bytes of all frames that are read of one film, at 3 a pixel."""

    max_decode_seconds: float = 60.0
    """Wall clock of one decoding, in a process that can be stopped."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            low = 0.001 if name.endswith("seconds") else 1
            if not value >= low:
                raise ConfigError(f"{name} must be at least {low}; it is {value}")
        # Pillow refuses twice its own bound as a bomb, whatever is allowed here.
        pillow = 2 * PIL.Image.MAX_IMAGE_PIXELS if PIL.Image.MAX_IMAGE_PIXELS else None
        if pillow is not None and self.max_image_pixels > pillow:
            raise ConfigError(
                f"max_image_pixels must be at most {pillow:,}, above which Pillow refuses every "
                f"picture; it is {self.max_image_pixels:,}; lower it or shrink the pictures"
            )

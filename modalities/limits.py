"""How large a media file may be before it is refused."""

from dataclasses import dataclass, fields

import PIL.Image

from plait.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds that are checked before anything is decoded.

    Raises:
        ConfigError: a bound is below 1, or above the one that Pillow itself keeps.
    """

    max_image_pixels: int = 64_000_000
    """Width times height. 64 million pixels decode to 192 MB; a 61-megapixel camera passes."""

    max_image_bytes: int = 64 * 1024 * 1024
    """Bytes of the file; an in-memory picture counts its pixels' bytes."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} must be at least 1; it is {value}")
        # Pillow refuses twice its own bound as a bomb, whatever is allowed here.
        pillow = 2 * PIL.Image.MAX_IMAGE_PIXELS if PIL.Image.MAX_IMAGE_PIXELS else None
        if pillow is not None and self.max_image_pixels > pillow:
            raise ConfigError(
                f"max_image_pixels must be at most {pillow:,}, above which Pillow refuses every "
                f"picture; it is {self.max_image_pixels:,}; lower it or shrink the pictures"
            )

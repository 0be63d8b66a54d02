"""From what a picture file holds to uint8 (H, W, 3) on white. H rows, W columns."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from plait.errors import MediaError

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Turn:
    """What makes a picture upright; `swaps` says that width and height change places."""

    apply: Callable[[Pixels], Pixels]
    swaps: bool

    def __call__(self, pixels: Pixels) -> Pixels:
        return self.apply(pixels)


UPRIGHT = {
    2: Turn(lambda p: p[:, ::-1], swaps=False),
    3: Turn(lambda p: p[::-1, ::-1], swaps=False),
    4: Turn(lambda p: p[::-1], swaps=False),
    5: Turn(lambda p: p.transpose(1, 0, 2), swaps=True),
    6: Turn(lambda p: p.transpose(1, 0, 2)[:, ::-1], swaps=True),
    7: Turn(lambda p: p[::-1, ::-1].transpose(1, 0, 2), swaps=True),
    8: Turn(lambda p: p.transpose(1, 0, 2)[::-1], swaps=True),
}
"""By EXIF orientation (CIPA DC-008, tag 274); 1 is upright."""


def to_rgb(picture: PIL.Image.Image) -> Pixels:
    """The picture's pixels as they are stored, transparency laid on white.

    Raises:
        MediaError: the values have no one meaning as colours.
    """
    if picture.mode.startswith("I;16"):
        return _grey_to_rgb(_from_16_bit(picture))
    if picture.mode == "I":
        return _grey_to_rgb(_from_32_bit(picture))
    if picture.mode == "F":
        return _grey_to_rgb(_from_float(picture))
    if picture.has_transparency_data:
        return _on_white(picture)
    return np.asarray(picture.convert("RGB"))


def _on_white(picture: PIL.Image.Image) -> Pixels:
    straight = picture.convert({"La": "LA", "RGBa": "RGBA"}.get(picture.mode, picture.mode))
    coloured = straight.convert("RGBA")
    page = PIL.Image.new("RGB", coloured.size, "white")
    page.paste(coloured, mask=coloured.getchannel("A"))
    return np.asarray(page)


def _grey_to_rgb(grey: Pixels) -> Pixels:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _from_16_bit(picture: PIL.Image.Image) -> Pixels:
    """65535 is white: value / 257, rounded. A PNG may name one value that is transparent."""
    values = np.asarray(picture).astype(np.uint32)
    grey = ((values + 128) // 257).astype(np.uint8)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return grey


def _from_32_bit(picture: PIL.Image.Image) -> Pixels:
    """Pillow's mode I: 16-bit values that some readers (PGM, older TIFF) widen to 32 bits."""
    values = np.asarray(picture)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise MediaError(
            f"an integer picture must hold values of 0 to 65535; this one holds {low} to {high}; "
            "save it as 8 or 16 bits"
        )
    return ((values + 128) // 257).astype(np.uint8)


def _from_float(picture: PIL.Image.Image) -> Pixels:
    """Floats of 0 to 1 fill the range; larger ones are taken as 0 to 255."""
    values = np.asarray(picture)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):
        raise MediaError(
            "a float picture must hold values of 0 to 1 or of 0 to 255; this one holds "
            f"{low:g} to {high:g}; save it as 8 or 16 bits"
        )
    grey: Pixels = np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
    return grey

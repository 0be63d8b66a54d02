"""Animated WebP, GIF and PNG: when each picture is shown, and the pictures at given times."""

from collections.abc import Iterator
from io import BytesIO

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from plait.errors import MediaError
from plait.modalities.frames import Facts, Frames
from plait.modalities.limits import Limits
from plait.modalities.pixels import to_rgb
from plait.modalities.sources import Stored, open_stored, read_stored

_FORMATS = ("WEBP", "GIF", "PNG")

_BRIEF, _USUAL = 10, 100
"""Milliseconds: browsers show what asks for 10 or less for 100, and authors rely on it."""

_HEAD = 12


def is_animation(source: Stored) -> bool:
    """Whether the first bytes are those of a GIF, WebP or PNG file."""
    with open_stored(source) as file:
        head = file.read(_HEAD)
    return (
        head[:4] == b"GIF8"
        or head[:8] == b"\x89PNG\r\n\x1a\n"
        or (head[:4] == b"RIFF" and head[8:] == b"WEBP")
    )


def animation_facts(source: Stored, size: int, limits: Limits) -> Facts:
    """What the file's structure says; no picture is decoded.

    Raises:
        MediaError: the pictures are over a limit.
    """
    if size > limits.max_video_memory:
        raise MediaError(
            f"an animation is read whole, so it must fit in {limits.max_video_memory:,} bytes; "
            f"this one has {size:,}; save it as MP4 or raise max_video_memory"
        )
    data = read_stored(source)
    with _opened(data) as picture:
        width, height, form = *picture.size, str(picture.format)
    if not 0 < width * height <= limits.max_video_pixels:
        raise MediaError(
            f"a film's frame must have 1 to {limits.max_video_pixels:,} pixels; this one has "
            f"{width} x {height}; shrink it or raise max_video_pixels"
        )
    shown = durations(data)
    seconds = float(shown.sum())
    return Facts(seconds, width, height, len(shown) / seconds, form, size)


def read_animation(source: Stored, times: NDArray[np.float64], facts: Facts) -> Frames:
    """The pictures shown at `times`, in rising order; each builds on the ones before it.

    Raises:
        MediaError: a picture is missing.
    """
    data = read_stored(source)
    ends = np.cumsum(durations(data))
    # Half a microsecond: a time computed from a picture's own must find that picture.
    wanted = np.minimum(np.searchsorted(ends, times + 5e-7, side="right"), len(ends) - 1)
    pixels = np.empty((len(times), facts.height, facts.width, 3), np.uint8)
    with _opened(data) as picture:
        for at, number in enumerate(wanted):
            if at and number == wanted[at - 1]:
                pixels[at] = pixels[at - 1]
                continue
            picture.seek(int(number))
            shown = to_rgb(picture)
            if shown.shape != pixels.shape[1:]:
                raise MediaError("an animation's pictures must have one size; these have several")
            pixels[at] = shown
    begins = np.concatenate([[0.0], ends[:-1]])[wanted]
    return Frames(pixels, begins)


def durations(data: bytes) -> NDArray[np.float64]:
    """Seconds that each picture is shown, from the file's structure; a still is shown for 0.1 s."""
    walk = {b"G": _gif, b"R": _webp, b"\x89": _png}[data[:1]]
    found = np.array(list(walk(data)) or [0], dtype=np.float64)
    return np.where(found <= _BRIEF, _USUAL, found) / 1000


def _webp(data: bytes) -> Iterator[int]:
    """Milliseconds of each ANMF chunk (RFC 9649, section 2.7.1.1)."""
    at = 12
    while at + 8 <= len(data):
        if data[at : at + 4] == b"ANMF":
            yield int.from_bytes(data[at + 20 : at + 23], "little")
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + length + length % 2


def _png(data: bytes) -> Iterator[float]:
    """Milliseconds of each fcTL chunk (PNG, third edition, section 11.3.6.2)."""
    at = 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"fcTL":
            delay = int.from_bytes(data[at + 28 : at + 30], "big")
            yield 1000 * delay / (int.from_bytes(data[at + 30 : at + 32], "big") or 100)
        at += 12 + length


def _gif(data: bytes) -> Iterator[int]:
    """Milliseconds before each picture (GIF89a, sections 20 and 23)."""
    at = 13 + _colours(data, 10)
    delay = 0
    while at < len(data):
        kind = data[at]
        if kind == 0x21:  # an extension, of which the graphic control tells the delay
            if data[at + 1 : at + 3] == b"\xf9\x04":
                delay = 10 * int.from_bytes(data[at + 4 : at + 6], "little")
            at = _after_blocks(data, at + 2)
        elif kind == 0x2C:
            yield delay
            delay = 0
            at = _after_blocks(data, at + 11 + _colours(data, at + 9))
        elif kind == 0x3B:
            return
        else:
            at += 1


def _colours(data: bytes, at: int) -> int:
    """Bytes of the table of colours that the flags at `at` announce."""
    flags = data[at] if at < len(data) else 0
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _after_blocks(data: bytes, at: int) -> int:
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return at + 1


def _opened(data: bytes) -> PIL.Image.Image:
    try:
        return PIL.Image.open(BytesIO(data), formats=_FORMATS)
    except PIL.UnidentifiedImageError as error:
        raise MediaError(
            "an animated picture must be whole; this one has no header that can be read; replace "
            "the file"
        ) from error

"""Damaged pictures: an array or a MediaError, never a crash. `make fuzz` runs thousands."""

import io
import warnings
from collections import Counter

import numpy as np
import pytest
from PIL import Image as PILImage

from plait.errors import MediaError
from plait.modalities import Image, Limits

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
LIMITS = Limits(max_image_pixels=1_000_000, max_image_bytes=1_000_000)


def originals() -> list[bytes]:
    """The same noisy gradient in every format."""
    generator = np.random.default_rng(0)
    ramp = np.linspace(0, 230, 48, dtype=np.uint8)
    pixels = np.stack([np.tile(ramp, (32, 1))] * 3, axis=-1)
    pixels += generator.integers(0, 25, pixels.shape, dtype=np.uint8)
    files = []
    for name in FORMATS:
        buffer = io.BytesIO()
        PILImage.fromarray(pixels).save(buffer, name)
        files.append(buffer.getvalue())
    return files


def damaged(file: bytes, generator: np.random.Generator) -> bytes:
    """Bytes flipped, numbers blown up, a piece cut out, doubled, or cut off."""
    data = bytearray(file)
    at = int(generator.integers(0, min(len(data), 64 if generator.random() < 0.5 else len(data))))
    kind = generator.integers(0, 5)
    if kind == 0:
        for place in generator.integers(0, len(data), int(generator.integers(1, 9))):
            data[place] = int(generator.integers(0, 256))
    elif kind == 1:
        data[at : at + 4] = b"\xff\xff\xff\x7f"
    elif kind == 2:
        del data[at : at + int(generator.integers(1, 40))]
    elif kind == 3:
        data[at:at] = data[at : at + 40]
    else:
        del data[at:]
    return bytes(data)


def outcomes(count: int) -> Counter[str]:
    """What became of `count` damaged files; any other exception escapes and fails the test."""
    generator, files = np.random.default_rng(7), originals()
    found: Counter[str] = Counter()
    for number in range(count):
        image = Image(damaged(files[number % len(files)], generator))
        try:
            header = image.header(LIMITS)
            pixels = image.decode(LIMITS)
        except MediaError as error:
            assert len(str(error)) < 1000
            found["refused"] += 1
            continue
        assert pixels.shape == (header.height, header.width, 3) and pixels.dtype == np.uint8
        found["decoded"] += 1
    return found


def check(count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what it repairs
        found = outcomes(count)
    print(dict(found))
    assert found.total() == count and min(found["decoded"], found["refused"]) > count // 20


def test_damaged_pictures_are_refused_or_decoded() -> None:
    check(420)


@pytest.mark.fuzz
def test_thousands_of_damaged_pictures_are_refused_or_decoded() -> None:
    check(14_000)

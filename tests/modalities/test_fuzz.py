"""Damaged media: what its header says or a MediaError, never a crash. `make fuzz` runs thousands.

Pictures are read in this process as well; everything goes through processes that can be killed.
"""

import io
import time
import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from plait.datasets.decoding import Decoder
from plait.errors import DecodeTimeoutError, MediaError
from plait.modalities import (
    Audio,
    AudioHeader,
    AudioRequest,
    FrameSampling,
    Image,
    ImageHeader,
    Limits,
    Video,
    VideoHeader,
)

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


SMALL = Limits(
    max_image_pixels=1_000_000,
    max_video_pixels=1_000_000,
    max_audio_seconds=600,
    max_video_seconds=600,
    max_decode_seconds=10,
)
SAMPLING, REQUEST = FrameSampling(count=5), AudioRequest(16_000)


def every_medium(maker: Any) -> list[tuple[type[Any], bytes]]:
    """One small real file of every format, and the part that reads it."""
    pictures = maker.pictures(18, 32, 24)
    track = maker.tone(0.7, 48_000)
    sounds = ["wav", "float.wav", "flac", "mp3", "opus.ogg", "m4a", "aac", "aiff"]
    files: list[tuple[type[Any], bytes]] = [
        (Audio, maker.sound(ending, maker.tone(0.7, maker.sounds[ending][2]))) for ending in sounds
    ]
    for ending in ("mp4", "webm", "mkv", "avi", "ts"):
        sound = None if ending == "avi" else track
        files.append((Video, maker.film(ending, pictures, track=sound)))
    files += [
        (Video, maker.animation(form, pictures, [60] * 18)) for form in ("GIF", "WEBP", "PNG")
    ]
    return files + [(Image, file) for file in originals()]


def fits(header: Any, media: Any) -> bool:
    """Whether decoding gave what the header promised."""
    if isinstance(header, AudioHeader):
        return len(media) == header.samples_at(REQUEST.rate) and bool(np.isfinite(media).all())
    if isinstance(header, VideoHeader):
        return bool(media.pixels.shape == (5, header.height, header.width, 3))
    assert isinstance(header, ImageHeader)
    return bool(media.shape == (header.height, header.width, 3))


def fuzz(maker: Any, count: int) -> Counter[str]:
    """What became of `count` damaged files, by medium and outcome."""
    generator, files = np.random.default_rng(11), every_medium(maker)
    found: Counter[str] = Counter()
    wanted = {Audio: REQUEST, Video: SAMPLING, Image: None}
    with Decoder(2, untrusted=True) as decoder:
        for number in range(count):
            kind, file = files[number % len(files)]
            part = kind(damaged(file, generator))
            try:
                header = decoder.header(part, SMALL)
                media = decoder.decode(part, SMALL, wanted[kind])
            except DecodeTimeoutError:
                outcome = "took too long"
            except MediaError as error:
                assert len(str(error)) < 1000 and "\n" not in str(error)
                outcome = "crashed" if "without a crash" in str(error) else "refused"
            else:
                assert fits(header, media), f"file {number}, {kind.__name__}"
                outcome = "decoded"
            found[f"{kind.medium} {outcome}"] += 1
    return found


def check_media(maker: Any, count: int) -> None:
    began = time.monotonic()
    found = fuzz(maker, count)
    print(f"{dict(sorted(found.items()))} in {time.monotonic() - began:.0f} s")
    assert found.total() == count
    for medium in ("audio", "video", "image"):
        for outcome in ("decoded", "refused"):
            assert found[f"{medium} {outcome}"] > count // 60, (medium, outcome)
    killed = sum(number for name, number in found.items() if name.endswith(("long", "crashed")))
    assert killed <= count // 100


def test_damaged_media_are_refused_or_decoded(maker: Any) -> None:
    check_media(maker, 300)


@pytest.mark.fuzz
def test_thousands_of_damaged_media_are_refused_or_decoded(maker: Any) -> None:
    check_media(maker, 9000)

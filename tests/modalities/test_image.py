"""Pictures: headers without decoding, canonical pixels, and every refusal."""

import hashlib
import pickle
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest

from plait.errors import ConfigError, DataError, MediaError
from plait.modalities import Image, Limits, MediaPart, Text
from plait.modalities.image import FORMATS


def noise(height: int, width: int, channels: int | None = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width) if channels is None else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(picture: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def with_orientation(orientation: int) -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return exif


@contextmanager
def no_decoding() -> Iterator[None]:
    """Make every way in which Pillow decodes a file fail the test."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("a header must not decode")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PIL.ImageFile.ImageFile, "load", fail)
        patch.setattr(PIL.Image, "_getdecoder", fail)
        patch.setattr(PIL.Image.Image, "convert", fail)
        yield


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_header_is_read_without_decoding(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "picture"
    file.write_bytes(saved(PIL.Image.fromarray(noise(7, 13)), kind))
    with no_decoding():
        header = Image(file).header()
        assert Image(file.read_bytes()).header() == header
    assert (header.width, header.height, header.format) == (13, 7, kind)
    assert header.bytes == file.stat().st_size


def test_no_decoding_catches_decoding() -> None:
    data = saved(PIL.Image.fromarray(noise(4, 4)))
    with no_decoding(), pytest.raises(pytest.fail.Exception):
        PIL.Image.open(BytesIO(data)).load()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_turns_header_and_pixels(kind: str, orientation: int) -> None:
    pixels = noise(5, 9)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    exif = with_orientation(orientation)
    image = Image(saved(PIL.Image.fromarray(pixels), kind, exif=exif, **options))
    # What each value means, from the standard: where row 0 and column 0 of the file are seen.
    upright = {
        1: pixels,
        2: np.fliplr(pixels),
        3: np.rot90(pixels, 2),
        4: np.flipud(pixels),
        5: np.swapaxes(pixels, 0, 1),
        6: np.rot90(pixels, -1),
        7: np.rot90(np.swapaxes(pixels, 0, 1), 2),
        8: np.rot90(pixels, 1),
    }[orientation]
    header = image.header()
    assert (header.height, header.width) == upright.shape[:2]
    np.testing.assert_array_equal(image.decode(), upright)


def test_orientation_of_a_png_is_read_without_decoding() -> None:
    image = Image(saved(PIL.Image.new("RGB", (6, 4)), exif=with_orientation(6)))
    plain = Image(saved(PIL.Image.new("RGB", (6, 4))))
    with no_decoding():
        assert (image.header().width, image.header().height) == (4, 6)
        assert (plain.header().width, plain.header().height) == (6, 4)


def test_broken_exif_leaves_a_picture_readable() -> None:
    pixels = noise(4, 6)
    image = Image(saved(PIL.Image.fromarray(pixels), exif=b"Exif\0\0not tiff at all"))
    np.testing.assert_array_equal(image.decode(), pixels)


def test_sources_of_the_same_pixels_agree(tmp_path: Path) -> None:
    pixels = noise(6, 5)
    picture = PIL.Image.fromarray(pixels)
    file = tmp_path / "p.png"
    picture.save(file)
    for source in (file, str(file), file.read_bytes(), picture, pixels, PIL.Image.open(file)):
        decoded = Image(source).decode()
        np.testing.assert_array_equal(decoded, pixels)
        assert decoded.dtype == np.uint8
        assert decoded.flags.c_contiguous


def test_grey_is_replicated_and_transparency_is_white() -> None:
    grey = noise(4, 5, None)
    np.testing.assert_array_equal(Image(grey).decode(), np.stack([grey] * 3, axis=-1))
    rgba = noise(8, 8, 4, seed=3)
    alpha = rgba[..., 3:].astype(float) / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    for source in (rgba, saved(PIL.Image.fromarray(rgba))):
        assert np.abs(Image(source).decode() - expected).max() <= 1
    rgba[..., 3] = 0
    assert (Image(rgba).decode() == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK"])
def test_every_colour_mode_decodes(mode: str) -> None:
    base = PIL.Image.new("RGB", (3, 2), "black")
    via = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode, mode)
    decoded = Image(base.convert(via).convert(mode)).decode()
    assert decoded.shape == (2, 3, 3)
    assert decoded.max() <= 1


def test_palette_colour_that_is_transparent_becomes_white() -> None:
    picture = PIL.Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putdata([0, 1])
    for kind in ("PNG", "GIF"):
        decoded = Image(saved(picture, kind, transparency=0)).decode()
        assert decoded[0].tolist() == [[255, 255, 255], [200, 100, 50]]


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_single_transparent_colour_becomes_white(mode: str) -> None:
    black = PIL.Image.new(mode, (2, 2))
    data = saved(black, transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert (Image(data).decode() == 255).all()


def test_16_bits_are_scaled_and_their_transparent_value_is_white() -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    data = saved(PIL.Image.fromarray(values))
    assert Image(data).header().mode.startswith("I")
    assert Image(data).decode()[0, :, 0].tolist() == [0, 1, 128, 255]
    see_through = PIL.Image.fromarray(values)
    see_through.info["transparency"] = 257
    assert Image(see_through).decode()[0, :, 0].tolist() == [0, 255, 128, 255]


def test_integer_and_float_pictures_need_a_known_range() -> None:
    whole = PIL.Image.fromarray(np.array([[0, 65535]], dtype=np.int32))
    assert Image(whole).decode()[0, :, 0].tolist() == [0, 255]
    for values in ([[0.0, 1.0]], [[0.0, 255.0]]):
        picture = PIL.Image.fromarray(np.array(values, dtype=np.float32))
        assert Image(picture).decode()[0, :, 0].tolist() == [0, 255]
    for values in (
        np.array([[-1, 5]], np.int32),
        np.array([[0, 70000]], np.int32),
        np.array([[0, 300]], np.float32),
        np.array([[0, np.nan]], np.float32),
    ):
        with pytest.raises(MediaError, match="must hold values of 0 to"):
            Image(PIL.Image.fromarray(values)).decode()


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_first_frame_of_many(kind: str) -> None:
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("black", "white")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image(data).decode().max() == 0


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    whole = saved(PIL.Image.fromarray(noise(64, 64)))
    (folder / "empty.png").write_bytes(b"")
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "header.png").write_bytes(whole[:20])
    (folder / "text.png").write_text("this is no picture")
    (folder / "drawing.eps").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    )
    jpeg = saved(PIL.Image.fromarray(noise(64, 64)), "JPEG")
    (folder / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    return {
        "missing": (folder / "no.png", "no such file"),
        "directory": (folder, "a directory"),
        "empty": (folder / "empty.png", "empty"),
        "truncated": (folder / "truncated.png", "cannot be decoded"),
        "truncated jpeg": (folder / "truncated.jpg", "cannot be decoded"),
        "cut in its header": (folder / "header.png", "must be"),
        "not a picture": (folder / "text.png", "format that is read"),
        "drawing": (folder / "drawing.eps", "format that is read"),
        "null byte": (folder / "a\0b.png", "cannot be read"),
    }


def test_every_bad_file_is_refused_by_name(tmp_path: Path) -> None:
    for case, (file, rule) in bad_files(tmp_path).items():
        with pytest.raises(MediaError, match=rule) as caught:
            Image(file).decode()
        assert caught.value.origin.file == str(file), case
        assert str(file) in str(caught.value), case
        assert ";" in caught.value.message, case  # a remedy follows
        assert "\n" not in str(caught.value), case


@pytest.mark.parametrize("seed", range(20))
def test_damaged_bytes_raise_only_media_errors(seed: int) -> None:
    chance = np.random.default_rng(seed)
    kind = ["PNG", "JPEG", "GIF", "WEBP", "TIFF"][seed % 5]
    data = bytearray(saved(PIL.Image.fromarray(noise(16, 16)), kind))
    for place in chance.integers(0, len(data), 8):
        data[place] = chance.integers(0, 256)
    try:
        header = Image(bytes(data)).header()
        decoded = Image(bytes(data)).decode()
        assert decoded.shape == (header.height, header.width, 3)
    except MediaError:
        pass


def test_pixel_limit_is_checked_before_decoding() -> None:
    data = saved(PIL.Image.new("1", (300, 200)))
    exact, below = Limits(max_image_pixels=60_000), Limits(max_image_pixels=59_999)
    assert Image(data).header(exact).width == 300
    for read in (Image(data).header, Image(data).decode):
        with (
            no_decoding(),
            pytest.raises(MediaError, match=r"59,999.*300 x 200 = 60,000.*max_im"),
        ):
            read(below)


def test_byte_limit_is_checked_before_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "big.png"
    file.write_bytes(saved(PIL.Image.fromarray(noise(20, 20))))
    monkeypatch.setattr(PIL.Image, "open", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(MediaError, match=r"at most 100 bytes.*max_image_bytes"):
        Image(file).header(Limits(max_image_bytes=100))


def test_decompression_bomb_is_a_media_error(tmp_path: Path) -> None:
    before = PIL.Image.MAX_IMAGE_PIXELS
    whole = bytearray(saved(PIL.Image.new("1", (8, 8))))
    whole[16:24] = (60_000).to_bytes(4) * 2  # width and height of IHDR
    whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4)
    with pytest.raises(MediaError, match="decompression bomb"):
        Image(bytes(whole)).header()
    assert before == PIL.Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("kind", ["ICO", "ICNS"])
def test_formats_that_are_not_worth_their_risk_are_never_opened(kind: str) -> None:
    """Pillow decodes an ICO when it is opened: no limit on pixels could hold."""
    data = saved(PIL.Image.fromarray(noise(64, 64)), kind)
    with no_decoding(), pytest.raises(MediaError, match=r"format that is read \(PNG, JPEG.*as PNG"):
        Image(data).header(Limits(max_image_pixels=16))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_that_is_opened_is_checked_before_decoding(kind: str) -> None:
    picture = PIL.Image.fromarray(noise(16, 24))
    if kind == "QOI":
        data = b"qoif" + (24).to_bytes(4) + (16).to_bytes(4) + b"\3\0" + bytes(8)
    else:
        data = saved(picture, kind)
    with no_decoding():
        assert (Image(data).header().width, Image(data).header().height) == (24, 16)
        with pytest.raises(MediaError, match="at most 383 pixels"):
            Image(data).decode(Limits(max_image_pixels=383))


@pytest.mark.parametrize(
    ("array", "rule"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((3, 4, 4), np.uint8)[:, :, :2], r"\(3, 4, 2\)"),
        (np.zeros((3, 20, 20), np.uint8), "channels last"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"\(H, W, 3\)"),
        (np.zeros(4, np.uint8), r"\(4,\)"),
        (np.zeros((0, 4, 3), np.uint8), "must have pixels"),
        (12, "int"),
    ],
)
def test_wrong_arrays_and_types_are_refused(array: Any, rule: str) -> None:
    with pytest.raises(MediaError, match=rule):
        Image(array)


def test_digest_is_of_the_bytes_or_of_the_pixels(tmp_path: Path) -> None:
    pixels = noise(4, 6)
    data = saved(PIL.Image.fromarray(pixels))
    file = tmp_path / "p.png"
    file.write_bytes(data)
    assert Image(file).digest() == Image(data).digest() == hashlib.sha256(data).hexdigest()
    assert Image(pixels).digest() == Image(PIL.Image.fromarray(pixels)).digest()
    assert Image(pixels).digest() != Image(pixels.reshape(6, 4, 3)).digest()
    with pytest.raises(MediaError, match="no such file"):
        Image(tmp_path / "no.png").digest()


def test_parts_compare_hash_and_pickle() -> None:
    pixels = noise(3, 3)
    assert Image("a.png") == Image("a.png") != Image("b.png")
    assert Image(Path("a.png")) != Image("a.png")
    assert Image(pixels) != Image(pixels.copy())
    assert len({Image("a.png"), Image("a.png"), Image(pixels)}) == 2
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(Image(pixels))).decode(), pixels)
    assert isinstance(Image(pixels), MediaPart)
    assert Image.medium == "image"
    with pytest.raises(AttributeError):
        Image("a.png").source = "b.png"  # type: ignore[misc]


def test_one_part_is_read_by_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise(32, 48)
    file = tmp_path / "p.png"
    PIL.Image.fromarray(pixels).save(file, exif=with_orientation(6))
    pixels = np.rot90(pixels, -1)
    load = PIL.Image.Exif.load

    def slow(exif: PIL.Image.Exif, data: bytes) -> None:
        time.sleep(0.02)  # the other threads overtake
        load(exif, data)

    monkeypatch.setattr(PIL.Image.Exif, "load", slow)
    for source in (file, PIL.Image.open(file)):
        image = Image(source)
        with ThreadPoolExecutor(8) as pool:
            for decoded in pool.map(lambda _, image=image: image.decode(), range(32)):
                np.testing.assert_array_equal(decoded, pixels)


def test_limits_and_text_refuse_what_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match="max_image_pixels"):
        Limits(max_image_pixels=0)
    assert PIL.Image.MAX_IMAGE_PIXELS
    most = 2 * PIL.Image.MAX_IMAGE_PIXELS
    assert Limits(max_image_pixels=most).max_image_pixels == most
    with pytest.raises(ConfigError, match=r"max_image_pixels.*Pillow refuses.*; lower it"):
        Limits(max_image_pixels=most + 1)
    with pytest.raises(DataError, match="lone surrogate"):
        Text("a\ud800")
    with pytest.raises(DataError, match="string"):
        Text(3)  # type: ignore[arg-type]

"""Pictures: paths, bytes, PIL images and arrays, all read to one canonical array.

The canonical array is uint8 (H, W, 3), upright (EXIF orientation applied), on white where the
picture is transparent. `plait.modalities.pixels` does the colour work; this file finds the
picture, checks it and turns every failure into a `MediaError` that names the file.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL.ExifTags import Base
from PIL.Image import DecompressionBombError, DecompressionBombWarning

from plait.errors import MediaError, Origin
from plait.modalities.jpeg import MODES, decode_jpeg
from plait.modalities.limits import Limits
from plait.modalities.part import MediaHeader, MediaPart
from plait.modalities.pixels import UPRIGHT, Turn, to_rgb
from plait.modalities.sources import (
    STORED,
    Stored,
    digest_of,
    name_of,
    open_stored,
    read_stored,
    size_of,
)

Source = Stored | PIL.Image.Image | NDArray[np.uint8]

FORMATS = (
    "PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "PCX",
    "QOI", "SGI",
)  # fmt: skip
"""What is opened. Pillow decodes an ICO when it is opened, before any limit can be checked, and
starts other programs to draw EPS and WMF; rarer formats are not worth their decoders' risk."""

# Pillow starts other programs, or asks the operating system, to draw these.
_DRAWINGS = frozenset({"EPS", "WMF"})

# A PIL image reads its file when first used, which two threads must not do at once.
_LOADING = threading.Lock()


@dataclass(frozen=True, slots=True)
class ImageHeader(MediaHeader):
    """Width and height in pixels as the picture is meant to be seen, after EXIF orientation."""

    width: int
    height: int
    format: str
    mode: str
    bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Image(MediaPart):
    """A picture.

    Args:
        source: A path, a file's bytes, a PIL image, or a uint8 array (H, W), (H, W, 3) or
            (H, W, 4). Arrays and PIL images are not copied: do not write to them afterwards.

    Raises:
        MediaError: the source is none of these. What a path leads to is only read later.
    """

    source: Source

    medium: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        if isinstance(self.source, np.ndarray):
            self._check_array(self.source)
        elif not isinstance(self.source, (*STORED, PIL.Image.Image)):
            raise self._error(
                "a picture must be a path, bytes, a PIL image or a uint8 array; "
                f"it is {type(self.source).__name__}"
            )

    def __eq__(self, other: object) -> bool:
        """Paths and bytes compare by value; pictures in memory only with themselves."""
        if not isinstance(other, Image):
            return NotImplemented
        if isinstance(self.source, STORED):
            return type(self.source) is type(other.source) and self.source == other.source
        return self.source is other.source

    def __hash__(self) -> int:
        if isinstance(self.source, STORED):
            return hash(self.source)
        return id(self.source)

    @property
    def file(self) -> str:
        if isinstance(self.source, STORED):
            return name_of(self.source)
        if isinstance(self.source, PIL.Image.Image):
            return str(getattr(self.source, "filename", "") or "<PIL image>")
        return f"<array {getattr(self.source, 'shape', '')}>"

    @property
    def in_memory(self) -> bool:
        return not isinstance(self.source, STORED)

    def header(self, limits: Limits = Limits()) -> ImageHeader:  # noqa: B008  (frozen)
        """Size and format from the header, without decoding.

        An orientation is looked for where it precedes the pixels, as cameras and editors write it.

        Raises:
            MediaError: the file is missing, empty, over a limit or not a picture.
        """
        with self._opened(limits) as (_, header, _):
            return header

    def load(self, limits: Limits, wanted: None = None) -> NDArray[np.uint8]:  # noqa: ARG002
        """The picture as uint8 (H, W, 3); H and W are the header's. Films give their first frame.

        Raises:
            MediaError: as for `header`, or the file is truncated, or its pixels have no one
                meaning as colours.
        """
        content = self._content(limits)
        with self._opened(limits, content) as (picture, header, turn):
            with self._reading("decoded"):
                pixels = self._pixels(picture, content)
            if turn is not None:
                pixels = turn(pixels)
            if pixels.shape != (header.height, header.width, 3):
                raise self._error(
                    f"a picture must have the size its header gives, {header.width} x "
                    f"{header.height}; it decodes to {pixels.shape[1]} x {pixels.shape[0]}; "
                    "save it again as PNG or JPEG"
                )
            # Pillow's own memory is read-only, which torch warns about: it is copied.
            return np.require(pixels, requirements=["C", "W"])

    def digest(self) -> str:
        """SHA-256, in hex, of the file's bytes, or of the canonical pixels and their shape."""
        if isinstance(self.source, STORED):
            return digest_of(self.source, "picture")
        pixels = self.decode()
        digest = hashlib.sha256(f"plait pixels {pixels.shape}".encode())
        digest.update(pixels.data)
        return digest.hexdigest()

    def _check_array(self, array: NDArray[Any]) -> None:
        channels = array.shape[2] if array.ndim == 3 else 1
        if array.dtype != np.uint8:
            raise self._error(
                f"a picture array must be uint8, 0 to 255; it is {array.dtype}; scale it to 255, "
                "round it and cast it with .astype(np.uint8)"
            )
        if array.ndim not in (2, 3) or (array.ndim == 3 and channels not in (3, 4)):
            raise self._error(
                "a picture array must be (H, W), (H, W, 3) or (H, W, 4), channels last; it is "
                f"{array.shape}; transpose or reshape it"
            )
        if array.size == 0:
            raise self._error(f"a picture must have pixels; this array is {array.shape}")

    def _content(self, limits: Limits) -> bytes | None:
        """The whole file, which is read once; None where the picture is in memory."""
        if not isinstance(self.source, STORED):
            return None
        size_of(self.source, "picture", limits.max_image_bytes, "max_image_bytes")
        with self._reading("read"):
            return read_stored(self.source)

    def _pixels(self, picture: PIL.Image.Image, content: bytes | None) -> NDArray[np.uint8]:
        """Of the opened picture, as it lies in the file."""
        if isinstance(self.source, PIL.Image.Image):
            with _LOADING:
                picture.load()
        elif content is not None and picture.format == "JPEG" and picture.mode in MODES:
            pixels = decode_jpeg(content)
            if pixels is not None and pixels.shape[1::-1] == picture.size:
                return pixels
        return to_rgb(picture)

    @contextmanager
    def _opened(
        self, limits: Limits, content: bytes | None = None
    ) -> Iterator[tuple[PIL.Image.Image, ImageHeader, Turn | None]]:
        """The picture, not yet decoded, with its header and the turn that makes it upright.

        Args:
            content: The file's bytes, where they are read already.
        """
        size = self._size_in_bytes(limits)
        with self._reading("read"):
            picture = self._open(content)
        try:
            turn = self._turn(picture)
            header = self._describe(picture, size, swapped=turn is not None and turn.swaps)
            self._check_pixels(header, limits)
            yield picture, header, turn
        finally:
            if picture is not self.source:
                picture.close()

    def _turn(self, picture: PIL.Image.Image) -> Turn | None:
        if picture is not self.source:
            return _turn(picture)
        with _LOADING:  # Pillow says that EXIF is read before it has read it
            return _turn(picture)

    def _open(self, content: bytes | None) -> PIL.Image.Image:
        if isinstance(self.source, PIL.Image.Image):
            return self.source
        if isinstance(self.source, np.ndarray):
            return PIL.Image.fromarray(self.source)
        held: Any = self.source
        if content is not None:
            held = BytesIO(content)
        elif not isinstance(self.source, str | Path):
            held = open_stored(self.source)
        return PIL.Image.open(held, formats=_installed())

    def _describe(self, picture: PIL.Image.Image, size: int, swapped: bool) -> ImageHeader:
        width, height = reversed(picture.size) if swapped else picture.size
        unnamed = "array" if isinstance(self.source, np.ndarray) else "PIL"
        return ImageHeader(width, height, picture.format or unnamed, picture.mode, size)

    def _check_pixels(self, header: ImageHeader, limits: Limits) -> None:
        pixels = header.width * header.height
        if pixels > limits.max_image_pixels:
            raise self._error(
                f"a picture must have at most {limits.max_image_pixels:,} pixels; this one has "
                f"{header.width} x {header.height} = {pixels:,}; shrink it or raise "
                "max_image_pixels"
            )
        if pixels == 0:
            raise self._error(
                f"a picture must have pixels; this one is {header.width} x {header.height}"
            )
        if header.format in _DRAWINGS:
            raise self._error(
                f"a picture must hold pixels, not drawing commands; this one is {header.format}; "
                "save it as PNG"
            )

    def _size_in_bytes(self, limits: Limits) -> int:
        if isinstance(self.source, STORED):
            return size_of(self.source, "picture", limits.max_image_bytes, "max_image_bytes")
        if isinstance(self.source, np.ndarray):
            size = self.source.nbytes
        else:
            width, height = self.source.size
            size = width * height * len(self.source.getbands())
        if size > limits.max_image_bytes:
            raise self._error(
                f"a picture must have at most {limits.max_image_bytes:,} bytes; this one has "
                f"{size:,}; make it smaller or raise max_image_bytes"
            )
        return size

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Turn whatever Pillow raises on broken or hostile files into one kind of error."""
        try:
            yield
        except MediaError as error:
            raise error.at(Origin(file=self.file)) from None
        except MemoryError:
            raise
        except FileNotFoundError as error:
            raise self._error(
                "a picture must exist; there is no such file; mend the path or remove the row"
            ) from error
        except PIL.UnidentifiedImageError as error:
            raise self._error(
                f"a picture must be in a format that is read ({', '.join(FORMATS)}); this file is "
                "in none; save it as PNG or JPEG"
            ) from error
        except (DecompressionBombError, DecompressionBombWarning) as error:
            raise self._error(
                f"a picture must not be a decompression bomb ({error}); shrink it"
            ) from error
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise self._error(
                f"a picture must be whole; this one cannot be {what}: {reason}; replace the file "
                "or remove the row"
            ) from error

    def _error(self, message: str) -> MediaError:
        return MediaError(message, Origin(file=self.file))


def _installed() -> tuple[str, ...]:
    """The formats that this Pillow was built with; it raises KeyError for any other."""
    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


def _turn(picture: PIL.Image.Image) -> Turn | None:
    """How to make the picture upright, or None; never decodes.

    `PIL.Image.Image.getexif` is called unbound because the PNG reader's own decodes the picture.
    The TIFF reader gives an upright size, and turns the pixels, by itself.
    """
    if picture.format == "TIFF":
        return None
    try:
        exif = PIL.Image.Image.getexif(picture)
    except Exception:  # broken EXIF is common, raises anything, and says nothing of the pixels
        return None
    return UPRIGHT.get(exif.get(Base.Orientation, 1))

"""Animated pictures (WebP, GIF, PNG) as films, through Pillow. H rows, W columns.

FFmpeg reads no animated WebP. Pillow composes each frame from those before it, so frames are
decoded in order up to the last that is wanted.
"""

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from plait.errors import MediaError
from plait.modalities.containers import describe, reading
from plait.modalities.film import FilmFacts
from plait.modalities.pixels import to_rgb

FORMATS = ("WEBP", "GIF", "PNG")

_SHORTEST, _DEFAULT = 11, 100
"""Milliseconds: browsers show a frame of 10 or less for 100."""


def is_animated(source: str | Path | bytes) -> bool:
    """Whether the first bytes are those of a picture format that can move."""
    try:
        head = source[:16] if isinstance(source, bytes) else _head(Path(source))
    except (OSError, ValueError):
        return False
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return webp or head[:4] == b"GIF8" or head[:8] == b"\x89PNG\r\n\x1a\n"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


class Animated:
    """An open animated picture.

    Raises:
        MediaError: it cannot be read.
    """

    def __init__(self, source: str | Path | bytes) -> None:
        self.source, self.file = source, describe(source)
        place = BytesIO(source) if isinstance(source, bytes) else source
        with reading("video", self.file):
            self.picture: Any = PIL.Image.open(place, formats=FORMATS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.picture.close()

    def facts(self) -> FilmFacts:
        """Length, size and mean rate; a WebP's are read from its chunks, nothing decoded."""
        with reading("video", self.file):
            pauses = self._pauses()
            width, height = self.picture.size
            name = str(self.picture.format)
        seconds = sum(pauses) / 1000
        return FilmFacts(seconds, width, height, len(pauses) / seconds, name)

    def frames_at(self, times: Sequence[float]) -> list[tuple[float, NDArray[np.uint8]]]:
        """(when it begins, its pixels) of the frame seen at each time; times do not decrease."""
        with reading("video", self.file):
            begins = np.concatenate([[0.0], np.cumsum(self._pauses())[:-1]]) / 1000
            places = np.searchsorted(begins, np.asarray(times) + 1e-6, side="right") - 1
            made: dict[int, NDArray[np.uint8]] = {}
            for place in sorted(set(places.tolist())):
                self.picture.seek(place)
                made[place] = np.ascontiguousarray(to_rgb(self.picture))
            return [(float(begins[place]), made[place]) for place in places.tolist()]

    def _pauses(self) -> list[int]:
        """How long each frame is seen, in milliseconds."""
        if self.picture.format == "WEBP":
            pauses = list(_webp_pauses(self._content()))
        else:
            pauses = []
            for number in range(getattr(self.picture, "n_frames", 1)):
                self.picture.seek(number)
                pauses.append(int(self.picture.info.get("duration") or 0))
            self.picture.seek(0)
        return [pause if pause >= _SHORTEST else _DEFAULT for pause in pauses or [0]]

    def _content(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else Path(self.source).read_bytes()


def _webp_pauses(content: bytes) -> Iterator[int]:
    """The durations in the ANMF chunks of a WebP (RFC 9649, section 2.7.1.1)."""
    at = 12
    while at + 8 <= len(content):
        name, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        if name == b"ANMF":
            if at + 8 + 16 > len(content):
                raise MediaError("a film must be whole; this WebP is cut off; replace it")
            yield int.from_bytes(content[at + 20 : at + 23], "little")
        at += 8 + size + size % 2

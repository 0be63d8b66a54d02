"""What a page shows of a picture, a sound or a film: a picture of it, and what plays it.

Everything is a data URI, so that a page is one file. Shape letters: S samples, F frames,
H rows, W columns.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from plait.modalities import AudioRequest, Frames, FrameSampling, Limits, MediaPart
from plait.trainer.reports.pages import thumbnail

SIZE = 160
"""Pixels of a picture's longer side."""

RATE = 16_000
"""Hz of the sound that a page plays."""

MOST_SECONDS = 60.0
"""Of a sound that a page plays, from its beginning; a page must not take gigabytes."""

MOST_BYTES = 3_000_000
"""Of a film's own file inside a page; larger ones are shown as a few small frames."""

MOST_FRAMES = 48
"""Of such a film."""

_WAVE, _PAPER = (106, 79, 179), (255, 255, 255)
_FILM_TYPES = {"mp4": "video/mp4", "webm": "video/webm", "mov": "video/mp4"}
_PICTURE_TYPES = {"webp": "image/webp", "gif": "image/gif", "png": "image/png"}


@dataclass(frozen=True, slots=True)
class Shown:
    """`picture` is an image; `player` what plays, as "audio", "video" or "image" (`kind`).

    `about` says which part it is ("0.0 to 1.5 s").
    """

    picture: str
    player: str = ""
    kind: str = ""
    about: str = ""


def show(part: MediaPart, limits: Limits) -> Shown:
    """A whole part.

    Raises:
        MediaError: it cannot be decoded.
    """
    wanted = {"audio": AudioRequest(RATE), "video": FrameSampling(count=4)}.get(part.medium)
    decoded = part.decode(limits, wanted)
    return replace(show_stretch(part.medium, decoded), **player_of(part, limits))


def show_stretch(medium: str, decoded: Any, start: float = 0.0, stop: float = 1.0) -> Shown:
    """A picture of what lies between two shares of a decoded part: 0 to 1 is the whole."""
    return Shown(_PICTURES[medium](decoded, start, stop))


def player_of(part: MediaPart, limits: Limits) -> dict[str, str]:
    """The `player` and `kind` of a part; nothing for a picture.

    Raises:
        MediaError: it cannot be decoded.
    """
    make = _PLAYERS.get(part.medium)
    if make is None:
        return {}
    player, kind = make(part, limits)
    return {"player": player, "kind": kind}


def _picture(pixels: NDArray[np.uint8], start: float, stop: float) -> str:
    del start, stop
    return thumbnail(pixels, SIZE)


def _wave(samples: NDArray[np.float32], start: float, stop: float) -> str:
    """The loudest sample of each column, up and down from the middle."""
    width, height = SIZE, SIZE // 2
    first = int(start * len(samples))
    held = np.abs(samples[first : max(first + 1, int(stop * len(samples)))])
    edges = np.linspace(0, len(held), width + 1).astype(int)
    peaks = [held[a : max(b, a + 1)].max() for a, b in pairwise(edges)]
    loudest = max(float(np.abs(samples).max(initial=0.0)), 1e-6)
    reach = np.maximum(1, np.array(peaks) / loudest * (height // 2 - 1))
    distance = np.abs(np.arange(height)[:, None] - height // 2)
    pixels = np.where((distance < reach)[..., None], _WAVE, _PAPER).astype(np.uint8)
    return thumbnail(pixels, SIZE)


def _strip(frames: Frames, start: float, stop: float) -> str:
    """Up to four frames side by side."""
    count = len(frames.pixels)
    first = min(int(start * count + 1e-6), count - 1)
    last = max(first + 1, int(np.ceil(stop * count - 1e-6)))
    chosen = np.unique(np.linspace(first, last - 1, min(4, last - first)).round().astype(int))
    return thumbnail(np.concatenate([frames.pixels[number] for number in chosen], axis=1), 2 * SIZE)


def _sound(part: MediaPart, limits: Limits) -> tuple[str, str]:
    samples = part.decode(limits, AudioRequest(RATE))[: int(MOST_SECONDS * RATE)]
    return sound_uri(samples), "audio"


def sound_uri(samples: NDArray[np.float32]) -> str:
    """Mono samples (S,) at `RATE` Hz as MP3."""
    import av

    held = io.BytesIO()
    with av.open(held, "w", format="mp3") as container:
        stream = container.add_stream("libmp3lame", rate=RATE, layout="mono")
        whole = np.clip(samples * 32767, -32768, 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(whole[None], format="s16p", layout="mono")
        frame.sample_rate = RATE
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return _uri("audio/mpeg", held.getvalue())


def _film(part: MediaPart, limits: Limits) -> tuple[str, str]:
    """The film's own file where a browser plays it, else a few of its frames, small."""
    source = getattr(part, "source", None)
    if isinstance(source, str | Path) and getattr(part, "end", None) is None:
        path = Path(source)
        ending = path.suffix.lower().removeprefix(".")
        if path.stat().st_size <= MOST_BYTES:
            for types, kind in ((_FILM_TYPES, "video"), (_PICTURE_TYPES, "image")):
                if ending in types:
                    return _uri(types[ending], path.read_bytes()), kind
    frames = part.decode(limits, FrameSampling(fps=8.0, max_frames=MOST_FRAMES))
    return _animated(frames), "image"


def _animated(frames: Frames) -> str:
    pictures = [PIL.Image.fromarray(pixels) for pixels in frames.pixels]
    for picture in pictures:
        picture.thumbnail((2 * SIZE, 2 * SIZE))
    held = io.BytesIO()
    pictures[0].save(
        held, "WEBP", save_all=True, append_images=pictures[1:], duration=_pauses(frames.seconds),
        loop=0, quality=60,
    )  # fmt: skip
    return _uri("image/webp", held.getvalue())


def _pauses(seconds: Sequence[float] | NDArray[np.float64]) -> list[int]:
    """How long each frame is seen, in milliseconds; the last as long as the one before."""
    steps = np.diff(np.asarray(seconds, dtype=np.float64)) * 1000
    last = steps[-1:] if len(steps) else np.array([1000.0])
    return [max(20, round(float(step))) for step in (*steps, *last)]


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64," + base64.b64encode(content).decode("ascii")


_PICTURES: dict[str, Callable[[Any, float, float], str]] = {
    "image": _picture,
    "audio": _wave,
    "video": _strip,
}
_PLAYERS: dict[str, Callable[[MediaPart, Limits], tuple[str, str]]] = {
    "audio": _sound,
    "video": _film,
}

"""From what a row says of a file to the part of a sample: paths, bytes, base64, addresses."""

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from plait.datasets.records.values import refuse_unknown, type_name
from plait.errors import DataError
from plait.modalities import Audio, FrameSampling, Image, MediaPart, Video

MARKS = {"image": "<image>", "audio": "<audio>", "video": "<video>"}
"""Where a medium stands inside a text."""

ENDINGS: dict[str, frozenset[str]] = {
    "image": frozenset(
        {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm"}
        | {".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
    ),
    "audio": frozenset(
        {".aac", ".aif", ".aiff", ".amr", ".au", ".caf", ".flac", ".g722", ".m4a", ".mp3", ".oga"}
        | {".ogg", ".opus", ".w64", ".wav", ".wma"}
    ),
    "video": frozenset(
        {".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv"}
        | {".ts", ".webm", ".wmv"}
    ),
}
"""Endings, in lower case, of what is read as each medium."""

_DATA = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}", re.ASCII)
_LONGEST_PATH = 1024
_SOURCES = ("path", "bytes", "base64", "url", "array", "frames")
_CUTS = ("start", "end")
_OPTIONS: dict[str, tuple[str, ...]] = {
    "image": (),
    "audio": (*_CUTS, "sampling_rate"),
    "video": (*_CUTS, "sound", "fps", "max_frames", "count"),
}

Fetch = Callable[[str, str], Path]
"""From an address and its medium to the file that was brought."""


def refuse_address(address: str, medium: str) -> Path:
    """What an address is answered with where nobody asked for them."""
    raise DataError(
        f"{medium}s must be files here; {address[:80]!r} is an address; set remote: true "
        "(remote=True in Python) to have it fetched, or download it first"
    )


def medium_of(name: str) -> str | None:
    """The medium that a file's ending says, or None."""
    ending = PurePosixPath(name).suffix.lower()
    return next((medium for medium, endings in ENDINGS.items() if ending in endings), None)


@dataclass(frozen=True)
class MediaFinder:
    """Makes parts of what rows say; relative paths start in `folder`."""

    folder: Path
    fetch: Fetch = field(default=refuse_address)

    def part(self, medium: str, value: Any) -> MediaPart:
        """A picture, sound or film.

        Args:
            value: A path, an address, a data URI, base64, bytes, or an object with one of `path`,
                `bytes`, `base64`, `url`, `array` (with `sampling_rate`) and `frames`, and with
                `start`, `end`, `sound`, `fps`, `max_frames` or `count` where the medium has them.

        Raises:
            DataError: it is none of these.
        """
        if medium == "video" and isinstance(value, list):
            value = {"frames": value}
        if not isinstance(value, Mapping):
            return PARTS[medium](self.source(medium, value), {})
        given = {key: held for key, held in value.items() if held is not None}
        refuse_unknown(f"key of a {medium}", list(given), (*_SOURCES, *_OPTIONS[medium]))
        sources = [key for key in _SOURCES if key in given]
        if {"bytes", "path"} == set(sources):  # as Hugging Face's tables write media
            sources = ["bytes"]
        if len(sources) != 1:
            raise DataError(
                f"a {medium} must have one of {', '.join(_SOURCES)}; it has "
                f"{' and '.join(sources) or 'none'}; keep one"
            )
        options = {key: held for key, held in given.items() if key in _OPTIONS[medium]}
        held = given[sources[0]]
        if sources[0] == "base64":
            return PARTS[medium](decoded(held, medium), options)
        if sources[0] == "frames" and medium == "video" and isinstance(held, list):
            return PARTS[medium]([self.source("image", one) for one in held], options)
        if sources[0] == "array" and medium == "audio" and isinstance(held, list):
            return PARTS[medium](np.asarray(held, dtype=np.float32), options)
        return PARTS[medium](self.source(medium, held), options)

    def source(self, medium: str, value: Any) -> Path | bytes:
        """The file or the bytes that a string stands for."""
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value or "\0" in value:
            raise DataError(
                f"{medium}s must hold paths of files; it holds {type_name(value)}: {value!r}"[:200]
                + "; write the path as a string"
            )
        if value.startswith("data:"):
            begin = _DATA.match(value)
            if begin is None:
                raise DataError(
                    f"a data URI must be data:TYPE;base64,...; this one begins {value[:40]!r}"
                )
            return decoded(value[begin.end() :], medium)
        if "://" in value[:32]:
            return self.fetch(value, medium)
        if len(value) > _LONGEST_PATH and _BASE64.fullmatch(value):
            return decoded(value, medium)
        return self.folder / value


def decoded(text: Any, medium: str) -> bytes:
    """The bytes that base64 spells.

    Raises:
        DataError: it is none.
    """
    if not isinstance(text, str):
        raise DataError(f"base64 must be a string; that of this {medium} is {type_name(text)}")
    try:
        standard = text.replace("-", "+").replace("_", "/")
        return base64.b64decode("".join(standard.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"a {medium} in base64 must be whole; {error}; encode it again") from error


def _image(source: Any, options: Mapping[str, Any]) -> MediaPart:  # noqa: ARG001  (it has none)
    return Image(source)


def _audio(source: Any, options: Mapping[str, Any]) -> MediaPart:
    rate = options.get("sampling_rate") if isinstance(source, np.ndarray) else None
    return Audio(source, rate=rate, **_cut(options))


def _video(source: Any, options: Mapping[str, Any]) -> MediaPart:
    frames = isinstance(source, list)
    own = {key: options[key] for key in ("fps", "max_frames", "count") if key in options}
    fps = own.pop("fps", None) if frames else None
    sampling = FrameSampling(**own) if own else None
    return Video(source, sampling=sampling, sound=options.get("sound"), fps=fps, **_cut(options))


def _cut(options: Mapping[str, Any]) -> dict[str, float]:
    cut = {key: options[key] for key in _CUTS if key in options}
    for key, value in cut.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f"a cut's {key} must be seconds; it is {type_name(value)}")
    return cut


PARTS: dict[str, Callable[[Any, Mapping[str, Any]], MediaPart]] = {
    "image": _image,
    "audio": _audio,
    "video": _video,
}

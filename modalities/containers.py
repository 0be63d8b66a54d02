"""Sound and film files through PyAV (FFmpeg), opened so that they can do no harm.

Only local files and bytes are opened, no format that names other files (playlists, concatenations)
is read, and whatever FFmpeg raises on a broken file becomes one kind of error.
"""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from plait.errors import MediaError, Origin, printable

_NAMES_OTHERS = frozenset(
    {"concat", "concatf", "dash", "hls", "applehttp", "image2", "image2pipe", "imf", "lavfi"}
    | {"rtsp", "sdp", "rtp", "tty", "ffmetadata", "webm_dash_manifest", "vobsub", "mpsub", "avs"}
)
"""Demuxers that open what a file names, or make up media of their own."""

KINDS = {"audio": "a sound", "video": "a film"}


def describe(source: Any) -> str:
    """What messages call a source."""
    if isinstance(source, str | Path):
        return printable(str(source))
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    return f"<array {getattr(source, 'shape', '')}>"


def size_of(source: str | Path | bytes, medium: str, most: int) -> int:
    """The file's bytes.

    Raises:
        MediaError: it is missing, no regular file, empty, or larger than `most`.
    """
    kind, file = KINDS[medium], describe(source)
    if isinstance(source, bytes):
        size = len(source)
    else:
        try:
            facts = Path(source).stat()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise MediaError(
                f"{kind} must exist and be readable; {reason}; mend the path or remove the row",
                Origin(file=file),
            ) from error
        if not stat.S_ISREG(facts.st_mode):
            raise MediaError(
                f"{kind} must be a file; this is none; give a file's path", Origin(file=file)
            )
        size = facts.st_size
    if not size:
        raise MediaError(f"{kind} must have bytes; it is empty; replace it", Origin(file=file))
    if size > most:
        raise MediaError(
            f"{kind} must have at most {most:,} bytes; this one has {size:,}; shorten it or raise "
            f"max_{medium}_bytes",
            Origin(file=file),
        )
    return size


@contextmanager
def reading(medium: str, file: str) -> Iterator[None]:
    """Turn whatever FFmpeg raises on broken or hostile files into one kind of error."""
    try:
        yield
    except MediaError as error:
        raise error.at(Origin(file=file)) from None
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MediaError(
            f"{KINDS[medium]} must be whole and in a format that FFmpeg reads; this one is not: "
            f"{reason}; replace the file or remove the row",
            Origin(file=file),
        ) from error


@contextmanager
def opened(source: str | Path | bytes, medium: str) -> Iterator[Any]:
    """A PyAV container, closed at the end.

    Raises:
        MediaError: FFmpeg does not read it, or fails while it is read.
    """
    import av

    formats = ",".join(sorted(av.formats_available - _NAMES_OTHERS))
    options = {"protocol_whitelist": "file,pipe,data", "format_whitelist": formats}
    with reading(medium, describe(source)):
        # With its protocol named, a path is never taken for an address or a pattern.
        place = BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
        with av.open(place, options=options, metadata_errors="replace") as container:
            yield container

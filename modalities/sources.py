"""What sounds and films share: a file or its bytes, checked before any decoder sees it."""

import hashlib
import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plait.errors import MediaError, Origin, printable

Stored = str | Path | bytes


def name_of(source: Stored) -> str:
    """How messages call it."""
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else printable(str(source))


def size_of(source: Stored, noun: str, limit: int, setting: str) -> int:
    """Bytes of the file.

    Args:
        noun: What it should be, for messages: "sound".
        limit, setting: The most that it may have, and the limit's name.

    Raises:
        MediaError: it is missing, empty, no regular file, or over the limit.
    """
    size = len(source) if isinstance(source, bytes) else _file_size(source, noun)
    if size == 0:
        raise refusal(source, f"a {noun} must have bytes; this file is empty; replace it")
    if size > limit:
        raise refusal(
            source,
            f"a {noun} must have at most {limit:,} bytes; this one has {size:,}; shorten it or "
            f"raise {setting}",
        )
    return size


def digest_of(source: Stored, noun: str) -> str:
    """SHA-256, in hex, of the file's bytes."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    _file_size(source, noun)
    with reading(source, noun, "read"), Path(source).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_cut(source: Stored, noun: str, start: float, end: float | None) -> None:
    """
    Raises:
        MediaError: the cut has no length, begins before the file, or is no number.
    """
    if not (0 <= start < math.inf and (end is None or start < end < math.inf)):
        raise refusal(
            source,
            f"a {noun}'s start must be 0 or more and its end after it, in seconds; it is cut from "
            f"{start} to {end}; mend the row",
        )


def cut_name(start: float, end: float | None) -> str:
    """The cut as a part of a cache's key; empty for the whole file."""
    return "" if start == 0 and end is None else f"{start!r}-{end!r}s"


def refusal(source: Stored, message: str) -> MediaError:
    return MediaError(message, Origin(file=name_of(source)))


@contextmanager
def reading(source: Stored, noun: str, what: str) -> Iterator[None]:
    """Turn whatever the libraries raise on broken or hostile files into one kind of error."""
    try:
        yield
    except MediaError as error:
        raise error.at(Origin(file=name_of(source))) from None
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise refusal(
            source,
            f"a {noun} must exist; there is no such file; mend the path or remove the row",
        ) from error
    except Exception as error:
        # FFmpeg's and the system's own words, without the number and the path once more.
        said = getattr(error, "strerror", None) or str(error)
        reason = " ".join(said.split())[:300] or type(error).__name__
        raise refusal(
            source,
            f"a {noun} must be whole and in a format that is read; this one cannot be {what}: "
            f"{reason}; replace the file or remove the row",
        ) from error


def _file_size(source: str | Path, noun: str) -> int:
    with reading(source, noun, "read"):
        facts = Path(source).stat()
    if not stat.S_ISREG(facts.st_mode):
        kind = "a directory" if stat.S_ISDIR(facts.st_mode) else "not a regular file"
        raise refusal(source, f"a {noun} must be a file; this is {kind}; give a file's path")
    return facts.st_size

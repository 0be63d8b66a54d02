"""What sounds and films share: a file or its bytes, checked before any decoder sees it."""

import hashlib
import io
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.errors import MediaError, Origin, printable


@dataclass(frozen=True, slots=True)
class KnownHeader:
    """A header that was read before, and what it depended on besides the file."""

    facts: str
    header: Any


@dataclass(frozen=True, slots=True)
class FileSlice:
    """`size` bytes from `offset` of a larger file: a member of a tar archive, called `name`.

    `file_size` is what the larger file had when the member was found; one that has another size
    now is refused. `known` is for caches of headers.
    """

    path: Path
    offset: int
    size: int
    file_size: int
    name: str
    known: KnownHeader | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"


Stored = str | Path | bytes | FileSlice
"""What holds a file's bytes."""

STORED = (str, Path, bytes, FileSlice)


def name_of(source: Stored) -> str:
    """How messages call it."""
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else printable(str(source))


def open_stored(source: Stored) -> io.BufferedReader | io.BytesIO:
    """The bytes as an open file, which seeks.

    Raises:
        OSError: there is no such file, or it cannot be read.
        MediaError: it changed since the slice was found.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, FileSlice):
        return io.BufferedReader(_SliceReader(source))
    return Path(source).open("rb")


def read_stored(source: Stored) -> bytes:
    """All of the bytes.

    Raises:
        OSError, MediaError: as `open_stored`.
    """
    if isinstance(source, bytes):
        return source
    if not isinstance(source, FileSlice):
        return Path(source).read_bytes()
    with source.path.open("rb", buffering=0) as file:
        _check_unchanged(file, source)
        file.seek(source.offset)
        return _read_all(file, source.size)


def _read_all(file: io.FileIO, size: int) -> bytes:
    """So many bytes, or all that there are: the system may give fewer than asked for at once."""
    blocks = []
    while size > 0 and (block := file.read(size)):
        blocks.append(block)
        size -= len(block)
    return blocks[0] if len(blocks) == 1 else b"".join(blocks)


def _check_unchanged(file: io.FileIO, held: FileSlice) -> None:
    if os.fstat(file.fileno()).st_size != held.file_size:
        raise MediaError("a dataset must not change while it is read; this file did; open it again")


class _SliceReader(io.RawIOBase):
    """A slice as a file of its own."""

    def __init__(self, held: FileSlice) -> None:
        super().__init__()
        self._held, self._at = held, 0
        self._file = held.path.open("rb", buffering=0)
        try:
            _check_unchanged(self._file, held)
        except MediaError:
            self._file.close()
            raise

    @property
    def name(self) -> str:
        """Its ending tells FFmpeg a format that begins with no mark of its own, like G.722."""
        return self._held.name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._held.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        view = memoryview(buffer)
        wanted = max(0, min(len(view), self._held.size - self._at))
        self._file.seek(self._held.offset + self._at)
        found = self._file.readinto(view[:wanted]) or 0
        self._at += found
        return found

    def close(self) -> None:
        self._file.close()
        super().close()


def size_of(source: Stored, noun: str, limit: int, setting: str) -> int:
    """Bytes of the file.

    Args:
        noun: What it should be, for messages: "sound".
        limit, setting: The most that it may have, and the limit's name.

    Raises:
        MediaError: it is missing, empty, no regular file, or over the limit.
    """
    size = _size(source, noun)
    if size == 0:
        raise refusal(source, f"a {noun} must have bytes; this file is empty; replace it")
    if size > limit:
        raise refusal(
            source,
            f"a {noun} must have at most {limit:,} bytes; this one has {size:,}; make it smaller "
            f"or raise {setting}",
        )
    return size


def digest_of(source: Stored, noun: str) -> str:
    """SHA-256, in hex, of the file's bytes."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    _size(source, noun)
    with reading(source, noun, "read"), open_stored(source) as file:
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


def _size(source: Stored, noun: str) -> int:
    if isinstance(source, bytes):
        return len(source)
    if isinstance(source, FileSlice):
        return source.size
    with reading(source, noun, "read"):
        facts = Path(source).stat()
    if not stat.S_ISREG(facts.st_mode):
        kind = "a directory" if stat.S_ISDIR(facts.st_mode) else "not a regular file"
        raise refusal(source, f"a {noun} must be a file; this is {kind}; give a file's path")
    return facts.st_size

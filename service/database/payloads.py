"""Bodies and results, one behind another in files, so that many share one sync.

root/0000000001.bin    payloads; a `Ref` says which file, from which byte, how many
"""

import fcntl
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from plait.errors import ConfigError

FILE_BYTES = 64_000_000
"""After so many a new file begins. A file goes when nothing in it is needed any more."""

LOCK_SECONDS = 30.0
"""How long a server waits for another one on the same folder, which may be about to stop."""


@dataclass(frozen=True, slots=True)
class Ref:
    """Where a payload lies."""

    file: int
    start: int
    length: int

    def __str__(self) -> str:
        return f"{self.file}:{self.start}:{self.length}"

    @classmethod
    def of(cls, text: str) -> Self:
        return cls(*map(int, text.split(":")))


class Payloads:
    """Payload files under `root`; one thread of one process writes, any read.

    Raises:
        ConfigError: another server has this folder, and does not stop.
    """

    def __init__(
        self, root: Path, file_bytes: int = FILE_BYTES, lock_seconds: float = LOCK_SECONDS
    ) -> None:
        self.root, self._file_bytes = root, file_bytes
        root.mkdir(parents=True, exist_ok=True)
        _sync_folder(root.parent)
        self._held = _alone(root, lock_seconds)
        self._lock = threading.Lock()
        # What a killed process wrote last may be torn: nothing is written behind it.
        self._open(max(self.files(), default=0) + 1)

    def files(self) -> list[int]:
        return sorted(int(path.stem) for path in self.root.glob("*.bin"))

    def _path(self, number: int) -> Path:
        return self.root / f"{number:010d}.bin"

    def _open(self, number: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        descriptor = os.open(self._path(number), flags, 0o600)
        try:
            _sync_folder(self.root)
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor, self._number, self._length = descriptor, number, 0

    def keep(self, blobs: Sequence[bytes]) -> list[Ref]:
        """Write payloads and sync them; where that fails, nothing of them stays.

        Raises:
            OSError: the disk is full, for example.
        """
        with self._lock:
            if self._length >= self._file_bytes:
                full = self._descriptor
                self._open(self._number + 1)
                os.close(full)
            before, refs = self._length, []
            try:
                for blob in blobs:
                    refs.append(Ref(self._number, self._length, len(blob)))
                    self._append(blob)
                os.fdatasync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, before)
                self._length = before
                raise
            return refs

    def _append(self, blob: bytes) -> None:
        view = memoryview(blob)
        while view:
            written = os.write(self._descriptor, view)
            self._length += written
            view = view[written:]

    def read(self, ref: Ref) -> bytes:
        """
        Raises:
            OSError: its file is gone, or shorter than it was.
        """
        with self._path(ref.file).open("rb") as file:
            data = os.pread(file.fileno(), ref.length, ref.start)
        if len(data) != ref.length:
            raise OSError(f"payload {ref} has {len(data)} bytes left")
        return data

    @property
    def current(self) -> int:
        """The file that is written."""
        return self._number

    def remove_below(self, limit: int, needed: Iterable[int]) -> None:
        """Remove files before `limit` of which nothing is needed."""
        kept = set(needed)
        for number in self.files():
            if number < limit and number not in kept:
                self._path(number).unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._descriptor)
        os.close(self._held)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _alone(root: Path, seconds: float) -> int:
    """A lock that goes with this process: two servers would do each operation twice."""
    descriptor = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(descriptor)
                raise ConfigError(
                    f"another server uses {root.parent}: stop it first, or name another --data-dir"
                ) from None
        time.sleep(0.1)

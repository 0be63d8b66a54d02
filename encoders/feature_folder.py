"""The folder that all runs keep features in: bounded, and never emptied under a run."""

import fcntl
import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Self

from plait.encoders.feature_cache import FeatureCache

OVERHEAD = 512
"""Bytes of a file besides its features, about."""


class FeatureFolder:
    """Held by a run from before its features are computed until it ends.

    Args:
        most_bytes: Of all files together. To make room, those go first that no run has asked for
            for the longest; while another run holds the folder, none goes.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = Path(folder), most_bytes
        self._lock: int | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        # A lock of the system's: it ends with the process, however that ends.
        self._lock = os.open(self.folder / "in-use", os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def touch(self, cache: FeatureCache, keys: Iterable[str]) -> None:
        """Note that a run asks for these features."""
        for key in keys:
            with suppress(OSError):
                os.utime(cache.path(key))

    def make_room(self, needed: int, keep: Collection[str]) -> bool:
        """Whether `needed` more bytes fit, after files that are not in `keep` went.

        Nothing goes where that would not be enough, or another run holds the folder.
        """
        assert self._lock is not None, "the folder must be held"
        files = sorted(
            (facts.st_mtime_ns, facts.st_size, path)
            for path in self.folder.glob("??/*.safetensors")
            if (facts := _facts(path)) is not None
        )
        over = sum(size for _, size, _ in files) + needed - self.most_bytes
        if over <= 0:
            return True
        going = [(size, path) for _, size, path in files if path.stem not in keep]
        if sum(size for size, _ in going) < over:
            return False
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fcntl.flock(self._lock, fcntl.LOCK_SH)  # a failed change may have let go of it
            return False
        for size, path in going:
            if over <= 0:
                break
            path.unlink(missing_ok=True)
            over -= size
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        return True


def _facts(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None

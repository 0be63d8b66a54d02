"""Locks between processes, which the kernel drops when one of them is killed."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FILE = ".lock"


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Nobody else is in `alone` or `shared` of this folder; waits for them.

    Raises:
        OSError: nothing may be written in the folder.
    """
    with _locked(root / _FILE, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX):
        yield


@contextmanager
def shared(root: Path) -> Iterator[None]:
    """Nobody is in `alone` of this folder; any number may be in `shared`."""
    if not (root / _FILE).exists():  # nobody has ever written here
        yield
        return
    with _locked(root / _FILE, os.O_RDONLY, fcntl.LOCK_SH):
        yield


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Mark a folder as one that a living process fills."""
    with _locked(folder, os.O_RDONLY, fcntl.LOCK_EX):
        yield


def is_held(folder: Path) -> bool:
    """Whether any process, this one too, is in `held` of the folder."""
    try:
        with _locked(folder, os.O_RDONLY, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
    except BlockingIOError:
        return True
    except OSError:  # it has gone
        return False


@contextmanager
def _locked(path: Path, flags: int, operation: int) -> Iterator[None]:
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        os.close(descriptor)

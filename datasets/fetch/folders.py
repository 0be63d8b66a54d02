"""Where fetched things live, and how a folder there comes into being all at once or not at all.

A folder is built beside its target, under a hidden temporary name, and renamed when it is whole:
a process killed at any moment leaves the target absent (or the old one), never half-made. A lock
file makes a second process wait for the first and then find the work done.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from plait.errors import FetchError

OWN_FOLDER = (
    "or use a folder of your own: pictures with a .txt beside each or a captions.csv, or any media "
    "with a rows.jsonl that names them (`plait train CONFIG --data my-folder`)"
)
"""What always remains where something cannot be fetched."""


def size_of(folder: Path) -> int:
    """Bytes of the files under a folder that other processes may be changing."""
    total = 0
    for root, _, files in os.walk(folder):
        for file in files:
            try:
                total += (Path(root) / file).lstat().st_size
            except OSError:  # renamed or removed since it was listed
                continue
    return total


def ensure(
    target: Path, build: Callable[[Path], None], *, ready: Callable[[Path], bool] = Path.is_dir
) -> bool:
    """Make `target` exist by calling `build(folder)` on an empty folder that is then renamed to it.

    Args:
        ready: Whether an existing target can be used as it is; otherwise it is built anew and
            replaced.

    Returns:
        Whether it had to be built.

    Raises:
        FetchError: the folder cannot be written. Whatever `build` raises passes through; nothing
            is left of its work.
    """
    if ready(target):  # the usual case takes no lock, so a read-only home works too
        return False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{target.name}.lock"):
            if ready(target):
                return False
            for stale in target.parent.glob(f".{target.name}.part-*"):
                shutil.rmtree(stale, ignore_errors=True)  # its maker was killed: we hold the lock
            part = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
            try:
                content = part / "content"
                content.mkdir()
                build(content)
                _swap(content, target, part)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise FetchError(
            f"cannot write {target}: {error.strerror or error}; free some space or set PLAIT_HOME "
            "to a folder that you can write"
        ) from error
    return True


def _swap(content: Path, target: Path, part: Path) -> None:
    content.chmod(0o755)
    if target.exists():
        target.rename(part / "old")
    content.rename(target)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel drops it when the process dies, however it dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

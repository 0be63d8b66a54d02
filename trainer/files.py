"""Writing folders so that a kill, a full disk or a crash leaves the old one or the new one."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from plait.errors import CheckpointError

ASIDE = ".writing-"
"""How the names of what is not whole yet begin."""


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `target`, synced, when the block ends without an error.

    Raises:
        CheckpointError: it cannot be written, for instance because the disk is full; what stood
            at `target` before is unchanged.
    """
    aside = target.with_name(ASIDE + target.name)
    try:
        put_back(target)
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
        yield aside
        for path in [*sorted(aside.rglob("*")), aside]:
            sync(path)
        replace_folder(target, aside)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if is_write_failure(error):
            raise CheckpointError(
                f"{target} cannot be written: {error}; free some space or choose another folder; "
                "what was saved before is unchanged"
            ) from error
        raise


def replace_folder(target: Path, aside: Path) -> None:
    """Give `aside` the name `target`; a kill on the way leaves the old one to `put_back`."""
    old = _old(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    aside.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old(target: Path) -> Path:
    return target.with_name(f"{ASIDE}old-{target.name}")


def put_back(target: Path) -> None:
    """Give `target` its old content again where a kill came between the two renames."""
    if waits_for_put_back(target):
        _old(target).rename(target)


def waits_for_put_back(target: Path) -> bool:
    """Whether a kill, or a process that is at it now, has the old content under another name."""
    return not target.exists() and _old(target).is_dir()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What others write at `path`: their failure is one of ours.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}; free some space") from error


def is_write_failure(error: BaseException) -> bool:
    """An error of the operating system, also where safetensors wraps it in its own."""
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def write_json(path: Path, values: Any) -> None:
    """Write JSON beside `path` and rename it there: a reader sees the old or the new file.

    Raises:
        CheckpointError: it cannot be written.
    """
    aside = path.with_name(ASIDE + path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            file.write(json_text(values))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except (OSError, ValueError) as error:
        with suppress(OSError):
            aside.unlink()
        if isinstance(error, ValueError):
            raise CheckpointError(
                f"{path} cannot be written: {error}; a measure that is not finite shows that the "
                "training diverged: lower the learning rate, or use a wider dtype"
            ) from error
        raise CheckpointError(f"{path} cannot be written: {error}; free some space") from error


def json_text(values: Any) -> str:
    """The text that `write_json` writes.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete what interrupted writes left in `folder`; what they meant to replace stays."""
    for path in folder.glob(f"{ASIDE}old-*"):
        put_back(path.with_name(path.name.removeprefix(f"{ASIDE}old-")))
    for path in folder.glob(f"{ASIDE}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

"""Media that are sent once and named by their SHA-256 afterwards.

root/<owner>/<sha256>         whole files
root/<owner>/.part-<sha256>   what has come of one; the sender asks how much, and goes on
"""

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

from plait.service.errors import NotFoundError, ServiceError, UnavailableError

PATIENCE = 30.0
"""Seconds that a sender may send nothing."""

_NAME = re.compile(r"[0-9a-f]{64}")


class Uploads:
    """
    Args:
        root: Holds a folder for each owner.
        most: Bytes of one file.
        together: Bytes of all files of an owner.
    """

    def __init__(self, root: Path, most: int, together: int) -> None:
        self._root, self._most, self._together = root, most, together
        self._busy: set[Path] = set()
        self._used: dict[str, int] = {}
        """Bytes of an owner's files, once they were counted."""

    def folder(self, owner: str) -> Path:
        return self._root / owner

    def whole(self, owner: str, sha256: str) -> Path:
        """
        Raises:
            NotFoundError: this owner has sent none.
        """
        path = self.folder(owner) / _checked(sha256)
        if not path.is_file():
            raise NotFoundError("upload", sha256)
        return path

    def received(self, owner: str, sha256: str) -> tuple[int, bool]:
        """Bytes that have come, and whether they are all."""
        folder, name = self.folder(owner), _checked(sha256)
        whole, part = folder / name, folder / f".part-{name}"
        if whole.is_file():
            return whole.stat().st_size, True
        return (part.stat().st_size if part.is_file() else 0), False

    async def receive(
        self, owner: str, sha256: str, offset: int, content: AsyncIterator[bytes]
    ) -> int:
        """Append what comes, from `offset` on; the bytes that are there then.

        Raises:
            ServiceError: `offset` is not where it ended, another sender is at it, or it is too
                large, or all of this owner's together. What has come stays.
        """
        await self._count(owner)
        folder = self.folder(owner)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".part-{_checked(sha256)}"
        there, whole = self.received(owner, sha256)
        if whole:
            return there
        if offset != there:
            raise ServiceError(f"{there} bytes of this upload are here: go on from there", 409)
        if part in self._busy:
            raise ServiceError("this upload is being sent already", 409)
        self._busy.add(part)
        try:
            with part.open("ab") as file:
                async for block in _patiently(content):
                    if file.tell() + len(block) > self._most:
                        raise ServiceError(f"an upload has up to {self._most} bytes", 413)
                    if self._used[owner] + len(block) > self._together:
                        raise ServiceError(
                            f"an owner's uploads have up to {self._together} bytes together: "
                            "DELETE /api/v1/media/{sha256} takes away what is not needed",
                            413,
                        )
                    await asyncio.to_thread(file.write, block)
                    self._used[owner] += len(block)
                await asyncio.to_thread(_sync, file.fileno(), file)
            return part.stat().st_size
        except OSError as error:
            raise UnavailableError(f"the disk did not take it: {error.strerror}") from error
        finally:
            self._busy.discard(part)

    async def finish(self, owner: str, sha256: str) -> Path:
        """Check what has come, and give it its name.

        Raises:
            ServiceError: it is not what its name says; it is thrown away then.
        """
        part = self.folder(owner) / f".part-{_checked(sha256)}"
        if not part.is_file():
            return self.whole(owner, sha256)
        found = await asyncio.to_thread(_sha256, part)
        if found != sha256:
            self.remove(owner, part)
            raise ServiceError(f"these bytes have the SHA-256 {found}, not {sha256}: send again")
        return part

    async def _count(self, owner: str) -> None:
        if owner not in self._used:
            used = await asyncio.to_thread(_size, self.folder(owner))
            self._used.setdefault(owner, used)

    def remove(self, owner: str, path: Path) -> None:
        """Take away a file, whole or in part, whose room is free then."""
        size = path.stat().st_size
        path.unlink()
        if owner in self._used:
            self._used[owner] -= size

    def any(self, owner: str, sha256: str) -> Path:
        """A file, whole or in part.

        Raises:
            NotFoundError: nothing of it has come.
            ServiceError: it is coming just now.
        """
        part = self.folder(owner) / f".part-{_checked(sha256)}"
        if part in self._busy:
            raise ServiceError("this upload is being sent", 409)
        return part if part.is_file() else self.whole(owner, sha256)

    def keep(self, part: Path) -> None:
        """It was looked at: it may be used from now on."""
        if part.name.startswith(".part-"):
            part.replace(part.with_name(part.name.removeprefix(".part-")))


async def _patiently(content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """
    Raises:
        ServiceError: the sender is silent: another one may go on.
    """
    while True:
        try:
            async with asyncio.timeout(PATIENCE):
                block = await anext(content)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise ServiceError("the upload comes too slowly; go on with it", 408) from None
        yield block


def _checked(sha256: str) -> str:
    if not _NAME.fullmatch(sha256):
        raise ServiceError("an upload is named by its SHA-256, 64 digits of 0-9 and a-f", 422)
    return sha256


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


def _sync(descriptor: int, file: object) -> None:
    file.flush()  # type: ignore[attr-defined]
    os.fsync(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

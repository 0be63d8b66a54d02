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

from plait.service.errors import NotFoundError, ServiceError

_NAME = re.compile(r"[0-9a-f]{64}")


class Uploads:
    """
    Args:
        root: Holds a folder for each owner.
        most: Bytes of one file.
    """

    def __init__(self, root: Path, most: int) -> None:
        self._root, self._most = root, most
        self._busy: set[Path] = set()

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
                large. What has come stays.
        """
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
                async for block in content:
                    if file.tell() + len(block) > self._most:
                        raise ServiceError(f"an upload has up to {self._most} bytes", 413)
                    await asyncio.to_thread(file.write, block)
                await asyncio.to_thread(_sync, file.fileno(), file)
            return part.stat().st_size
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
            part.unlink()
            raise ServiceError(f"these bytes have the SHA-256 {found}, not {sha256}: send again")
        return part

    def keep(self, part: Path) -> None:
        """It was looked at: it may be used from now on."""
        if part.name.startswith(".part-"):
            part.replace(part.with_name(part.name.removeprefix(".part-")))


def _checked(sha256: str) -> str:
    if not _NAME.fullmatch(sha256):
        raise ServiceError("an upload is named by its SHA-256, 64 digits of 0-9 and a-f", 422)
    return sha256


def _sync(descriptor: int, file: object) -> None:
    file.flush()  # type: ignore[attr-defined]
    os.fsync(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

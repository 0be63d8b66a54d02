"""A checkpoint's files, taken elsewhere: one tar, or addresses that are signed and end."""

import hashlib
import hmac
import secrets
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import anyio.to_thread
from fastapi.responses import FileResponse, Response, StreamingResponse

from plait.service.errors import NotFoundError, ServiceError, UnavailableError
from plait.trainer.locks import shared

SECONDS = 3600
_CHUNK = 1 << 20
_ARCHIVE = "archive.tar"
"""Under this name, all files of a checkpoint."""

_OWN = ("lifetime.json",)
"""Files that say something of this server alone."""


class Downloads:
    """Files of checkpoints under `root`.

    Args:
        clock: Seconds since the epoch.
    """

    def __init__(self, root: Path, clock: Callable[[], float]) -> None:
        self._root, self._clock = root, clock
        self._secret = secrets.token_bytes(32)
        """Of this process: addresses end with it, and are asked for again."""

    def _files(self, path: str) -> list[Path]:
        folder = self._root.joinpath(*path.removeprefix("tinker://").split("/"))
        if not (folder / "manifest.json").is_file():
            raise NotFoundError("checkpoint", path)
        return sorted(file for file in folder.iterdir() if file.name not in _OWN)

    async def archive(self, path: str) -> Response:
        """All of it as a tar, built on the disk and streamed.

        Raises:
            NotFoundError: it is gone.
        """
        file = await anyio.to_thread.run_sync(self._tarred, path)
        name = "_".join(path.removeprefix("tinker://").split("/")).replace(":", "-")
        headers = {"content-disposition": f'attachment; filename="{name}.tar"'}
        return StreamingResponse(_read(file), media_type="application/x-tar", headers=headers)

    def _tarred(self, path: str) -> IO[bytes]:
        """While nobody overwrites or removes it."""
        made = tempfile.TemporaryFile()  # noqa: SIM115  (closed when it was streamed)
        try:
            with shared(self._root), tarfile.open(fileobj=made, mode="w") as tar:
                for file in self._files(path):
                    tar.add(file, arcname=file.name)
            made.seek(0)
        except NotFoundError:
            made.close()
            raise
        except OSError as error:
            made.close()
            raise UnavailableError(f"the disk did not take it: {error.strerror}") from error
        return made

    def addresses(self, path: str, base: str) -> dict[str, Any]:
        """Of each file, under the server's own address."""
        until = int(self._clock()) + SECONDS
        made = {
            file.name: self._address(path, file.name, until, base) for file in self._files(path)
        }
        return {"urls": made, "expires": datetime.fromtimestamp(until, UTC).isoformat()}

    def archive_address(self, path: str, base: str) -> dict[str, Any]:
        """Of all of it as a tar; clients before 0.38 download checkpoints by it."""
        until = int(self._clock()) + SECONDS
        self._files(path)
        url = self._address(path, _ARCHIVE, until, base)
        return {"url": url, "expires": datetime.fromtimestamp(until, UTC).isoformat()}

    def _address(self, path: str, file: str, until: int, base: str) -> str:
        where = quote(f"{path.removeprefix('tinker://')}/{file}")
        signature = self._signature(path, file, until)
        return f"{base}/api/v1/files/{where}?until={until}&signature={signature}"

    async def file(
        self, run: str, kind: str, name: str, file: str, until: int, signed: str
    ) -> Response:
        """A file by its address.

        Raises:
            ServiceError: the address is not one that was given out, or has ended.
        """
        path = f"tinker://{run}/{kind}/{name}"
        right = hmac.compare_digest(signed.encode(), self._signature(path, file, until).encode())
        if not right or until < self._clock():
            raise ServiceError("this address is not valid any more; ask for it again", 403)
        if file == _ARCHIVE:
            return await self.archive(path)
        found = next((one for one in self._files(path) if one.name == file), None)
        if found is None:
            raise NotFoundError("file", file)
        return FileResponse(found, filename=file)

    def _signature(self, path: str, file: str, until: int) -> str:
        said = f"{path}\0{file}\0{until}".encode()
        return hmac.new(self._secret, said, hashlib.sha256).hexdigest()


def _read(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while block := file.read(_CHUNK):
            yield block

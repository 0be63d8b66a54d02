"""Unpacking what was downloaded: plain files, inside the folder, and nothing else."""

import gzip
import shutil
import tarfile
import zlib
from pathlib import Path

from plait.errors import FetchError


def unpack(tarball: Path, folder: Path, *, leave_links: bool = False) -> None:
    """Write a tarball's files, without the folder that holds them all.

    Args:
        leave_links: Leave links out, which source archives may have, instead of refusing them.

    Raises:
        FetchError: it is damaged, or an entry is a link, a device, or points outside.
        OSError: the folder cannot be written.
    """
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            for entry in archive:
                if not (leave_links and (entry.issym() or entry.islnk())):
                    _write(archive, entry, tarball, folder)
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise FetchError(f"{tarball.name} is not a whole tarball: {error}; run this again") from (
            error
        )


def _write(archive: tarfile.TarFile, entry: tarfile.TarInfo, tarball: Path, folder: Path) -> None:
    parts = entry.name.replace("\\", "/").split("/")
    plain = entry.isreg() or entry.isdir()
    if not plain or ".." in parts or not parts[0] or ":" in parts[0] or "\0" in entry.name:
        raise FetchError(
            "a tarball must hold plain files that stay inside its folder, and "
            f"{tarball.name} holds {entry.name!r}; do not use it"
        )
    target = folder.joinpath(*parts[1:])
    if entry.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    content = archive.extractfile(entry)
    if content is None or len(parts) == 1:  # a file beside the package's folder is not of it
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with content, target.open("wb") as file:
        shutil.copyfileobj(content, file)

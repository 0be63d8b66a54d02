"""A Debian package, unpacked into a folder without root and without being installed.

The system's package lists are neither used nor touched (a new machine has none): they are brought
up to date in a private folder, against the system's own sources and keys.
"""

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from plait.datasets.fetch.commands import run
from plait.datasets.fetch.folders import OWN_FOLDER, ensure, size_of
from plait.datasets.fetch.pip import RECORD, digest
from plait.datasets.fetch.progress import Progress
from plait.errors import FetchError
from plait.home import home


@dataclass(frozen=True, slots=True)
class _Offer:
    """What apt would download: the file's name and length in bytes, and its pinned SHA-256."""

    file: str
    size: int
    sha256: str


def apt_folder(name: str) -> Path:
    """Where a Debian package's tree lies once fetched."""
    return home() / "data" / name


def apt_package(
    name: str,
    *,
    version: str | None = None,
    sha256: str | None = None,
    progress: Progress,
) -> Path:
    """The folder with the unpacked tree of a Debian package, downloaded if it is not there yet.

    apt verifies signatures and hashes against the system's keys; the version and SHA-256 that it
    chose are recorded in `fetched.json`.

    Args:
        version: The version wanted; None takes the one of this Debian release.
        sha256: What the `.deb` must hash to; None trusts apt.

    Raises:
        FetchError: there is no apt here, or the package cannot be downloaded or unpacked.
    """
    wanted = f"{name}={version}" if version else name
    target = apt_folder(name)

    def ready(folder: Path) -> bool:
        record = folder / RECORD
        if not record.is_file():
            return False
        held = json.loads(record.read_text())
        return version in (None, held["version"]) and sha256 in (None, held["sha256"])

    if not ensure(target, lambda folder: _build(wanted, sha256, folder, progress), ready=ready):
        progress.say(f"{wanted}: already there, in {target}")
    return target


def _build(wanted: str, sha256: str | None, folder: Path, progress: Progress) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise FetchError(
            f"{wanted} is a Debian package and there is no apt on this machine; fetch it on a "
            f"Debian machine and copy its PLAIT_HOME, {OWN_FOLDER}"
        )
    with tempfile.TemporaryDirectory(prefix="apt-", dir=folder.parent) as work:
        deb, found = _download(wanted, Path(work), progress)
        if sha256 not in (None, found):
            raise FetchError(
                f"{wanted} must have SHA-256 {sha256} but apt downloaded {found}; ask for the "
                f"version that has it, {OWN_FOLDER}"
            )
        facts = {"name": _field(deb, "Package"), "version": _field(deb, "Version")}
        _unpack(deb, folder, progress)
        record = {"from": "apt", **facts, "sha256": found}
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _options(work: Path) -> list[str]:
    """Options that keep apt's state inside `work`, and its hands off everything else."""
    for part in ("lists/partial", "cache/archives/partial"):
        (work / part).mkdir(parents=True, exist_ok=True)
    settings = {
        "Dir::State::Lists": work / "lists",
        "Dir::Cache": work / "cache",
        "APT::Sandbox::User": "root",  # as root, apt's own user could not enter our folder
        "Acquire::Languages": "none",
        "APT::Get::List-Cleanup": "false",
        "Acquire::Retries": "3",
    }
    return ["-q", *(f"-o{key}={value}" for key, value in settings.items())]


def _download(wanted: str, work: Path, progress: Progress) -> tuple[Path, str]:
    """The `.deb` that apt downloaded and verified, and its SHA-256."""
    apt = ["apt-get", *_options(work)]
    remedy = f"see that `apt-get update` works here, {OWN_FOLDER}"
    failed: FetchError | None = None
    with progress.bar("reading the package lists", 100, "steps") as update:
        try:
            run(
                [*apt, "-oAPT::Status-Fd=1", "update"],
                doing="cannot update the package lists",
                remedy=remedy,
                hear=lambda line: update(_percent(line)),
            )
        except FetchError as error:  # one broken source of many need not matter
            failed = error
    try:
        offer = _offer(wanted, apt, remedy)
    except FetchError as error:
        raise failed or error from failed
    place = work / "debs"
    place.mkdir()
    with progress.bar(f"downloading {wanted}", offer.size) as update:
        run(
            [*apt, "download", wanted],
            doing=f"cannot download {wanted}",
            remedy=remedy,
            folder=place,
            watch=lambda: update(size_of(place) + size_of(work / "cache" / "archives")),
        )
    deb = next(place.glob("*.deb"))
    found = digest(deb)
    if offer.sha256 and found != offer.sha256:
        raise FetchError(
            f"{deb.name} must have SHA-256 {offer.sha256}, not {found}; run this again"
        )
    return deb, found


def _percent(line: str) -> int | None:
    """How far apt says it is, if this line says so."""
    match = re.match(r"dlstatus:\d+:([\d.]+):", line)
    return int(float(match[1])) if match else None


def _offer(wanted: str, apt: list[str], remedy: str) -> _Offer:
    lines = run(
        [*apt, "--print-uris", "download", wanted],
        doing=f"cannot find the Debian package {wanted}",
        remedy=remedy,
    )
    for line in lines:
        match = re.match(r"'[^']*' (\S+) (\d+)(?: SHA256:([0-9a-f]{64}))?", line)
        if match:
            return _Offer(match[1], int(match[2]), match[3] or "")
    raise FetchError(f"cannot find the Debian package {wanted}: apt offers no file; {remedy}")


def _field(deb: Path, name: str) -> str:
    remedy = "run this again"
    lines = run(["dpkg-deb", "-f", deb, name], doing=f"cannot read {deb.name}", remedy=remedy)
    return lines[0].strip() if lines else ""


def _unpack(deb: Path, folder: Path, progress: Progress) -> None:
    size = _field(deb, "Installed-Size")  # in KiB
    total = int(size) * 1024 if size.isdigit() else None
    with progress.bar(f"unpacking {deb.name}", total) as update:
        run(
            ["dpkg-deb", "-x", deb, folder],
            doing=f"cannot unpack {deb.name}",
            remedy="see that the disk has room, then run this again",
            watch=lambda: update(size_of(folder)),
        )

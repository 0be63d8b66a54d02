"""The kinds of package that bring data, and where each lies once fetched."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from plait.datasets.fetch.apt import apt_folder, apt_package
from plait.datasets.fetch.npm import NpmPackage, npm_package
from plait.datasets.fetch.pip import RECORD, PipPackage, pip_package
from plait.datasets.fetch.progress import Progress
from plait.errors import ConfigError, UnknownNameError


@dataclass(frozen=True, slots=True)
class Data:
    """A package whose `folder` (relative to the package's root) holds media or their texts.

    Raises:
        UnknownNameError: no such kind of package.
        ConfigError: a kind that must be pinned is not.
    """

    package: str
    """The kind of package: one of `KINDS`."""

    name: str
    """The package's name."""

    license: str
    """The data's licence; fetched at install time, never redistributed."""

    folder: str = ""
    """Where the data lies in it; its root by default."""

    about: str = ""
    """One line on what it holds."""

    version: str | None = None
    """The version wanted; None, for apt alone, takes what this Debian release has."""

    sha256: str | None = None
    """The package file's SHA-256; None, for apt alone, trusts its own verification."""

    size: int | None = None
    """The package file's length in bytes, for the progress bar."""

    def __post_init__(self) -> None:
        if self.package not in KINDS:
            raise UnknownNameError("kind of package", self.package, KINDS)
        if KINDS[self.package].pinned and not (self.version and self.sha256):
            raise ConfigError(
                f"{self.package} data must have version and sha256; {self.name} lacks one; add it"
            )

    @property
    def root(self) -> Path:
        """The package's folder once fetched."""
        return KINDS[self.package].root(self)

    @property
    def place(self) -> Path:
        """The data's folder once fetched."""
        return self.root / self.folder

    @property
    def fetched(self) -> bool:
        return (self.root / RECORD).is_file()

    def bring(self, progress: Progress) -> Path:
        """Fetch the package if it is not there yet; its root.

        Raises:
            FetchError: it cannot be downloaded, checked or unpacked.
        """
        return KINDS[self.package].bring(self, progress)


@dataclass(frozen=True, slots=True)
class Kind:
    """How one kind of package is found and brought."""

    root: Callable[[Data], Path]
    bring: Callable[[Data, Progress], Path]
    pinned: bool
    """Whether version and SHA-256 must be given."""


def _bring_apt(data: Data, progress: Progress) -> Path:
    return apt_package(data.name, version=data.version, sha256=data.sha256, progress=progress)


def _npm(data: Data) -> NpmPackage:
    return NpmPackage(data.name, data.version or "", data.sha256 or "", data.size)


def _pip(data: Data) -> PipPackage:
    source = data.package == "pip-source"
    return PipPackage(data.name, data.version or "", data.sha256 or "", data.size, source)


def _bring_pip(data: Data, progress: Progress) -> Path:
    held = _pip(data)
    return pip_package(
        held.name, held.version, held.sha256,
        size=held.size, source=held.source, progress=progress,
    )  # fmt: skip


KINDS: dict[str, Kind] = {
    "apt": Kind(lambda data: apt_folder(data.name), _bring_apt, pinned=False),
    "npm": Kind(
        lambda data: _npm(data).folder,
        lambda data, progress: npm_package(_npm(data), progress),
        pinned=True,
    ),
    "pip": Kind(lambda data: _pip(data).folder, _bring_pip, pinned=True),
    "pip-source": Kind(lambda data: _pip(data).folder, _bring_pip, pinned=True),
}
"""By the name that a source's file gives."""

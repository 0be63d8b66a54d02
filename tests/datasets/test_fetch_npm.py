"""npm packages: packed by npm itself from a folder, checked, unpacked without running anything."""

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from plait.datasets.fetch import Progress
from plait.datasets.fetch.archives import unpack
from plait.datasets.fetch.commands import run
from plait.datasets.fetch.npm import NpmPackage, npm_package
from plait.datasets.fetch.packages import Data
from plait.errors import FetchError

needs_npm = pytest.mark.skipif(not shutil.which("npm"), reason="no npm on this machine")

SCRIPTS = {"prepack": "touch ran", "prepare": "touch ran", "install": "touch ran"}


class Heard(Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def left(folder: Path) -> list[str]:
    """What lies in a folder, but for lock files."""
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


@pytest.fixture
def package_folder(tmp_path: Path) -> Path:
    """A package of two files, whose scripts would leave a mark."""
    folder = tmp_path / "source"
    (folder / "assets").mkdir(parents=True)
    (folder / "assets" / "a.txt").write_text("A")
    facts = {"name": "@plait/films", "version": "1.2.0", "scripts": SCRIPTS, "files": ["assets"]}
    (folder / "package.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def packed(package_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NpmPackage:
    """The pinned package, which npm packs from the folder instead of a registry."""
    monkeypatch.setattr(NpmPackage, "spec", property(lambda _: str(package_folder)))
    command = ["npm", "pack", package_folder, "--ignore-scripts", "--cache", tmp_path / "cache"]
    run(command, doing="cannot pack", remedy="see npm", folder=tmp_path)
    tarball = tmp_path / "plait-films-1.2.0.tgz"
    return NpmPackage("@plait/films", "1.2.0", hashlib.sha256(tarball.read_bytes()).hexdigest())


@needs_npm
def test_a_package_is_fetched_once_and_none_of_its_scripts_run(
    packed: NpmPackage, package_folder: Path, private_home: Path
) -> None:
    heard = Heard()
    folder = npm_package(packed, heard)
    assert folder == private_home / "data" / "plait-films-1.2.0"
    assert (folder / "assets" / "a.txt").read_text() == "A"
    record = json.loads((folder / "fetched.json").read_text())
    facts = {"from": "npm", "name": "@plait/films", "version": "1.2.0", "sha256": packed.sha256}
    assert record == facts
    assert left(private_home / "data") == ["plait-films-1.2.0"]
    assert not (package_folder / "ran").exists() and not (folder / "ran").exists()
    assert npm_package(packed, heard) == folder
    assert heard.lines == [
        "downloading @plait/films 1.2.0",
        f"@plait/films 1.2.0: already there, in {folder}",
    ]


@needs_npm
def test_a_tarball_with_another_checksum_is_refused_and_leaves_nothing(
    packed: NpmPackage, private_home: Path
) -> None:
    wrong = NpmPackage(packed.name, packed.version, "0" * 64)
    with pytest.raises(FetchError, match=f"{'0' * 64} but npm downloaded {packed.sha256}"):
        npm_package(wrong, Progress())
    assert left(private_home / "data") == []


@needs_npm
def test_another_pinned_checksum_replaces_what_is_there(
    packed: NpmPackage, package_folder: Path
) -> None:
    folder = npm_package(packed, Progress())
    record = folder / "fetched.json"
    record.write_text(record.read_text().replace(packed.sha256, "1" * 64))
    (folder / "assets" / "a.txt").write_text("old")
    assert npm_package(packed, Progress()) == folder
    assert (folder / "assets" / "a.txt").read_text() == "A"


@needs_npm
def test_a_package_that_npm_cannot_bring_is_one_clear_line(
    private_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NpmPackage, "spec", property(lambda _: str(tmp_path / "nothing")))
    with pytest.raises(FetchError, match=r"cannot download x 1: .*; see that `npm view") as got:
        npm_package(NpmPackage("x", "1", "0" * 64), Progress())
    assert "\n" not in str(got.value)
    assert left(private_home / "data") == []


def test_without_npm_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    data = Data(package="npm", name="x", version="1", sha256="0" * 64, license="MIT")
    with pytest.raises(FetchError, match=r"no npm on this machine; install.*--data my-folder"):
        data.bring(Progress())


def tarball(file: Path, *entries: tarfile.TarInfo) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        for entry in entries:
            entry.size = 3 if entry.isreg() else 0
            archive.addfile(entry, io.BytesIO(b"abc") if entry.isreg() else None)
    return file


def named(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


@pytest.mark.parametrize(
    "entry",
    [
        named("../out"),
        named("/out"),
        named("package/../../out"),
        named("C:/out"),
        named("package\\..\\..\\out"),
        named("package/link", tarfile.SYMTYPE, "/etc/passwd"),
        named("package/link", tarfile.LNKTYPE, "package/a"),
        named("package/pipe", tarfile.FIFOTYPE),
        named("package/device", tarfile.CHRTYPE),
    ],
    ids=lambda entry: f"{entry.name}-{entry.type.decode()}",
)
def test_what_is_no_plain_file_inside_is_refused(tmp_path: Path, entry: tarfile.TarInfo) -> None:
    (tmp_path / "in").mkdir()
    bad = tarball(tmp_path / "bad.tgz", entry, named("package/a"))
    with pytest.raises(FetchError, match="must hold plain files that stay inside"):
        unpack(bad, tmp_path / "in")
    assert left(tmp_path / "in") == []
    assert left(tmp_path) == ["bad.tgz", "in"]


def test_the_first_folder_may_have_any_name_and_files_beside_it_are_left(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    file = tarball(tmp_path / "a.tgz", named("pax_header"), named("films-main/deep/a.txt"))
    unpack(file, tmp_path / "in")
    assert [p.relative_to(tmp_path / "in").as_posix() for p in (tmp_path / "in").rglob("*.*")] == [
        "deep/a.txt"
    ]
    mode = (tmp_path / "in" / "deep" / "a.txt").stat().st_mode
    assert not mode & 0o111, "nothing is made executable"


def test_links_of_a_source_archive_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    links = [named("a/link", tarfile.SYMTYPE, "/etc/passwd"), named("a/hard", tarfile.LNKTYPE, "a")]
    unpack(tarball(tmp_path / "a.tgz", *links, named("a/b")), tmp_path / "in", leave_links=True)
    assert left(tmp_path / "in") == ["b"]
    with pytest.raises(FetchError, match="that stay inside"):
        unpack(tarball(tmp_path / "b.tgz", named("../b")), tmp_path / "in", leave_links=True)


def test_a_damaged_tarball_says_so(tmp_path: Path) -> None:
    content = "".join(str(n * n) for n in range(20_000)).encode()
    whole = tmp_path / "whole.tgz"
    with tarfile.open(whole, "w:gz") as archive:
        entry = named("package/a")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    cut = tmp_path / "cut.tgz"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    noise = tmp_path / "noise.tgz"
    noise.write_bytes(gzip.compress(b"not a tar" * 200))
    broken = tmp_path / "broken.tgz"
    changed = bytearray(whole.read_bytes())
    changed[20] = 7  # the first block, after a header that holds the name, is of no known type
    broken.write_bytes(changed)
    for file in (cut, noise, broken):
        (tmp_path / file.stem).mkdir()
        with pytest.raises(FetchError, match=f"{file.name} is not a whole tarball"):
            unpack(file, tmp_path / file.stem)

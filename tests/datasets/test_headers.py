"""The cache of headers: the second scan opens no file, and it never fails."""

import json
import multiprocessing
import os
import sqlite3
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image as PILImage

from plait.datasets.headers import HEADERS, HeaderCache, _from_plain
from plait.errors import MediaError
from plait.modalities import (
    Audio,
    AudioHeader,
    FrameSampling,
    Image,
    ImageHeader,
    Limits,
    MediaHeader,
    VideoHeader,
)
from plait.stream import Sample

LIMITS = Limits()


@pytest.fixture
def pictures(tmp_path: Path) -> list[Image]:
    (tmp_path / "pictures").mkdir()
    found = []
    for number in range(12):
        path = tmp_path / "pictures" / f"{number}.png"
        PILImage.new("RGB", (20 + number, 10)).save(path)
        found.append(Image(path))
    return found


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose headers are really read."""
    files: list[str] = []
    original = Image.header

    def header(self: Image, limits: Limits = LIMITS) -> ImageHeader:
        files.append(self.file)
        return original(self, limits)

    monkeypatch.setattr(Image, "header", header)
    return files


def scan(folder: Path, pictures: list[Image]) -> list[MediaHeader]:
    cache = HeaderCache(folder)
    found = [cache(picture, LIMITS) for picture in pictures]
    cache.close()
    return found


def test_the_second_scan_opens_no_file(
    tmp_path: Path, pictures: list[Image], opened: list[str]
) -> None:
    first = scan(tmp_path / "c", pictures)
    assert len(opened) == 12
    for picture in pictures:  # the same size and time, and no picture any more
        path = Path(picture.file)
        state = path.stat()
        path.write_bytes(bytes(state.st_size))
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert scan(tmp_path / "c", pictures) == first
    assert [header.width for header in first if isinstance(header, ImageHeader)] == [
        20 + number for number in range(12)
    ]
    assert len(opened) == 12


def test_a_file_that_changed_is_read_again(
    tmp_path: Path, pictures: list[Image], opened: list[str]
) -> None:
    scan(tmp_path / "c", pictures)
    PILImage.new("RGB", (99, 9)).save(pictures[3].file)
    header = scan(tmp_path / "c", pictures)[3]
    assert isinstance(header, ImageHeader)
    assert header.width == 99
    assert opened[12:] == [pictures[3].file]
    with sqlite3.connect(tmp_path / "c" / "2.sqlite") as file:
        assert file.execute("SELECT count(*) FROM headers").fetchone() == (12,), "no line twice"


def test_other_limits_are_another_question(
    tmp_path: Path, pictures: list[Image], opened: list[str]
) -> None:
    cache = HeaderCache(tmp_path / "c")
    cache(pictures[0], LIMITS)
    with pytest.raises(MediaError):
        cache(pictures[0], Limits(max_image_pixels=5))
    with pytest.raises(MediaError):
        cache(pictures[0], Limits(max_image_pixels=5))
    assert len(opened) == 3, "what is refused is tried each time"


def test_what_is_in_memory_is_read_each_time(tmp_path: Path, opened: list[str]) -> None:
    data = tmp_path / "a.png"
    PILImage.new("RGB", (8, 8)).save(data)
    cache = HeaderCache(tmp_path / "c")
    for _ in range(2):
        cache(Image(data.read_bytes()), LIMITS)
    assert len(opened) == 2
    assert not (tmp_path / "c").exists()
    with pytest.raises(MediaError):
        cache(Image(tmp_path / "missing.png"), LIMITS)


def test_every_medium_comes_back_as_it_was() -> None:
    sound = AudioHeader(samples=9, rate=8000, channels=2, format="wav", bytes=99)
    film = VideoHeader(
        seconds=1.5, width=3, height=2, fps=25.0, format="mp4", bytes=7, audio=sound,
        sampling=FrameSampling(fps=None, count=4),
    )  # fmt: skip
    silent = VideoHeader(seconds=1.0, width=3, height=2, fps=25.0, format="gif", bytes=7)
    picture = ImageHeader(width=3, height=4, format="PNG", mode="L", bytes=5)
    for header in (sound, film, silent, picture):
        plain = json.loads(json.dumps(asdict(header)))
        assert _from_plain(type(header), plain) == header
        assert type(header) in HEADERS.values()
    with pytest.raises(ValueError, match="other fields"):
        _from_plain(ImageHeader, {"width": 3, "depth": 4})


def test_a_cut_is_part_of_the_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.wav").write_bytes(b"sound")
    asked: list[float] = []

    def header(self: Audio, limits: Limits = LIMITS) -> AudioHeader:
        asked.append(self.start)
        return AudioHeader(samples=int(1000 - self.start), rate=1, channels=1, format="", bytes=5)

    monkeypatch.setattr(Audio, "header", header)
    for _ in range(2):
        cache = HeaderCache(tmp_path / "c")
        found = [cache(Audio(tmp_path / "a.wav", start=at), LIMITS) for at in (0.0, 5.0)]
        assert [one.samples for one in found if isinstance(one, AudioHeader)] == [1000, 995]
        cache.close()
    assert asked == [0.0, 5.0]


@pytest.mark.parametrize("damage", [b"no database at all" * 99, b""])
def test_a_damaged_cache_is_begun_anew(
    tmp_path: Path, pictures: list[Image], opened: list[str], damage: bytes
) -> None:
    first = scan(tmp_path / "c", pictures)
    (tmp_path / "c" / "2.sqlite").write_bytes(damage)
    assert scan(tmp_path / "c", pictures) == first
    assert len(opened) == 24
    assert scan(tmp_path / "c", pictures) == first
    assert len(opened) == 24, "it is whole again"


def test_a_damaged_line_is_read_again(tmp_path: Path, pictures: list[Image]) -> None:
    first = scan(tmp_path / "c", pictures)
    with sqlite3.connect(tmp_path / "c" / "2.sqlite") as file:
        file.execute("UPDATE headers SET header = '{\"width\": '")
    assert scan(tmp_path / "c", pictures) == first


def test_a_locked_or_unwritable_cache_is_passed_over(
    tmp_path: Path, pictures: list[Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plait.datasets.headers._WAIT_SECONDS", 0.05)
    first = scan(tmp_path / "c", pictures)
    with sqlite3.connect(tmp_path / "c" / "2.sqlite", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        PILImage.new("RGB", (77, 7)).save(pictures[0].file)
        assert len(scan(tmp_path / "c", pictures)) == 12
    (tmp_path / "file").write_bytes(b"")
    assert scan(tmp_path / "file" / "c", pictures)[1:] == first[1:]


def _scan_in_a_process(folder: Path, files: list[str]) -> None:
    scan(folder, [Image(file) for file in files])


def test_threads_and_processes_share_it(tmp_path: Path, pictures: list[Image]) -> None:
    cache = HeaderCache(tmp_path / "c")
    samples = [Sample(parts=(picture,)) for picture in pictures]
    threads = [
        threading.Thread(target=lambda: [cache.read_ahead(s, LIMITS) for s in samples])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    files = [picture.file for picture in pictures]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_scan_in_a_process, args=(tmp_path / "c", files)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for runner in (*threads, *processes):
        runner.join()
    assert all(process.exitcode == 0 for process in processes)
    cache.close()
    with sqlite3.connect(tmp_path / "c" / "2.sqlite") as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert file.execute("SELECT count(*) FROM headers").fetchone() == (12,)

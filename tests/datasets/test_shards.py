"""WebDataset shards: written and read both ways with the `webdataset` package, and damaged."""

import io
import json
import os
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import webdataset

import plait.datasets
from plait.datasets.headers import HeaderCache
from plait.datasets.policy import FailurePolicy
from plait.datasets.records import CaptionOptions, Records
from plait.datasets.records.shards.index import beside, index_of
from plait.errors import ConfigError, DataError
from plait.modalities import Audio, FileSlice, FrameSampling, Image, Limits, Text, Video
from plait.stream import Message, Sample

Write = Callable[[Path, int], None]
WriteTar = Callable[..., Path]


def png(seed: int = 0, size: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size + 4, 3), dtype=np.uint8)
    held = io.BytesIO()
    PIL.Image.fromarray(pixels).save(held, "PNG")
    return held.getvalue()


def own(tmp_path: Path, *samples: Sample) -> Records:
    return plait.datasets.open(tmp_path, reader=lambda _: list(samples), name="own")


@pytest.fixture
def rows(tmp_path: Path, write_sound: Write, write_film: Write) -> Records:
    """One row of each kind, over all media."""
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    (folder / "b.PNG").write_bytes(png(1))
    write_sound(folder / "a.wav", 3)
    write_film(folder / "a.mp4", 0)
    cut = {"path": "a.wav", "start": 0.125, "end": 0.375}
    film = {"path": "a.mp4", "count": 2, "end": 0.5}
    frames = {"frames": ["a.png", "a.png"], "fps": 4}
    held: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "a <image> b <audio>?"},
                      {"role": "assistant", "content": "grün", "weight": 0.5}],
         "images": ["a.png"], "audios": ["a.wav"], "label": "both"},
        {"text": "<video>and <image><image>", "images": ["a.png", "b.PNG"], "videos": [film]},
        {"conversations": [{"from": "human", "value": "<audio> <audio>"},
                           {"from": "gpt", "value": "two"}], "audios": [cut, "a.wav"]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "<image> as text"}]},
                      {"role": "assistant", "tool_calls": [
                          {"function": {"name": "f", "arguments": {"x": 1}}}]}], "id": "calls"},
        {"instruction": "Watch.", "output": "done", "videos": [frames]},
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in held))
    return plait.datasets.open(folder)


def said(sample: Sample) -> list[Any]:
    """Everything that a sample says, media as their bytes and cut."""

    def part(one: Any) -> Any:
        if isinstance(one, Text):
            return one.text
        return one.medium, one.digest(), one.cut, getattr(one, "sound", None)

    turns = [(m.role, [part(p) for p in m.parts], m.weight, m.tool_calls) for m in sample.messages]
    return [sample.id, sample.label, sample.group, [part(p) for p in sample.parts], turns]


def test_shards_hold_what_their_rows_say_by_number_and_in_order(
    tmp_path: Path, rows: Records
) -> None:
    written = plait.datasets.write_shards(rows, tmp_path / "shards", shard_rows=2)
    assert (written.rows, written.shards) == (5, 3)
    again = plait.datasets.open(tmp_path / "shards")
    assert len(again) == 5 and again[4].origin.file.endswith("000002.tar:000000004")
    wanted = [said(row) for row in rows]
    assert [said(row) for row in again] == wanted
    streamed = list(plait.datasets.stream(tmp_path / "shards"))
    assert [said(row) for row in streamed] == wanted
    assert all(isinstance(m.source, bytes) for m in streamed[0].media())  # type: ignore[attr-defined]
    with (tmp_path / "shards" / "000001.tar").open("rb") as file:
        assert [said(row) for row in plait.datasets.stream(file)] == wanted[2:4]
    for one, other in zip(rows[0].media(), again[0].media(), strict=True):
        assert one.header() == other.header()
        first, second = one.decode(), other.decode()
        assert np.array_equal(getattr(first, "samples", first), getattr(second, "samples", second))


def test_the_webdataset_package_reads_our_shards(tmp_path: Path, rows: Records) -> None:
    plait.datasets.write_shards(rows, tmp_path / "shards")
    urls = [str(file) for file in sorted((tmp_path / "shards").glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [one["__key__"] for one in found] == [f"{n:09d}" for n in range(5)]
    row = json.loads(found[0]["json"])
    assert row["images"] == ["0.png"] and found[0]["0.png"] == png()
    assert set(found[1]) - {"__key__", "__url__", "__local_path__"} == {
        "json", "0.mp4", "1.png", "2.png",
    }  # fmt: skip


def test_we_read_shards_that_the_webdataset_package_wrote(
    tmp_path: Path, write_sound: Write
) -> None:
    write_sound(tmp_path / "a.wav", 1)
    sound = (tmp_path / "a.wav").read_bytes()
    with webdataset.ShardWriter(str(tmp_path / "x-%03d.tar"), maxcount=2, verbose=0) as sink:
        sink.write({"__key__": "n/0", "png": png(), "txt": "A frog.", "cls": 3})
        sink.write({"__key__": "n/1", "wav": sound, "json": {"text": "a tone", "extra": 1}})
        sink.write({"__key__": "2", "0.png": png(), "1.png": png(1), "txt": "two", "npy": b"x"})
        turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "A cat."}]
        row = {"conversations": turns, "image": "coco/train/7.jpg"}
        sink.write({"__key__": "3", "jpg": png(2), "json": row})
        sink.write({"__key__": "4", "txt": "text alone"})
    records = plait.datasets.open(tmp_path, captions=CaptionOptions(template="{class}: {text}"))
    wanted = [
        ["n/0.png", "3", None, [], [
            ("user", [("image", Image(png()).digest(), "", None)], 1.0, ()),
            ("assistant", ["3: A frog."], 1.0, ())]],
        ["n/1.wav", "n", None, [], [
            ("user", [("audio", Audio(sound).digest(), "", None)], 1.0, ()),
            ("assistant", ["n: a tone"], 1.0, ())]],
        ["2", "", None, [], [
            ("user", [("image", Image(png(n)).digest(), "", None) for n in (0, 1)], 1.0, ()),
            ("assistant", ["two"], 1.0, ())]],
        ["3", "", None, [], [
            ("user", [("image", Image(png(2)).digest(), "", None), "?"], 1.0, ()),
            ("assistant", ["A cat."], 1.0, ())]],
        ["4", "", None, ["text alone"], []],
    ]  # fmt: skip
    assert [said(row) for row in records] == wanted
    streamed = plait.datasets.stream(
        sorted(tmp_path.glob("*.tar")), captions=CaptionOptions(template="{class}: {text}")
    )
    assert [said(row) for row in streamed] == wanted
    assert any(".npy (1)" in note and "extra (1)" in note for note in records.notes())


def test_preference_rows_stay_pairs(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": "Hi", "chosen": "Hello!", "rejected": "What?", "id": "x"}) + "\n"
        + json.dumps({"prompt": "Bye", "chosen": "Bye!", "rejected": "No."}) + "\n"
    )  # fmt: skip
    pairs = plait.datasets.open(tmp_path / "p.jsonl")
    plait.datasets.write_shards(pairs, tmp_path / "shards")
    again = plait.datasets.open(tmp_path / "shards")
    assert [said(row) for row in again] == [said(row) for row in pairs]
    assert [row.group for row in again] == [0, 0, 1, 1]
    assert [said(row) for row in plait.datasets.stream(tmp_path / "shards")] == list(
        map(said, pairs)
    )


def test_media_in_memory_are_written_without_loss(tmp_path: Path, write_sound: Write) -> None:
    write_sound(tmp_path / "a.wav", 1)
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    wave = np.random.default_rng(1).normal(size=500).astype(np.float32)
    sample = Sample(
        messages=(
            Message("user", (Image(pixels), Audio(wave, rate=8000), Video([pixels, 255 - pixels]),
                             Audio((tmp_path / "a.wav").read_bytes()))),
            Message("assistant", (Text("<image> stays text"),)),
        ),
        id="memory",
    )  # fmt: skip
    plait.datasets.write_shards(own(tmp_path, sample), tmp_path / "shards")
    image, sound, film, stored = plait.datasets.open(tmp_path / "shards")[0].media()
    assert np.array_equal(image.decode(), pixels)
    loaded = sound.load(Limits())
    assert loaded.rate == 8000 and np.array_equal(loaded.samples, wave)
    frames = film.decode(wanted=FrameSampling(fps=1.0))
    assert np.array_equal(frames.pixels, np.stack([pixels, 255 - pixels]))
    assert stored.source.name.endswith(".wav")  # type: ignore[attr-defined]
    answer = plait.datasets.open(tmp_path / "shards")[0].messages[1].parts
    assert answer == (Text("<image> stays text"),)


def test_a_row_that_shards_cannot_say_is_refused(tmp_path: Path) -> None:
    endless = FrameSampling(fps=2.0, max_frames=None)
    pixels = np.zeros((8, 8, 3), np.uint8)
    sample = Sample(parts=(Video([pixels], sampling=endless), Text("a")), id="x")
    with pytest.raises(DataError, match="read the same from its shard"):
        plait.datasets.write_shards(own(tmp_path, sample), tmp_path / "shards")
    assert [path.name for path in tmp_path.iterdir()] == [], "nor is what was begun"


def test_the_same_rows_give_the_same_bytes_and_a_full_folder_is_kept(
    tmp_path: Path, rows: Records
) -> None:
    for name in ("one", "two"):
        plait.datasets.write_shards(rows, tmp_path / name)
    first, second = ((tmp_path / name / "000000.tar").read_bytes() for name in ("one", "two"))
    assert first == second
    with pytest.raises(ConfigError, match="holds something"):
        plait.datasets.write_shards(rows, tmp_path / "one")
    assert (tmp_path / "one" / "000000.tar").read_bytes() == first


def test_broken_rows_stop_the_writing_or_are_left_out_by_name(
    tmp_path: Path, rows: Records
) -> None:
    (tmp_path / "rows" / "b.PNG").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"row 1.*b\.PNG"):
        plait.datasets.write_shards(rows, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    written = plait.datasets.write_shards(
        rows, tmp_path / "shards", policy=FailurePolicy(on_error="skip")
    )
    assert written.rows == 4 and [origin.row for origin, _ in written.left_out] == [1]
    again = plait.datasets.open(tmp_path / "shards")
    wanted = [said(rows[row]) for row in (0, 2, 3, 4)]
    assert [said(row) for row in again] == wanted


def test_headers_come_from_the_index_and_nothing_is_opened(tmp_path: Path, rows: Records) -> None:
    plait.datasets.write_shards(rows, tmp_path / "shards")
    asked: list[str] = []

    def read(part: Any, limits: Limits) -> Any:
        asked.append(part.file)
        return part.header(limits)

    cache = HeaderCache(tmp_path / "headers", read)
    for original, row in zip(rows, plait.datasets.open(tmp_path / "shards"), strict=True):
        for one, other in zip(original.media(), row.media(), strict=True):
            if isinstance(other.source, FileSlice):  # type: ignore[attr-defined]
                assert cache(other, Limits()) == one.header()
    assert asked == []
    (other,) = plait.datasets.open(tmp_path / "shards")[0].media()[:1]
    cache(other, Limits(max_image_pixels=10_000))  # under other limits it is read
    assert len(asked) == 1


def test_an_index_of_another_tar_is_not_believed(
    tmp_path: Path, write_tar: WriteTar, rows: Records
) -> None:
    plait.datasets.write_shards(rows, tmp_path / "shards")
    shard = tmp_path / "shards" / "000000.tar"
    records = plait.datasets.open(tmp_path / "shards")
    longer = write_tar(tmp_path / "other.tar", ("0.txt", b"other"), ("0.pad", b"x" * 200_000))
    content = shard.read_bytes()
    shard.write_bytes(longer.read_bytes())
    with pytest.raises(DataError, match="must not change"):
        records[0]
    assert plait.datasets.open(shard)[0].parts == (Text("other"),)  # scanned anew: another size
    moved = bytearray(content)
    moved[: len(content) - 512] = content[512:]  # the same size, and everything elsewhere
    shard.write_bytes(bytes(moved))
    with pytest.raises(DataError, match="index"):
        plait.datasets.open(shard)[0]


def test_rows_that_changed_places_under_an_index_are_noticed(
    tmp_path: Path, write_tar: WriteTar
) -> None:
    shard = write_tar(tmp_path / "a.tar", ("0.txt", b"short"), ("1.txt", b"rather longer"))
    index_of(shard).write(beside(shard))
    write_tar(shard, ("1.txt", b"rather longer"), ("0.txt", b"short"))
    with pytest.raises(DataError, match=r"delete the index beside it \(a\.parquet\)"):
        plait.datasets.open(shard)[0]


def test_the_index_of_somebody_s_tar_is_kept_until_it_changes(
    tmp_path: Path, write_tar: WriteTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_tar(tmp_path / "a.tar", ("0.txt", b"one"))
    assert len(plait.datasets.open(shard)) == 1 and not beside(shard).exists()
    with monkeypatch.context() as patch:
        patch.setattr("plait.datasets.records.shards.index.Archive", None)
        assert index_of(shard).key(0) == "0"
    write_tar(shard, ("0.txt", b"one"), ("1.txt", b"two"))
    os.utime(shard, ns=(1, 1))
    assert [row.id for row in plait.datasets.open(shard)] == ["0", "1"]
    for file in (Path(os.environ["PLAIT_HOME"]) / "shards").iterdir():
        file.write_bytes(b"damaged")
    assert len(plait.datasets.open(shard)) == 2


def test_a_compressed_shard_is_streamed_but_not_opened(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("0.txt")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(ConfigError, match="unpack"):
        plait.datasets.open(tmp_path / "a.tar.gz")
    assert [row.parts for row in plait.datasets.stream(tmp_path / "a.tar.gz")] == [(Text("abc"),)]


def test_a_stream_comes_through_a_pipe_and_asks_before_it_goes_elsewhere(
    tmp_path: Path, write_tar: WriteTar
) -> None:
    shard = write_tar(tmp_path / "a.tar", *[(f"{n}.txt", b"x" * 5000) for n in range(50)])
    into, out = os.pipe()

    def feed() -> None:
        with os.fdopen(out, "wb") as pipe:
            pipe.write(shard.read_bytes())

    thread = threading.Thread(target=feed)
    thread.start()
    with os.fdopen(into, "rb") as pipe:
        assert len(list(plait.datasets.stream(pipe))) == 50
    thread.join()
    with pytest.raises(ConfigError, match="remote"):
        list(plait.datasets.stream("https://example.invalid/a.tar"))
    found = plait.datasets.stream(f"file://{shard}", remote=True)
    assert sum(1 for _ in found) == 50


def test_shards_and_tables_in_one_folder_are_told_apart(
    tmp_path: Path, write_tar: WriteTar
) -> None:
    write_tar(tmp_path / "a.tar", ("0.txt", b"a"))
    (tmp_path / "rows.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(ConfigError, match="shards and tables"):
        plait.datasets.open(tmp_path)
    assert len(plait.datasets.open(tmp_path / "a.tar")) == 1
    with pytest.raises(ConfigError, match="media_dir"):
        plait.datasets.open(tmp_path / "a.tar", media_dir=tmp_path)


def test_records_of_shards_can_be_pickled_and_read_by_many_threads(
    tmp_path: Path, rows: Records
) -> None:
    import pickle
    from concurrent.futures import ThreadPoolExecutor

    plait.datasets.write_shards(rows, tmp_path / "shards", shard_rows=2)
    records = pickle.loads(pickle.dumps(plait.datasets.open(tmp_path / "shards")))
    wanted = [said(row) for row in records]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: said(records[n % 5]), range(200)))
    assert found == wanted * 40


def test_a_name_that_means_none_of_several_is_refused(tmp_path: Path, write_tar: WriteTar) -> None:
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}]
    row = json.dumps({"messages": turns, "images": ["elsewhere.png"]}).encode()
    one = write_tar(tmp_path / "one.tar", ("0.json", row), ("0.a.png", png()))
    assert plait.datasets.open(one)[0].media()[0].digest() == Image(png()).digest()
    two = write_tar(tmp_path / "two.tar", ("0.json", row), ("0.a.png", png()), ("0.b.png", png(1)))
    with pytest.raises(DataError, match=r"one of the sample's files.*elsewhere\.png"):
        plait.datasets.open(two)[0]

"""JSONL rows of messages: lazy rows, inline media, every refusal."""

import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plait.datasets.records import CaptionOptions, open_records
from plait.datasets.records.tables import jsonl
from plait.errors import ConfigError, DataError, MediaError
from plait.modalities import Image, Text
from plait.stream import Message

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*rows: Any) -> Path:
        file = tmp_path / "rows.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return file

    return write


def row(content: str = "<image>What?", images: Any = ("a.png",), **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "A frog."}]
    return {"messages": turns, "images": list(images), **more}


def test_images_stand_where_they_are_written(write: Write, tmp_path: Path) -> None:
    file = write(row("One <image> two <image>", ["a.png", "/b.png"], id=7, label="frogs"))
    (sample,) = open_records(file, name="mine")
    a, b = Image(tmp_path / "a.png"), Image(Path("/b.png"))
    assert sample.messages[0] == Message("user", (Text("One "), a, Text(" two "), b))
    assert sample.messages[1] == Message("assistant", (Text("A frog."),))
    assert (sample.id, sample.label) == ("7", "frogs")
    assert (sample.origin.dataset, sample.origin.row, sample.origin.file) == ("mine", 0, str(file))
    (moved,) = open_records(file, media_dir=tmp_path / "m")
    assert moved.media()[0] == Image(tmp_path / "m/a.png")


def test_pictures_are_dealt_over_turns_in_order(write: Write, tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    for _ in range(30):
        counts = chance.integers(0, 4, size=int(chance.integers(1, 6)))
        names = [f"{number}.png" for number in range(counts.sum())]
        turns = [{"role": "user", "content": "x<image>" * count} for count in counts]
        (sample,) = open_records(write({"messages": turns, "images": names}))
        assert [Path(part.file).name for part in sample.media()] == names
        held = [sum(isinstance(p, Image) for p in m.parts) for m in sample.messages]
        assert held == counts.tolist()


@pytest.mark.parametrize(
    ("content", "images", "said"),
    [
        ("<image><image>", ["a.png"], "2 <image> and 1 files"),
        ("<image>", ["a.png", "b.png"], "1 <image> and 2 files"),
        ("none", ["a.png"], "0 <image> and 1 files"),
        ("<image>", [], "1 <image> and 0 files"),
    ],
)
def test_marks_and_files_must_be_as_many(
    write: Write, content: str, images: list[str], said: str
) -> None:
    file = write(row(), row(content, images))
    records = open_records(file, name="mine")
    assert records[0].media()
    with pytest.raises(DataError, match=said) as caught:
        records[1]
    assert str(caught.value).endswith(f"(dataset mine, row 1, file {file})")


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        ("{", "JSON on one line"),
        ("7", "must be an object; it is a number"),
        ("[" * 100_000, "plain JSON"),
        ("{}", "must have messages, conversations"),
        ({"messages": []}, "must have messages"),
        ({"messages": "hi"}, "must be a list; it is a string"),
        (row(imagess=["a.png"]), "did you mean 'images'"),
        ({"messages": ["hi"]}, "must be an object"),
        (
            {"messages": [{"role": "user"}]},
            "a string or a list of parts; it is missing",
        ),
        ({"messages": [{"role": "user", "content": {}}]}, "it is an object"),
        ({"messages": [{"role": "asistant", "content": ""}]}, "did you mean 'assistant'"),
        ({"messages": [{"role": "user", "content": "", "contents": 1}]}, "mean 'content'"),
        ({"messages": [{"role": "user", "content": "", "weight": -1}]}, "0 or more"),
        ({"messages": [{"role": "user", "content": "", "weight": True}]}, "a boolean"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
        (row(images=[3]), "a number"),
        (row(images=["http://x/a.png"]), "remote"),
        (row(label=["x"]), "label must be a string; it is a list"),
        (row(label="a\udcff"), "label: .*lone surrogate"),
        (row(id="\ud800"), "id: .*lone surrogate"),
        ({"messages": [{"role": "user", "content": "", "weight": 10**400}]}, "0 or more"),
    ],
)
def test_a_bad_row_names_itself_and_no_other_row_suffers(write: Write, bad: Any, rule: str) -> None:
    file = write(row(), bad, row())
    records = open_records(file, name="mine")
    assert len(records) == 3
    assert records[0].media() == records[2].media()
    with pytest.raises(DataError, match=rule) as caught:
        records[1]
    assert (caught.value.origin.dataset, caught.value.origin.row) == ("mine", 1)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_bytes_that_are_not_utf8_name_their_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(row()).encode() + b'\n{"messages": "caf\xe9"}\n')
    with pytest.raises(DataError, match="UTF-8") as caught:
        open_records(file)[1]
    assert caught.value.origin.row == 1


def test_missing_picture_is_named_when_it_is_read(write: Write, tmp_path: Path) -> None:
    (sample,) = open_records(write(row()), name="mine")
    with pytest.raises(MediaError) as caught:
        sample.media()[0].header()
    placed = caught.value.at(sample.origin)
    assert (placed.origin.dataset, placed.origin.row) == ("mine", 0)
    assert placed.origin.file == str(tmp_path / "a.png")


def test_opening_and_counting_parse_no_row(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("not json", row())
    rows = jsonl.JsonlTable(file)
    monkeypatch.setattr(jsonl, "parse_row", lambda *_: pytest.fail("a row was parsed"))
    assert len(rows) == 2 and len(jsonl.JsonlTable(file)) == 2


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_lines_are_found_whatever_ends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(jsonl, "_BLOCK", block)
    chance = np.random.default_rng(block)
    for _ in range(20):
        ends = [[b"\n", b"\r\n", b"\n\n", b"\r\n\r\n"][i] for i in chance.integers(0, 4, 5)]
        ends[-1] = ends[-1] if chance.integers(2) else b""
        file = tmp_path / "rows.jsonl"
        lines = [json.dumps(row(id=str(n))).encode() for n in range(5)]
        bom = b"\xef\xbb\xbf" if chance.integers(2) else b""
        file.write_bytes(bom + b"".join(a + b for a, b in zip(lines, ends, strict=True)))
        assert [s.id for s in open_records(file)] == list("01234")


def test_empty_changed_and_vanished_files_are_refused(tmp_path: Path, write: Write) -> None:
    file = tmp_path / "rows.jsonl"
    for nothing in ("", "\n\r\n"):
        file.write_text(nothing)
        with pytest.raises(DataError, match="must have rows"):
            open_records(file)
    records = open_records(write(row()))
    write(row(), row())
    with pytest.raises(DataError, match="must not change") as caught:
        records[0]
    assert caught.value.origin.row == 0
    file.unlink()
    with pytest.raises(DataError, match="stay readable"):
        records[0]


def test_folder_with_one_jsonl_defaults_and_options(tmp_path: Path, write: Write) -> None:
    write(row(), row())
    records = open_records(tmp_path)
    assert records.dialect == "messages"
    assert [s.id for s in records] == ["rows.jsonl#0", "rows.jsonl#1"]
    assert records[-1].origin.row == 1
    with pytest.raises(ConfigError, match="take no 'captions'"):
        open_records(tmp_path, captions=CaptionOptions())


def test_weight_threads_and_pickles(write: Write) -> None:
    turns = [{"role": "assistant", "content": "x", "weight": 0}]
    file = write({"messages": turns}, *[row(id=str(n)) for n in range(1, 50)])
    records = pickle.loads(pickle.dumps(open_records(file)))
    assert records[0].messages[0].weight == 0.0
    with ThreadPoolExecutor(8) as pool:
        ids = [sample.id for sample in pool.map(records.__getitem__, range(1, 50))]
    assert ids == [str(n) for n in range(1, 50)]

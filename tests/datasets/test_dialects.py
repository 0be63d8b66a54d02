"""What rows' keys mean: every dialect, recognised without being told, forced, mixed and refused."""

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from plait.datasets.fetch import Progress, pip_package
from plait.datasets.records import open_records
from plait.errors import DataError, FetchError
from plait.modalities import Audio, Image, Text, Video
from plait.stream import Sample, render

LLAMAFACTORY = ("0.9.5", "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f")
EASY_VQA = ("1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f")


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    file = folder / name
    lines = [json.dumps(row) for row in rows]
    text = "".join(f"{line}\n" for line in lines)
    file.write_text(f"[{','.join(lines)}]" if name.endswith(".json") else text)
    return file


def said(sample: Sample) -> list[tuple[str, str]]:
    """(role, text with a mark for each medium) of every turn."""
    return [
        (m.role, "".join(p.text if isinstance(p, Text) else f"<{p.medium}>" for p in m.parts))
        for m in sample.messages
    ]


ASKED = [("user", "<image>What?"), ("assistant", "A frog.")]
TURNS = [{"role": role, "content": text} for role, text in ASKED]
ROWS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "messages": ({"messages": TURNS, "images": ["a.png"]}, ASKED),
    "sharegpt": (
        {
            "conversations": [
                {"from": "human", "value": "<image>What?"},
                {"from": "gpt", "value": "A frog."},
            ],
            "image": "a.png",
        },
        ASKED,
    ),
    "instructions": (
        {"instruction": "Translate.", "input": "a frog", "output": "une grenouille"},
        [("user", "Translate.\na frog"), ("assistant", "une grenouille")],
    ),
    "captions": ({"file": "a.png", "caption": "A frog."}, [("user", "<image>"), ASKED[1]]),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("table", ["rows.jsonl", "rows.json"])
def test_a_dialect_is_recognised_said_and_can_be_forced(
    tmp_path: Path, name: str, table: str
) -> None:
    row, turns = ROWS[name]
    file = write(tmp_path, row, name=table)
    records = open_records(file)
    assert records.dialect == name and said(records[0]) == turns
    assert any(f"recognised as dialect {name}" in note for note in records.notes())
    assert said(open_records(file, dialect=name)[0]) == turns
    other = "text" if name != "text" else "messages"
    with pytest.raises(DataError, match=f"must be of the dialect '{other}', which was asked for"):
        open_records(file, dialect=other)[0]


def test_media_of_all_kinds_stand_where_they_are_written(tmp_path: Path) -> None:
    content = "See <video> hear <audio> and <image> <audio>"
    row = {
        "messages": [{"role": "user", "content": content}, TURNS[1]],
        "images": ["a.png"],
        "audios": ["b.wav", "/c.flac"],
        "videos": ["d.mp4"],
    }
    (sample,) = open_records(write(tmp_path, row))
    assert sample.media() == (
        Video(tmp_path / "d.mp4"),
        Audio(tmp_path / "b.wav"),
        Image(tmp_path / "a.png"),
        Audio(Path("/c.flac")),
    )
    short = {**row, "audios": ["b.wav"]}
    with pytest.raises(DataError, match=r"2 <audio> and 1 files; add or remove one"):
        open_records(write(tmp_path, short))[0]


def test_openai_s_parts_hold_their_own_media(tmp_path: Path) -> None:
    png = base64.b64encode(b"not decoded here").decode()
    content = [
        {"type": "text", "text": "What "},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}},
        {"type": "input_audio", "input_audio": {"data": png, "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "d.mp4"}},
    ]
    row = {"messages": [{"role": "user", "content": content}, TURNS[1]]}
    (sample,) = open_records(write(tmp_path, row))
    image, audio, video = sample.media()
    assert image == Image(b"not decoded here") and audio == Audio(b"not decoded here")
    assert video == Video(tmp_path / "d.mp4")
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}
    turns = [{"role": "user", "content": [broken]}, TURNS[1]]
    with pytest.raises(DataError, match="base64"):
        open_records(write(tmp_path, {"messages": turns}))[0]


def test_a_file_may_hold_any_mix_of_rows(tmp_path: Path) -> None:
    rows = [row for row, _ in ROWS.values()] + [
        {"text": "All is learned: <image>", "images": ["b.png"]}
    ]
    records = open_records(write(tmp_path, *rows, name="rows.jsonl"))
    assert records.dialect == "mixed"
    assert [said(sample) for sample in records[:4]] == [turns for _, turns in ROWS.values()]
    assert records[4].parts == (Text("All is learned: "), Image(tmp_path / "b.png"))


def test_keys_that_are_not_read_are_said_and_misspelt_ones_refused(tmp_path: Path) -> None:
    row = ROWS["messages"][0]
    rows = [{**row, "source": "web"}, {**row, "source": "web", "quality": 3}, row]
    records = open_records(write(tmp_path, *rows))
    assert len(list(records)) == 3
    assert any("quality (1), source (2)" in note for note in records.notes())
    records = open_records(write(tmp_path, row, {**row, "lable": "frogs"}))
    assert records[0].label == ""
    with pytest.raises(DataError, match="did you mean 'label'") as caught:
        records[1]
    assert caught.value.origin.row == 1


PAIR = {
    "prompt": "Name it.",
    "chosen": [{"role": "assistant", "content": "A frog."}],
    "rejected": [{"role": "assistant", "content": "A car."}],
}


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"instruction": "Name it.", "chosen": "A frog.", "rejected": "A car."},
        {
            "conversations": [{"from": "human", "value": "Name it."}],
            "chosen": {"from": "gpt", "value": "A frog."},
            "rejected": {"from": "gpt", "value": "A car."},
        },
        {
            "prompt": "Name it.",
            "chosen": [{"role": "user", "content": "Name it."}, PAIR["chosen"][0]],
            "rejected": [{"role": "user", "content": "Name it."}, PAIR["rejected"][0]],
        },
    ],
)
def test_a_preference_row_is_two_documents_of_one_group(tmp_path: Path, row: Any) -> None:
    records = open_records(write(tmp_path, row, row))
    assert records.dialect == "preference" and len(records) == 4
    samples = list(records)
    assert [sample.group for sample in samples] == [0, 0, 1, 1]
    assert [said(s)[-1][1] for s in samples] == ["A frog.", "A car."] * 2
    assert all(said(s)[0] == ("user", "Name it.") for s in samples)
    assert len({(s.origin.dataset, s.origin.row) for s in samples}) == 4
    assert len({s.id for s in samples}) == 4
    assert any("two documents of one group" in note for note in records.notes())


def test_tool_calls_and_their_answers(tmp_path: Path) -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    row = {
        "conversations": [
            {"from": "human", "value": "1 + 1?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "2."},
        ]
    }
    (sample,) = open_records(write(tmp_path, row))
    assert [m.role for m in sample.messages] == ["user", "assistant", "tool", "assistant"]
    assert sample.messages[1].tool_calls == ({"type": "function", "function": call},)


def test_parquet_and_csv_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [{"file": "a.png", "caption": "A frog.", "label": "animals"},
            {"file": "b.wav", "caption": "A croak.", "label": "animals"},
            {"file": "c.mp4", "caption": "A jump.", "label": "animals"}]  # fmt: skip
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=2
    )
    lines = ["file,caption,label", *(",".join(row.values()) for row in rows)]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    tables = [open_records(tmp_path / f"rows.{kind}") for kind in ("parquet", "csv")]
    for records in tables:
        assert records.dialect == "captions"
        assert [sample.media()[0].medium for sample in records] == ["image", "audio", "video"]
    assert [s.messages for s in tables[0]] == [s.messages for s in tables[1]]
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:200])
    with pytest.raises(DataError, match="Parquet"):
        open_records(tmp_path / "cut.parquet")


def test_a_row_of_a_hundred_megabytes_is_one_broken_row(tmp_path: Path) -> None:
    file = write(tmp_path, ROWS["messages"][0])
    with file.open("ab") as content:
        content.write(b'{"text": "' + b"x" * 100_000_000 + b'"}\n')
        content.write(json.dumps({"text": "fine"}).encode() + b"\n")
    records = open_records(file)
    assert len(records) == 3 and records[2].parts == (Text("fine"),)
    with pytest.raises(DataError, match=r"at most 16,000,000 bytes; this one has 100,0"):
        records[1]


def test_addresses_are_only_fetched_when_asked(tmp_path: Path, private_home: Path) -> None:
    picture = tmp_path / "far" / "a.png"
    picture.parent.mkdir()
    picture.write_bytes(b"a picture's bytes")
    row = {"messages": TURNS, "images": [picture.as_uri()]}
    file = write(tmp_path, row)
    with pytest.raises(DataError, match="remote"):
        open_records(file)[0]


def test_a_reader_of_one_s_own_is_a_function(tmp_path: Path) -> None:
    import plait.datasets

    file = tmp_path / "poems.txt"
    file.write_text("one\ntwo\n")

    def poems(path: Path) -> Any:
        for line in path.read_text().splitlines():
            yield plait.Sample(parts=(plait.Text(line),))

    rows = plait.datasets.open(file, reader=poems)
    assert [sample.parts for sample in rows] == [(Text("one"),), (Text("two"),)]
    assert [sample.origin.row for sample in rows] == [0, 1]


@pytest.fixture
def llamafactory(private_home: Path) -> Path:
    try:
        version, sha256 = LLAMAFACTORY
        folder = pip_package("llamafactory", version, sha256, source=True, progress=Progress())
    except FetchError as error:
        pytest.skip(f"the source archive cannot be had: {error}")
    return folder / "data"


@pytest.mark.weights
@pytest.mark.parametrize(
    ("file", "dialect", "documents", "media"),
    [
        ("mllm_demo.json", "messages", 6, {"image"}),
        ("mllm_audio_demo.json", "messages", 3, {"audio"}),
        ("mllm_video_demo.json", "messages", 3, {"video"}),
        ("alpaca_en_demo.json", "instructions", 999, set()),
        ("dpo_en_demo.json", "preference", 600, set()),
        ("glaive_toolcall_en_demo.json", "sharegpt", 300, set()),
    ],
)
def test_llamafactory_s_demos_load_without_being_told(
    llamafactory: Path, file: str, dialect: str, documents: int, media: set[str]
) -> None:
    records = open_records(llamafactory / file, media_dir=llamafactory)
    assert records.dialect == dialect and len(records) == documents
    samples = list(records)
    assert {part.medium for sample in samples for part in sample.media()} == media
    assert all(sample.messages[-1].role == "assistant" for sample in samples)
    for part in {p for sample in samples for p in sample.media()}:
        part.header()


@pytest.mark.weights
def test_easy_vqa_loads_without_being_told(private_home: Path) -> None:
    try:
        version, sha256 = EASY_VQA
        folder = pip_package("easy-vqa", version, sha256, progress=Progress())
    except FetchError as error:
        pytest.skip(f"the package cannot be had: {error}")
    records = open_records(next(folder.rglob("train/questions.json")))
    assert records.dialect == "instructions" and len(records) > 38_000
    sample = records[0]
    assert [part.medium for part in sample.media()] == ["image"]
    assert sample.media()[0].header().width == 64
    assert sample.messages[0].parts[-1].text.endswith("?")
    assert sample.messages[1].role == "assistant"


def test_rows_render_as_they_are_labelled(tmp_path: Path, tiny_language: Path) -> None:
    from transformers import AutoTokenizer

    from plait.encoders.layouts.plain import PlainLayout

    tokenizer = AutoTokenizer.from_pretrained(tiny_language)
    rows = [
        {"conversations": [{"from": "human", "value": "the red"}, {"from": "gpt", "value": "disc"},
                           {"from": "human", "value": "a"}, {"from": "gpt", "value": "bar"}]},
        {"instruction": "the red", "output": "disc"},
        {"text": "a big cross"},
    ]  # fmt: skip
    learned = []
    for sample in open_records(write(tmp_path, *rows)):
        document = render(sample, tokenizer, PlainLayout({}))
        targets = document.targets[document.weights > 0]
        learned.append(tokenizer.decode(targets).replace("<end>", "|"))
    assert learned == ["disc|bar|", "disc|", " big cross|"]

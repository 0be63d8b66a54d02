"""Every row looked at without training: described, or a problem with its place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from plait.datasets.decoding import Decoder
from plait.datasets.headers import HeaderCache
from plait.datasets.records import Records, open_records
from plait.datasets.survey import Survey, survey
from plait.errors import DataError
from plait.modalities import Limits
from plait.stream import Sample

Write = Callable[[Path, int], None]


def turns(asked: str, answer: str, **keys: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": said, **keys}


@pytest.fixture
def rows(tmp_path: Path, write_sound: Write, write_film: Write) -> Records:
    """Twelve rows: seven good, two of which say the same, one with an empty answer; five broken."""
    pixels = np.zeros((20, 30, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png")
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "b.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:700])
    write_sound(tmp_path / "a.wav", 1)
    write_film(tmp_path / "a.mp4", 1)
    held: list[Any] = [
        turns("<image>?", "black", images=["a.png"], label="dark"),
        turns("<image>?", "noise", images=["b.jpg"], label="light"),
        turns("<image>?", "black", images=["a.png"], label="dark"),  # again
        turns("<audio>?", "a tone", audios=["a.wav"]),
        turns("<video><image>", "both", images=["a.png"], videos=["a.mp4"]),
        {"text": "text alone"},
        turns("say nothing", " "),
        turns("<image>?", "gone", images=["gone.png"]),
        turns("<image>?", "no file"),
        turns("<image>?", "cut off", images=["cut.jpg"]),  # its header is whole
        {"mesages": []},
        "broken",
    ]
    lines = [row if row == "broken" else json.dumps(row) for row in held]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return open_records(tmp_path / "rows.jsonl")


def look(tmp_path: Path, rows: Records, **options: Any) -> Survey:
    return survey(rows, HeaderCache(tmp_path / "headers"), **options)


def places(found: Survey, *, warnings: bool) -> dict[int | None, str]:
    return {p.origin.row: p.message for p in found.problems if p.warning is warnings}


def test_every_row_is_described_or_a_problem(tmp_path: Path, rows: Records) -> None:
    found = look(tmp_path, rows)
    errors = places(found, warnings=False)
    assert sorted(errors) == [7, 8, 10, 11]  # type: ignore[type-var]
    assert "must exist" in errors[7] and "<image>" in errors[8] and "messages" in errors[10]
    assert len(found.characters) + len(errors) == found.rows == 12
    warned = places(found, warnings=True)
    assert "row 0" in warned[2] and "empty" in warned[6] and len(warned) == 2
    assert found.labels == {"dark": 2, "light": 1}
    assert found.kinds == {"image + text": 4, "audio + text": 1, "image + video + text": 1,
                           "text": 2}  # fmt: skip


def test_media_are_counted_and_measured(tmp_path: Path, rows: Records) -> None:
    found = look(tmp_path, rows).media
    assert {medium: facts.count for medium, facts in found.items()} == {
        "image": 5, "audio": 1, "video": 1,
    }  # fmt: skip
    assert found["image"].formats == {"PNG": 3, "JPEG": 2}
    assert found["image"].numbers["width"] == [30.0] * 5
    assert found["audio"].numbers["seconds"] == [0.5]
    assert found["video"].numbers["seconds"] == pytest.approx([1.0])


def test_decoding_finds_what_headers_do_not_say(tmp_path: Path, rows: Records) -> None:
    with Decoder() as decoder:
        found = look(tmp_path, rows, decode=lambda part: decoder.decode(part, Limits()))
    errors = places(found, warnings=False)
    assert sorted(errors) == [7, 8, 9, 10, 11]  # type: ignore[type-var]
    assert "must be whole" in errors[9]


def test_what_cannot_be_rendered_is_a_problem_with_its_place(tmp_path: Path, rows: Records) -> None:
    def inspect(sample: Sample) -> int:
        if sample.parts:
            raise DataError("bare text is refused here")
        return 7

    found = look(tmp_path, rows, inspect=inspect, workers=0)
    assert places(found, warnings=False)[5] == "bare text is refused here"
    assert found.positions == [7] * 7


def test_progress_ends_at_all_rows(tmp_path: Path, rows: Records) -> None:
    steps: list[tuple[int, int]] = []
    look(tmp_path, rows, progress=lambda done, of: steps.append((done, of)))
    assert steps[0] == (0, 12) and steps[-1] == (12, 12)

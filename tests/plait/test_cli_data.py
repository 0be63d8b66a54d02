"""`plait convert`, `plait lint` and `plait info`, as a user types them."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import plait.datasets
from plait.cli import main


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def spreadsheet(tmp_path: Path, picture_folder: Path) -> Path:
    """A folder with pictures and a spreadsheet of their names and captions."""
    folder = tmp_path / "mine"
    folder.mkdir()
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "caption", "class"])
        for picture in sorted(picture_folder.rglob("*.png")):
            name = f"{picture.parent.name}-{picture.name}"
            (folder / name).write_bytes(picture.read_bytes())
            table.writerow([name, picture.with_suffix(".txt").read_text(), picture.parent.name])
    return folder


def test_a_spreadsheet_becomes_shards_is_previewed_and_trains(
    capsys: pytest.CaptureFixture[str], spreadsheet: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    code, out, _ = run(capsys, "convert", spreadsheet, shards)
    assert code == 0 and "36 rows in 1 shards" in out.replace("\n", " ")
    code, out, _ = run(capsys, "info", shards, "--recipe", tiny_recipe)
    assert code == 0
    for words in ("captions", "36", "3 classes", "bar (12)", "PNG 36", "packs of 64", "width"):
        assert words in out
    assert run(capsys, "lint", shards, "--recipe", tiny_recipe, "--decode")[0] == 0
    page = tmp_path / "page.html"
    code, _, _ = run(capsys, "preview", tiny_recipe, "--data", shards, "--rows", "3", "--out", page)
    assert code == 0 and page.read_text().count("data:image/") == 3
    assert run(capsys, "train", tiny_recipe, "--data", shards, "--set", "train.steps=4")[0] == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["data"]["classes"] == ["bar", "disc", "square"]
    assert metrics["test"]["class_accuracy"] is not None, "the recipe's caption template holds"


def test_training_from_shards_is_training_from_the_files(
    capsys: pytest.CaptureFixture[str], picture_folder: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    assert run(capsys, "convert", picture_folder, tmp_path / "shards", "--shard-mb", "1")[0] == 0
    losses = []
    for name, data in (("files", picture_folder), ("tars", tmp_path / "shards")):
        folder = tmp_path / name
        words = ("--data", data, "--run-dir", folder, "--set", "train.steps=4")
        assert run(capsys, "train", tiny_recipe, *words)[0] == 0
        losses.append((folder / "losses.csv").read_text())
    assert losses[0] == losses[1]


def test_convert_stops_at_a_broken_row_or_lists_it(
    capsys: pytest.CaptureFixture[str], spreadsheet: Path, tmp_path: Path
) -> None:
    (spreadsheet / "bar-00.png").write_bytes(b"broken")
    code, _, err = run(capsys, "convert", spreadsheet, tmp_path / "shards")
    assert code == 2 and "bar-00.png" in err and err.count("\n") == 1
    assert not (tmp_path / "shards").exists()
    code, out, _ = run(capsys, "convert", spreadsheet, tmp_path / "shards", "--skip-broken")
    assert code == 0 and "left out 1 broken rows" in out
    (line,) = (tmp_path / "shards.left-out.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 0 and "bar-00.png" in json.loads(line)["file"]
    assert len(plait.datasets.open(tmp_path / "shards")) == 35


def test_lint_prints_each_problem_and_exits_2(
    capsys: pytest.CaptureFixture[str], spreadsheet: Path, tmp_path: Path
) -> None:
    code, out, err = run(capsys, "lint", spreadsheet)
    assert code == 0 and "36 rows, none broken" in out and not err
    for number in range(7):
        (spreadsheet / f"bar-{number:02d}.png").unlink()
    file = tmp_path / "problems.jsonl"
    code, out, err = run(capsys, "lint", spreadsheet, "--out", file)
    assert code == 2 and "7 of 36" in err
    assert out.count("must exist; there is no such file") == 5, "five of each rule are shown"
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [one["row"] for one in found] == list(range(7))
    assert {one["kind"] for one in found} == {"error"}


def test_lint_with_a_recipe_finds_what_its_model_cannot_read(
    capsys: pytest.CaptureFixture[str], tiny_recipe: Path, tmp_path: Path,
    write_sound: Callable[[Path, int], None],
) -> None:  # fmt: skip
    write_sound(tmp_path / "a.wav", 1)
    rows = [
        {"text": "short"},
        {"text": "long " * 100},
        {"text": "<audio>", "audios": ["a.wav"]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = ("lint", tmp_path / "rows.jsonl", "--recipe", tiny_recipe)
    code, out, err = run(capsys, *words)
    assert code == 2 and "2 of 3" in err
    assert "each medium needs an encoder" in out and "must fit in a pack" in out
    code, _, err = run(capsys, *words, "--set", "data.broken.too_long=truncate")
    assert code == 2 and "1 of 3" in err
    code, _, err = run(capsys, "lint")
    assert code == 2 and "name the rows" in err

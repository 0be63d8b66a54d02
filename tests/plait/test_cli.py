"""The command line on good and bad input: exit codes, one line, nothing half-written."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image as PILImage

from plait.cli import main


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def changed(recipe: Path, **settings: object) -> Path:
    """The recipe with dotted settings replaced."""
    values = yaml.safe_load(recipe.read_text())
    for key, value in settings.items():
        *sections, last = key.split("__")
        inner = values
        for section in sections:
            inner = inner[section]
        inner[last] = value
    recipe.write_text(yaml.safe_dump(values, sort_keys=False))
    return recipe


def test_the_demo_s_commands_on_other_classes_and_another_model(
    capsys: pytest.CaptureFixture[str], tiny_recipe: Path, tmp_path: Path
) -> None:
    source = tmp_path / "own.yaml"
    source.write_text("about: nothing but what is here already\n")
    assert run(capsys, "fetch", source)[0] == 0
    code, out, err = run(capsys, "train", tiny_recipe)
    assert (code, err) == (0, "")
    assert "class accuracy" in out
    code, out, _ = run(capsys, "report", tmp_path / "run")
    assert code == 0 and "report.html" in out

    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for scores in (metrics["test"], metrics["before"]):
        assert scores["count"] == 6
        assert all(scores[key] is not None for key in ("nll_matched", "nll_shuffled"))
        assert 0 <= scores["class_accuracy"] <= 1
    assert metrics["test"]["nll_matched"] < metrics["before"]["nll_matched"]
    assert metrics["seconds"]["total"] > 0 and metrics["peak_memory_mb"] > 0
    assert metrics["data"]["classes"] == ["bar", "disc", "square"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/") == 3 and "disc" in page

    code, out, _ = run(capsys, "train", tiny_recipe)
    assert code == 0 and "is finished" in out


def test_fetch_without_a_name_lists_what_can_be_brought(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = run(capsys, "fetch")
    assert code == 0
    assert out == run(capsys, "fetch", "--list")[1]
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert {"films", "plaited", "sounds", "speech", "stamps", "words"} <= set(lines)
    assert lines["speech"].endswith("(CC-BY-SA-3.0)")
    assert "MIT" in lines["plaited"] and "GPL-2" in lines["plaited"], "what it includes counts"


def test_sample_plan_preview_and_info(
    capsys: pytest.CaptureFixture[str], tiny_recipe: Path, tmp_path: Path, picture_folder: Path
) -> None:
    assert run(capsys, "train", tiny_recipe)[0] == 0
    picture = picture_folder / "disc" / "00.png"
    code, out, _ = run(capsys, "sample", tmp_path / "run", "--image", picture, "--max-tokens", "5")
    assert code == 0 and out.startswith(f"{picture}: ")

    code, out, _ = run(capsys, "plan", tiny_recipe)
    assert code == 0
    for words in ("positions of image", "fill of a pack", "largest pack", "trainable", "frozen"):
        assert words in out
    predicted = float(out.split("predicted peak memory: ")[1].split()[0])
    assert predicted > 100

    page = tmp_path / "page.html"
    assert run(capsys, "preview", tiny_recipe, "--rows", "3", "--out", page)[0] == 0
    assert page.read_text().count("data:image/") == 3

    for path in ([], [tmp_path / "run"], [picture_folder]):
        code, out, _ = run(capsys, "info", *path)
        assert code == 0 and out
    (best,) = (tmp_path / "run" / "checkpoints").glob("best-*")
    assert "encoders.safetensors" in run(capsys, "info", best)[1].replace("\n", "")


def truncated(folder: Path) -> None:
    file = folder / "disc" / "00.png"
    file.write_bytes(file.read_bytes()[:200])


def enormous(folder: Path) -> None:
    PILImage.fromarray(np.zeros((300, 300), np.uint8)).save(folder / "disc" / "00.png")


def emptied(folder: Path) -> None:
    for file in folder.rglob("*.*"):
        file.unlink()


BROKEN_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "00.png"),
    "enormous": (enormous, "pixels"),
    "emptied": (emptied, "a dataset must have rows"),
}


@pytest.mark.parametrize("name", BROKEN_FOLDERS)
def test_a_broken_folder_is_one_line_and_code_2(
    name: str, capsys: pytest.CaptureFixture[str], tiny_recipe: Path, tmp_path: Path,
    picture_folder: Path,
) -> None:  # fmt: skip
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(picture_folder, folder)
    damage, words = BROKEN_FOLDERS[name]
    damage(folder)
    recipe = changed(tiny_recipe, data__limits={"max_image_pixels": 10_000})
    code, _, err = run(capsys, "train", recipe, "--data", folder)
    assert code == 2, err
    assert err.count("\n") == 1 and err.startswith("error: ") and words in err
    assert not (tmp_path / "run" / "metrics.json").exists()


def rows(tmp_path: Path, *entries: object) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def conversation(picture: Path, text: str = "<image>", answer: str = "a red disc") -> object:
    return {
        "messages": [
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ],
        "images": [str(picture)],
    }


def test_bad_rows_are_named(
    capsys: pytest.CaptureFixture[str], tiny_recipe: Path, tmp_path: Path, picture_folder: Path
) -> None:
    picture = picture_folder / "disc" / "00.png"
    good = conversation(picture)
    cases = {
        "two <image>": conversation(picture, "<image><image>"),
        "missing.png": conversation(tmp_path / "missing.png"),
        "labelled token": {"messages": [{"role": "user", "content": "hello"}], "images": []},
        "positions": conversation(picture, answer="a red disc " * 60),
    }
    for words, bad in cases.items():
        file = rows(tmp_path, *[good] * 12, bad)
        overrides = ["--set", "data.split.test=2", "--set", "data.split.validation=0"]
        code, _, err = run(capsys, "train", tiny_recipe, "--data", file, *overrides)
        assert code == 2, (words, err)
        assert err.count("\n") == 1 and "row 12" in err, err
        assert words.split()[-1] in err, err
        assert not (tmp_path / "run").exists()


def test_bad_recipes_name_the_thing_and_the_remedy(
    capsys: pytest.CaptureFixture[str], tiny_recipe: Path, tmp_path: Path
) -> None:
    cases = {
        "train.stepps=3": "did you mean 'steps'",
        "model.encoders.image.name=hf_vison": "did you mean 'hf_vision'",
        "model.language=no-such-model": "no-such-model",
        "model.encoders.image.projector=mpl": "did you mean 'mlp'",
        "model.template='no answer here'": "does not write turn 0",
        "train.capacity=6": "positions",
        "model.train=[vision]": "",
    }
    for override, words in cases.items():
        code, _, err = run(capsys, "train", tiny_recipe, "--set", override, "--fresh")
        if override == "model.train=[vision]":
            assert code == 0, err
            continue
        assert code == 2, (override, err)
        assert err.count("\n") == 1 and words in err, err
    assert run(capsys, "train", tmp_path / "none.yaml")[0] == 2
    assert run(capsys, "report", tmp_path)[0] == 2
    assert run(capsys, "sample", tmp_path, "--image", tmp_path / "no.png")[0] == 2


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_is_a_failure(lines: int) -> None:
    """As in `plait ... | head -1`: at the first line, or when the last of it is written."""
    program = (
        "import sys, plait.cli as cli\n"
        f"cli._info = lambda words: [print('a line') for _ in range({lines})]\n"
        "sys.exit(cli.main(['info']))\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program],
            stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_another_recipe_does_not_overwrite_a_run(
    capsys: pytest.CaptureFixture[str], tiny_recipe: Path, tmp_path: Path
) -> None:
    assert run(capsys, "train", tiny_recipe)[0] == 0
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    code, _, err = run(capsys, "train", tiny_recipe, "--set", "train.learning_rate=0.1")
    assert code == 2 and "--fresh" in err
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    folder = tmp_path / "not-a-run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    code, _, err = run(capsys, "train", tiny_recipe, "--run-dir", folder, "--fresh")
    assert code == 2 and (folder / "thesis.txt").exists()

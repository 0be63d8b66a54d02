"""The README's and the examples' code runs as it stands, on real weights."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from plait.cli import main
from plait.trainer.config import load_config, plain
from plait.trainer.manifest import digest_of, verify

ROOT = Path(__file__).resolve().parents[1]


def python_blocks(page: str = "README.md") -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def rows_blocks() -> list[str]:
    return re.findall(r"```json\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a picture of one's own."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "cat.png").write_bytes((picture_folder / "disc" / "00.png").read_bytes())
    monkeypatch.chdir(folder)
    return folder


def test_a_trained_run_captions_a_picture(
    here: Path, tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tiny_recipe), "--run-dir", "runs/stamps"]) == 0
    capsys.readouterr()
    exec(compile(python_blocks()[0], "README.md", "exec"), {})
    from_python = capsys.readouterr().out
    words = ["sample", "runs/stamps", "--image", "cat.png", "--max-tokens", "24"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"cat.png: {from_python.strip()}\n"


def test_rows_of_any_kind_are_opened(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "rows.jsonl").write_text(rows_blocks()[0])
    exec(compile(python_blocks()[1], "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("3 (Message(role='user'")


def test_shards_are_read_by_number_and_in_order(
    here: Path, picture_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(picture_folder), "shards"]) == 0
    capsys.readouterr()
    exec(compile(python_blocks()[2], "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[0] == "bar/00.png bar"


@pytest.mark.weights
def test_the_loop_learns_its_one_picture(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(python_blocks()[3], "README.md", "exec"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 20
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.weights
def test_the_page_of_primitives_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del here
    names: dict[str, object] = {}
    for block in python_blocks("docs/primitives.md"):
        exec(compile(block, "docs/primitives.md", "exec"), names)
    assert 0 < float(capsys.readouterr().out) < 20


@pytest.mark.weights
def test_the_page_of_checkpoints_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del here
    (block,) = python_blocks("docs/checkpoints.md")
    exec(compile(block, "docs/checkpoints.md", "exec"), {})
    said, cursor = capsys.readouterr().out.splitlines()
    path, digest = said.split()
    folder = Path("runs/states") / path.removeprefix("tinker://")
    assert digest_of(verify(folder)) == digest and cursor == "{'row': 0}"


def test_the_launch_template_is_the_recipe() -> None:
    module = runpy.run_path(str(ROOT / "examples" / "stamps_launch.py"))
    recipe = load_config(ROOT / "configs" / "stamps.yaml")
    template = module["recipe"]("fetched:stamps", recipe.train.steps)
    assert plain(template) == plain(recipe) | {"name": "stamps-launch"}


@pytest.mark.slow
@pytest.mark.weights
def test_the_examples_run_on_a_folder_of_one_s_own(here: Path, picture_folder: Path) -> None:
    for number, file in enumerate(sorted(picture_folder.rglob("*.png"))[::3]):
        to = here / "pictures" / file.parent.name / f"{number}.png"
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(file.read_bytes())
        to.with_suffix(".txt").write_bytes(file.with_suffix(".txt").read_bytes())
    for name in ("stamps_loop.py", "stamps_launch.py"):
        done = subprocess.run(
            [sys.executable, ROOT / "examples" / name, "pictures", "2"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert (here / "runs" / "stamps-launch" / "report.html").is_file()


def test_every_path_that_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"\]\(([\w/.-]+)\)", text) + re.findall(
        r"^\| `([\w]+/)`", text, re.MULTILINE
    )
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []

"""The page's encoder, installed as a package of its own, trains in a mixed run."""

import json
import os
import re
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image as PILImage
from safetensors.torch import load_file

import plait

ROOT = Path(plait.__file__).absolute().parents[1]
PAGE = ROOT / "docs" / "own-encoder.md"


def blocks() -> dict[str, str]:
    """The page's code by language."""
    return dict(re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))


def run(*words: object, cwd: Path, path: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    outside = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *(str(word) for word in words)],
        cwd=cwd, env=kept | outside, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder into which pip has installed the page's package."""
    package, site = tmp_path / "package", tmp_path / "site"
    package.mkdir()
    (package / "loudness.py").write_text(blocks()["python"])
    build = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
    (package / "pyproject.toml").write_text(f"{build}\n{blocks()['toml']}")
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--target", site)
    run("-m", "pip", "install", "--quiet", *flags, package, cwd=tmp_path, path="")
    return site


def mixed_rows(folder: Path) -> Path:
    """Twenty-four rows: text alone, with a picture, with a sound of any length."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows = []
    for number in range(24):
        medium = ("", "image", "audio")[number % 3]
        said = [
            {"role": "user", "content": f"{medium and f'<{medium}>'}what"},
            {"role": "assistant", "content": f"a {('disc', 'bar')[number % 2]} {number}"},
        ]
        row: dict[str, Any] = {"id": str(number), "messages": said}
        if medium == "image":
            pixels = generator.integers(0, 256, (32, 32, 3), np.uint8)
            PILImage.fromarray(pixels).save(folder / f"{number}.png")
            row["images"] = [f"{number}.png"]
        if medium == "audio":
            samples = generator.integers(-9_000, 9_000, 1_000 * number, np.int16)
            with wave.open(str(folder / f"{number}.wav"), "wb") as file:
                file.setparams((1, 2, 11_025, 0, "NONE", ""))
                file.writeframes(samples.tobytes())
            row["audios"] = [f"{number}.wav"]
        rows.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder / "rows.jsonl"


def test_the_page_is_short() -> None:
    assert len(PAGE.read_text().splitlines()) < 60


def test_an_installed_encoder_trains_in_a_mixed_run(
    tmp_path: Path, site: Path, tiny_values: dict[str, Any]
) -> None:
    model = tiny_values["model"]
    encoders = model["encoders"] | yaml.safe_load(blocks()["yaml"])
    train = {"steps": 4, "validate_every": 2, "checkpoint_every": 2, "capacity": 128}
    split = {"test": 4, "validation": 4, "near_duplicate_bits": None}
    recipe = tmp_path / "recipe.yaml"
    values = tiny_values | {
        "data": {"path": str(mixed_rows(tmp_path / "rows")), "split": split},
        "model": model | {"encoders": encoders, "train": ["language", "projector", "audio"]},
        "train": tiny_values["train"] | train,
        "run_dir": str(tmp_path / "run"),
        "evaluation": {"captions": 0},
    }
    recipe.write_text(yaml.safe_dump(values))
    path = f"{site}{os.pathsep}{ROOT}"
    run("-m", "plait.cli", "train", recipe, cwd=tmp_path, path=path)
    program = "from plait.encoders.registry import create; print(create('loudness').__module__)"
    assert run("-c", program, cwd=tmp_path, path=path).strip() == "loudness"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["parameters"]["audio"]["trainable"] == 8
    (newest, *_) = sorted((tmp_path / "run" / "checkpoints").glob("step-*"), reverse=True)
    saved = load_file(newest / "encoders.safetensors")
    assert any("loudness.encoder.linear.weight" in name for name in saved)
    lines = (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    used = {fact["row"] % 3 for fact in map(json.loads, lines) if fact["status"] == "used"}
    assert used == {0, 1, 2}  # text alone, pictures, sounds

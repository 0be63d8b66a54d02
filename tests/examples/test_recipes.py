"""Each recipe from its first line to its JSON: tiny random models, drawn media, a few steps."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import plait
import plait.datasets.fetch
import plait.trainer.spec

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("red", "green", "blue", "yellow", "disc", "square", "bar", "cross")
PLAIN_ENCODERS: dict[str, dict[str, Any]] = {
    "efficientnet_lite": {"name": "patches", "grid": (2, 2)},
    "hf_audio": {"name": "mel", "projector": "stack", "projector_options": {"frames": 5}},
    "video": {"name": "tubelets", "grid": (1, 1), "timestamps": True},
}
"""What needs no weights, instead of what a recipe names."""

Run = Callable[..., dict[str, Any]]


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")


def said(asked: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


@pytest.fixture
def sources(
    tmp_path: Path, picture_folder: Path, write_sound: Callable[[Path, int], None],
    write_film: Callable[[Path, int], None],
) -> Path:  # fmt: skip
    """A folder for each source, with rows like those that `plait fetch` brings."""
    answers = [f"a {one} {other}" for one in WORDS for other in WORDS[:3]]
    write_rows(tmp_path / "words", [{"messages": said(a, a[2:])} for a in answers])
    media = {"speech": ("audio", ".wav", write_sound), "sounds": ("audio", ".wav", write_sound),
             "films": ("video", ".mp4", write_film)}  # fmt: skip
    for name, (medium, ending, write) in media.items():
        rows = []
        for number, answer in enumerate(answers):
            file = tmp_path / name / f"{number}{ending}"
            file.parent.mkdir(exist_ok=True)
            write(file, number)
            rows.append({"messages": said(f"<{medium}>", answer), f"{medium}s": [file.name]})
        write_rows(tmp_path / name, rows)
    (tmp_path / "stamps").symlink_to(picture_folder)
    pairs = [
        {"conversations": [{"from": "human", "value": "a small " * 40}],
         "chosen": {"from": "gpt", "value": f"{answer} " * (n + 1)},
         "rejected": {"from": "gpt", "value": "red bar , ."}}
        for n, answer in enumerate(answers)
    ]  # fmt: skip
    (tmp_path / "preferences").mkdir()
    (tmp_path / "preferences" / "dpo_en_demo.json").write_text(json.dumps(pairs))
    return tmp_path


@pytest.fixture
def run(
    sources: Path, tiny_language: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:  # fmt: skip
    """Run a recipe as a program, and give what its last line says."""
    spec = plait.trainer.spec.EncoderSpec

    def plain_encoder(name: str, **_: Any) -> Any:
        return spec(**PLAIN_ENCODERS[name])

    def program(name: str, **settings: float) -> dict[str, Any]:
        monkeypatch.setattr(plait.datasets.fetch, "dataset_folder", lambda name: sources / name)
        monkeypatch.setattr(plait, "EncoderSpec", plain_encoder)
        given = {"language": tiny_language, "seed": 3, **settings}
        words = [f"--{key}={value}" for key, value in given.items()]
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["recipe"] == name and found["seed"] == 3 and found["seconds"] > 0
        return found

    return program


def test_four_media_learn_in_one_loop(run: Run) -> None:
    found = run("sft", steps=12, warmup=2, share=0.3)
    assert found["before"].keys() == found["after"].keys() == {"text", "image", "audio", "video"}
    assert all(found["held_out"].values())
    assert sum(found["after"].values()) < sum(found["before"].values())


def test_the_model_that_hears_is_taught(run: Run) -> None:
    found = run("distil", steps=12, batch=4, test=6)
    assert found["held_out"] == 6 and found["after"] < found["before"]
    assert found["less"] == 1 - found["after"] / found["before"]


def test_preferences_are_learned(run: Run) -> None:
    found = run("dpo", epochs=3, pairs=24, test=8)
    assert found["before"] == pytest.approx(0.6931, abs=1e-4)
    assert found["steps"] == 6 and found["after"] < found["before"]
    low, high = found["interval"]
    assert low <= found["right"] <= high and found["margin"] > 0


def test_ten_steps_of_dpo_are_those_of_float64(run: Run) -> None:
    found = run("dpo_float64")
    assert len(found["losses"]) == len(found["float64"]) == 10
    assert found["float64"][-1] != pytest.approx(found["float64"][0], rel=1e-3)
    assert found["apart"] < 1e-5


def test_a_class_is_learned_from_rewards(run: Run) -> None:
    found = run("rl_picture", start=40, steps=3, pictures=4, samples=8, test=6)
    assert 0 <= found["before"] <= 1 and found["rise"] == found["after"] - found["before"]
    assert found["interval"][0] <= found["rise"] <= found["interval"][1]


def test_sums_are_learned_from_rewards(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a gym of ours: the package is an extra, and a random model answers no sum."""

    class Gym(list[dict[str, Any]]):
        def score_answer(self, answer: str, row: dict[str, Any]) -> float:
            return float(len(answer) % 2 == 0)

    def create_dataset(name: str, seed: int, size: int, **settings: int) -> Gym:
        assert name == "chain_sum" and settings["max_terms"] == 2
        sums = [(n % 10, seed + n) for n in range(size)]
        return Gym({"question": f"{a} + {b}", "answer": str(a + b),
                    "metadata": {"expression": f"{a} + {b}"}} for a, b in sums)  # fmt: skip

    monkeypatch.setitem(
        sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset)
    )
    found = run("rl_arithmetic", start=2, steps=3, problems=4, samples=4, test=8)
    assert found["rise"] == found["after"] - found["before"]

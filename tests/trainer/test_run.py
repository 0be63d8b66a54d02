"""A run in one process: its files, its ledger, and how it stops."""

import csv
import io
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage
from rich.console import Console

from plait.encoders import feature_cache
from plait.errors import CheckpointError, ConfigError, DataError, FailureBudgetError
from plait.trainer import identity
from plait.trainer.config import RunConfig, config_from
from plait.trainer.data import open_data
from plait.trainer.lightning_run import PlaitModule
from plait.trainer.run import TrainingRun, train

QUIET = Console(quiet=True)


def four_steps(tiny_values: dict[str, Any]) -> dict[str, Any]:
    return tiny_values | {
        "train": tiny_values["train"] | {"steps": 4, "validate_every": 2, "checkpoint_every": 2},
        "evaluation": {"captions": 2},
    }


@pytest.fixture
def values(tiny_values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Four steps, in a folder of the test's own."""
    return four_steps(tiny_values) | {"run_dir": str(tmp_path / "run")}


@pytest.fixture
def pictures(picture_folder: Path, tmp_path: Path) -> Path:
    """A copy of the drawn pictures that a test may break."""
    for file in picture_folder.rglob("*.*"):
        copy = tmp_path / "pictures" / file.relative_to(picture_folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return tmp_path / "pictures"


def over(values: dict[str, Any], pictures: Path, **broken: Any) -> RunConfig:
    train = values["train"] | {"steps": 10}  # more than two epochs
    return config_from(
        values | {"data": values["data"] | {"path": str(pictures), "broken": broken},
                  "train": train}
    )  # fmt: skip


def break_rows(config: RunConfig, count: int, which: str = "train") -> list[str]:
    """Cut the picture files of the first `count` rows; headers stay whole. Their names."""
    data = open_data(config.data)
    names = []
    for row in getattr(data.splits, which)[:count]:
        file = Path(data.records[row].media()[0].file)
        file = file if file.is_file() else Path(config.data.path) / file
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        names.append(file.name)
    return names


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def readable(file: Path) -> bool:
    """Judged by Pillow alone."""
    try:
        PILImage.open(file).load()
    except OSError:
        return False
    return True


def test_a_run_leaves_what_it_promises(values: dict[str, Any]) -> None:
    config = config_from(values)
    metrics = train(config, QUIET)
    assert metrics is not None
    run = config.folder
    names = {path.name for path in run.iterdir()}
    assert names == {"run.json", "features.json", "before.json", "checkpoints",
                     "ledger.jsonl", "logs", "losses.csv", "metrics.json",
                     "captions.json"}  # fmt: skip
    assert json.loads((run / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    for measured in (metrics["test"], metrics["before"]):
        assert {"nll_matched", "nll_shuffled", "class_accuracy"} <= set(measured)
    assert {"load", "before", "train", "after", "total"} <= set(metrics["seconds"])
    assert metrics["peak_memory_mb"] > 100
    with (run / "losses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [bool(row["validation_nll"]) for row in rows] == [False, True, False, True]
    held = {path.name for path in (run / "checkpoints").iterdir()}
    assert held == {"step-000002", "step-000004", f"best-{metrics['best_step']:06d}"}
    assert list((run / "logs").rglob("events.out.tfevents*"))
    assert train(config, QUIET) is None, "a finished run is left alone"
    with pytest.raises(ConfigError, match="finished run with another recipe"):
        train(config_from(values | {"seed": 1}), QUIET)


def test_nothing_but_the_recipe_decides(values: dict[str, Any], tmp_path: Path) -> None:
    """Dropout draws from torch's own generator, wherever that stood before the run."""
    short = {"steps": 2, "validate_every": 2, "checkpoint_every": 2, "accumulate": 1}
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        train_values = values["train"] | short
        folder = tmp_path / str(seed)
        train(config_from(values | {"run_dir": str(folder), "train": train_values}), QUIET)
        found.append((folder / "losses.csv").read_bytes())
    assert found[0] == found[1]


def test_an_unfinished_run_of_another_recipe_is_left_alone(values: dict[str, Any]) -> None:
    config = config_from(values)
    config.folder.mkdir(parents=True)
    (config.folder / "run.json").write_text(json.dumps({"seed": 5}))
    with pytest.raises(ConfigError, match=r"another recipe \(data: None there"):
        train(config, QUIET)
    assert [path.name for path in config.folder.iterdir()] == ["run.json"]


def test_what_is_marked_trainable_trains(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guarantee 5: after the first step, a parameter without a gradient is named."""
    step = PlaitModule._step

    def lose_one(module: PlaitModule) -> None:
        module.learner.run.gradients[-1] = None
        step(module)

    monkeypatch.setattr(PlaitModule, "_step", lose_one)
    with pytest.raises(RuntimeError, match=r"1 parameters got no gradient.*hf_vision\.projector"):
        train(config_from(values), QUIET)


def test_no_row_vanishes(values: dict[str, Any], pictures: Path) -> None:
    """Guarantee 7: a tenth is broken, and the ledger agrees with a count of its own."""
    config = over(values, pictures, on_error="skip")
    broken = set(break_rows(config, 3))
    splits = open_data(config.data).splits
    train(config, QUIET)
    found = lines(config.folder)
    assert max(line["epoch"] for line in found) >= 2
    names = {file.relative_to(pictures).as_posix(): file for file in pictures.rglob("*.png")}
    last = max(line["epoch"] for line in found)
    for epoch in range(last + 1):
        rows = [line for line in found if line["epoch"] == epoch]
        assert len({(row["dataset"], row["row"], row["file"]) for row in rows}) == len(rows)
        status = Counter(row["status"] for row in rows)
        assert status["left_out"] == len(splits.test) + len(splits.validation)
        if epoch < last:  # a run may end inside its last epoch
            assert status["broken"] == len(broken)
            assert status["used"] == len(splits.train) - len(broken)
            assert sum(status.values()) == len(names)
        for row in rows:
            if row["status"] in ("used", "broken"):
                (file,) = [f for n, f in names.items() if row["file"].endswith(n)]
                assert readable(file) == (row["status"] == "used"), row
                assert (row["status"] == "used") == (not row["reason"])


def test_a_budget_of_failures_stops_the_run(values: dict[str, Any], pictures: Path) -> None:
    config = over(values, pictures, on_error="skip", max_total=2)
    names = break_rows(config, 6)
    with pytest.raises(FailureBudgetError) as caught:
        train(config, QUIET)
    message = str(caught.value)
    assert message.startswith("at most 2 broken rows in a run are skipped and 3 broke")
    assert "raise max_total" in message
    assert sum(name in message for name in names) == 3
    assert "\n" not in message
    assert caught.value.exit_code == 2
    used = [line for line in lines(config.folder) if line["status"] == "used"]
    assert used, "what was accounted before stands in the ledger"


def test_the_first_broken_row_stops_a_strict_run(values: dict[str, Any], pictures: Path) -> None:
    config = over(values, pictures)
    (name,) = break_rows(config, 1)
    with pytest.raises(DataError, match=name):
        train(config, QUIET)


@pytest.mark.parametrize("which", ["test", "validation"])
def test_a_broken_held_out_row(values: dict[str, Any], pictures: Path, which: str) -> None:
    """Strict, it stops the run before anything trains; skipped, it is left out and noted."""
    strict = over(values, pictures)
    (name,) = break_rows(strict, 1, which)
    with pytest.raises(DataError, match=name):
        train(strict, QUIET)
    loose = over(values | {"run_dir": values["run_dir"] + "-2"}, pictures, on_error="skip")
    metrics = train(loose, QUIET)
    assert metrics is not None
    assert any(name in note for note in metrics["notes"])
    splits = open_data(loose.data).splits
    assert metrics["test"]["count"] == len(splits.test) - (which == "test")
    assert metrics["data"][which] == len(getattr(splits, which)) - 1
    held_out = len(splits.test) + len(splits.validation)
    for epoch in (0, 1):
        rows = [line for line in lines(loose.folder) if line["epoch"] == epoch]
        (broken,) = [line for line in rows if line["status"] == "broken"]
        assert name in broken["file"] and "a picture must be whole" in broken["reason"]
        assert Counter(line["status"] for line in rows)["left_out"] == held_out - 1


def test_held_out_rows_and_training_rows_share_a_budget(
    values: dict[str, Any], pictures: Path
) -> None:
    config = over(values, pictures, on_error="skip", max_total=2)
    names = break_rows(config, 2, "test") + break_rows(config, 1)
    with pytest.raises(FailureBudgetError, match=r"2 broken rows in a run.*3 broke") as caught:
        train(config, QUIET)
    assert all(name in str(caught.value) for name in names)
    strict = over(values, pictures, on_error="skip", max_total=1)
    with pytest.raises(FailureBudgetError, match="2 broke"):
        train(strict, QUIET)


@pytest.fixture(scope="module")
def finished(tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints 2 and 4, made once and copied by `stopped`."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PLAIT_HOME", str(folder / "home"))
        train(config_from(four_steps(tiny_values)), QUIET)
    return folder / "run"


@pytest.fixture
def stopped(
    tiny_values: dict[str, Any], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RunConfig:
    """A run in the working folder that lacks nothing but its end."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "run")
    Path("run/metrics.json").unlink()
    return config_from(four_steps(tiny_values))


def checkpoints(config: RunConfig) -> list[str]:
    return sorted(path.name for path in (config.folder / "checkpoints").glob("step-*"))


def test_newer_libraries_do_not_end_a_run(
    stopped: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the keys of cached features, not in what a checkpoint must find again."""
    before = Path("run/losses.csv").read_bytes()
    monkeypatch.setattr(feature_cache, "version", lambda name: f"newer {name}")
    assert train(stopped, QUIET) is not None
    assert Path("run/losses.csv").read_bytes() == before


def test_checkpoints_of_another_model_stop_the_run(
    stopped: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Path("run/losses.csv").read_bytes()
    whole = identity.text_hash
    monkeypatch.setattr(identity, "text_hash", lambda text: whole(text.replace("{%", "{%-")))
    with pytest.raises(CheckpointError, match="trained with another template"):
        train(stopped, QUIET)
    assert checkpoints(stopped) == ["step-000002", "step-000004"]
    assert Path("run/losses.csv").read_bytes() == before


def damage(config: RunConfig, name: str) -> None:
    file = config.folder / "checkpoints" / name / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def test_a_damaged_checkpoint_is_passed_over(stopped: RunConfig) -> None:
    """The one before it is gone on from; when none is whole the run does not begin anew."""
    before = Path("run/losses.csv").read_bytes()
    damage(stopped, "step-000004")
    said = io.StringIO()
    assert train(stopped, Console(file=said, width=1_000)) is not None
    assert "adapter_model.safetensors is missing or not what was saved" in said.getvalue()
    assert "resuming after step 2" in said.getvalue()
    assert Path("run/losses.csv").read_bytes() == before
    assert checkpoints(stopped) == ["step-000002", "step-000004"]
    Path("run/metrics.json").unlink()
    for name in checkpoints(stopped):
        damage(stopped, name)
    with pytest.raises(CheckpointError, match=r"none of the 2 in .* is; add --fresh"):
        train(stopped, QUIET)
    assert Path("run/losses.csv").read_bytes() == before


def test_pruning_never_deletes_what_was_just_written(stopped: RunConfig) -> None:
    """Not even for a later checkpoint, which can only be one that was damaged."""
    run = TrainingRun(
        replace(stopped, train=replace(stopped.train, keep_checkpoints=1)), QUIET
    )  # fmt: skip
    (stopped.folder / "checkpoints" / "step-000009").mkdir()
    run._prune(stopped.folder / "checkpoints" / "step-000004", best_step=4)
    assert checkpoints(stopped) == ["step-000004"]


def test_fresh_deletes_only_for_a_recipe_that_can_run(stopped: RunConfig) -> None:
    typo = replace(stopped, data=replace(stopped.data, path="typo"))
    with pytest.raises(DataError):
        train(typo, QUIET, fresh=True)
    assert checkpoints(stopped) == ["step-000002", "step-000004"]
    short = replace(stopped, seed=1, train=replace(stopped.train, steps=1))
    metrics = train(short, QUIET, fresh=True)
    assert metrics is not None
    assert metrics["seed"] == 1
    assert checkpoints(stopped) == ["step-000001"]


def test_a_resumed_run_counts_the_time_of_both(stopped: RunConfig) -> None:
    saved = stopped.folder / "checkpoints" / "step-000004" / "state.json"
    spent = json.loads(saved.read_text())["extra"]["phases"]["seconds"]["train"]
    before = json.loads((stopped.folder / "before.json").read_text())["phases"]
    metrics = train(stopped, QUIET)
    assert metrics is not None
    assert spent > 0
    assert metrics["seconds"]["train"] >= round(spent, 2)
    assert metrics["seconds"]["before"] == round(before["seconds"]["before"], 2)


def test_a_picture_is_as_large_as_the_recipe_allows(values: dict[str, Any], pictures: Path) -> None:
    """From its header to the report's thumbnails."""
    short = values["train"] | {"steps": 1}

    def within(pixels: int) -> RunConfig:
        data = values["data"] | {"path": str(pictures), "limits": {"max_image_pixels": pixels}}
        return config_from(values | {"data": data, "train": short})

    [first] = open_data(within(250_000).data).test[:1]
    PILImage.new("L", (501, 501)).save(first.media()[0].file)
    with pytest.raises(DataError, match="raise max_image_pixels"):
        train(within(250_000), QUIET)
    assert train(within(500_000), QUIET) is not None


def test_preference_pairs_are_refused_by_a_loss_that_does_not_read_them(
    tmp_path: Path, tiny_values: dict[str, Any]
) -> None:
    rows = [{"prompt": f"what {n}", "chosen": "a disc", "rejected": "a bar"} for n in range(24)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    split = {"test": 4, "validation": 4, "near_duplicate_bits": None}
    values = tiny_values | {"data": {"path": str(file), "split": split},
                            "run_dir": str(tmp_path / "run")}  # fmt: skip
    with pytest.raises(DataError, match=r"rejected answer like the chosen one"):
        train(config_from(values), QUIET)
    assert not (tmp_path / "run").exists()

"""Whether features are kept: decided once by what a run needs, written down, and gone by."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from plait.encoders.feature_folder import FeatureFolder
from plait.trainer.build import build
from plait.trainer.config import RunConfig, config_from
from plait.trainer.data import open_data
from plait.trainer.features import Decision, _Room, _Use, _uses, decide
from plait.trainer.run import train
from plait.trainer.workbench import Workbench


def recipe(values: dict[str, Any], folder: Path, **training: Any) -> RunConfig:
    return config_from(
        values | {"run_dir": str(folder / "run"), "train": values["train"] | training}
    )


def decided(config: RunConfig, home: Path) -> Decision:
    bench = Workbench(config, build(config.model, config.seed), open_data(config.data))
    most = config.train.cache_disk_mb * 1_000_000
    with FeatureFolder(home / "features", most) as folder:
        (decision,) = decide(bench, folder).values()
    return decision


def test_features_that_are_read_several_times_are_kept(
    tiny_values: dict[str, Any], tmp_path: Path, private_home: Path
) -> None:
    found = decided(recipe(tiny_values, tmp_path), private_home)
    # 26 training pictures in 2 views, 4 of validation and 6 of test as they are.
    assert found.cached and found.items == 62
    # 24 packs of several pictures; validation 4 times; 2 x 4 measures of the test rows.
    assert found.reads > 24 * 3 + 4 * 4 + 6 * 8
    assert found.encode_ms is not None and found.read_ms is not None
    assert found.encode_ms > found.read_ms > 0
    # 4 positions of 16 numbers an item, before the projector, and a file's own bytes.
    assert 62 * 4 * 16 * 4 / 1e6 <= found.megabytes <= 0.1


def test_a_short_run_over_many_items_computes_nothing_ahead(
    tiny_values: dict[str, Any], tmp_path: Path, private_home: Path
) -> None:
    values = tiny_values | {"views": {"count": 8}}
    found = decided(recipe(values, tmp_path, steps=1, accumulate=1), private_home)
    assert not found.cached and "about once" in found.why and found.reads < found.items
    config = recipe(values, tmp_path, steps=1, accumulate=1, cache_features="always")
    assert decided(config, private_home).cached


def test_features_without_room_are_not_kept(
    tiny_values: dict[str, Any], tmp_path: Path, private_home: Path
) -> None:
    config = recipe(tiny_values, tmp_path, cache_disk_mb=0)
    found = decided(config, private_home)
    assert not found.cached and "cache_disk_mb" in found.why
    train(config, Console(quiet=True))
    assert not list((private_home / "features").rglob("*.safetensors"))


def test_an_encoder_that_trains_is_never_asked(
    tiny_values: dict[str, Any], tmp_path: Path, private_home: Path
) -> None:
    model = tiny_values["model"] | {"train": ["language", "projector", "vision"]}
    config = recipe(tiny_values | {"model": model}, tmp_path, cache_features="always", steps=1)
    train(config, Console(quiet=True))
    assert json.loads((tmp_path / "run" / "features.json").read_text()) == {}
    assert not list((private_home / "features").rglob("*.safetensors"))


@pytest.mark.parametrize("first", ["always", "never"])
def test_a_run_that_goes_on_keeps_its_first_decision(
    first: str, tiny_values: dict[str, Any], tmp_path: Path, private_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = recipe(tiny_values, tmp_path)
    file = tmp_path / "run" / "features.json"
    monkeypatch.setattr("plait.trainer.run.TrainingRun.train", _stopped)
    with pytest.raises(InterruptedError):
        train(config, Console(quiet=True))
    kept = json.loads(file.read_text())
    assert kept["hf_vision"]["cached"]
    kept["hf_vision"] |= {"cached": first == "always", "why": "decided before"}
    file.write_text(json.dumps(kept))
    monkeypatch.undo()
    monkeypatch.setenv("PLAIT_HOME", str(private_home))
    monkeypatch.setattr("plait.trainer.features.decide", _asked_again)
    metrics = train(config, Console(quiet=True))
    assert metrics is not None
    assert metrics["cached_encoders"] == (["hf_vision"] if first == "always" else [])


def _stopped(*_: Any) -> Any:
    raise InterruptedError


def _asked_again(*_: Any) -> Any:
    raise AssertionError("a run decides once")


def test_the_encoders_of_a_run_share_the_room(
    tiny_values: dict[str, Any], tmp_path: Path, private_home: Path
) -> None:
    config = recipe(tiny_values, tmp_path)
    bench = Workbench(config, build(config.model, config.seed), open_data(config.data))
    (use,) = _uses(bench).values()
    size = round(use.bytes(64.0))
    with FeatureFolder(private_home / "features", round(1.5 * size)) as folder:
        room = _Room(folder)
        assert room.take(bench, "hf_vision", use, 64.0)
        other = _Use({key: replace(item, view=9) for key, item in use.items.items()})
        assert not room.take(bench, "hf_vision", other, 64.0), "each alone would fit"
        assert room.promised == size

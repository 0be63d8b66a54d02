"""Features that are computed ahead: the same bits whatever else was computed beside them."""

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from plait.encoders.efficientnet_lite.model import EfficientNetLite0
from plait.errors import DecodeTimeoutError
from plait.stream import Item, ItemInputs
from plait.trainer.build import build
from plait.trainer.config import config_from
from plait.trainer.data import open_data
from plait.trainer.loading import ItemLoader
from plait.trainer.run import TrainingRun
from plait.trainer.spec import EncoderSpec
from plait.trainer.workbench import Workbench


@pytest.fixture
def lite(tmp_path: Path) -> EncoderSpec:
    folder = tmp_path / "lite"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(EfficientNetLite0().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "efficientnet_lite0"}))
    return EncoderSpec(name="efficientnet_lite", weights=str(folder), grid=(2, 2))


def features(folder: Path) -> dict[str, bytes]:
    return {
        path.name: load_file(path)["embeddings"].numpy().tobytes()
        for path in (folder / "features").rglob("*.safetensors")
    }


def test_a_kill_while_features_are_computed_changes_no_bit(
    tiny_values: dict[str, Any], lite: EncoderSpec, private_home: Path
) -> None:
    config = config_from(tiny_values | {"views": {"count": 1}})
    built = build(replace(config.model, encoders={"image": lite}), 0)

    def compute() -> list[int]:
        """The sizes of what is encoded by a process that starts now."""
        bench = Workbench(config, built, open_data(config.data))
        batches = bench.batches_to_cache()
        bench.cache_features(batches, lambda _: None)
        return [len(batch) for batch in batches]

    assert compute() == [16, 16, 4]
    whole = features(private_home)
    assert len(whole) == 36
    assert compute() == []
    for number, path in enumerate(sorted((private_home / "features").rglob("*.safetensors"))):
        if number % 7 == 0:
            path.unlink()
    assert sum(compute()) > 36 / 7
    assert features(private_home) == whole
    bench = Workbench(config, built, open_data(config.data))
    shutil.rmtree(private_home / "features")
    [first, *_], *_ = bench.batches_to_cache()
    bench.cache_features([[first]], lambda _: None)
    [(name, alone)] = features(private_home).items()
    assert alone == whole[name], "nor does another run's choice of pictures"


def prepared(run: TrainingRun) -> Workbench:
    with closing(run.load()) as learner:
        return run.prepare(learner.built)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_held_out_row_that_timed_out_once_stays_out_of_a_run_that_goes_on(
    fresh: bool, tiny_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"on_error": "skip"}
    values = tiny_values | {
        "run_dir": str(tmp_path / "run"), "data": tiny_values["data"] | {"broken": broken},
    }  # fmt: skip
    config = config_from(values)
    slow = open_data(config.data).test[0]
    loaded = ItemLoader.__call__

    def stuck(loader: ItemLoader, item: Item) -> ItemInputs:
        if item.part in slow.media():
            raise DecodeTimeoutError("decoding must end; this took too long", slow.origin)
        return loaded(loader, item)

    with monkeypatch.context() as patch:
        patch.setattr(ItemLoader, "__call__", stuck)
        first = prepared(TrainingRun(config, Console(quiet=True)))
    (line,) = (tmp_path / "run" / "timeouts.jsonl").read_text().splitlines()
    assert json.loads(line)["epoch"] == -1 and json.loads(line)["row"] == slow.origin.row
    assert slow not in first.data.test and len(first.data.test) == 5
    # The machine is quick now.
    again = prepared(TrainingRun(config, Console(quiet=True), fresh))
    assert (slow in again.data.test) == fresh
    assert len(again.held_out_broken) == (0 if fresh else 1)

"""`plait train` and the client on two ranks give what they give on one."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

import plait
from plait.cli import main
from plait.errors import ConfigError, Interrupted
from plait.trainer.config import config_from, load_config
from plait.trainer.run import TrainingRun


def weights(run: Path) -> dict[str, torch.Tensor]:
    [folder] = (run / "checkpoints").glob("step-000004")
    found = [load_file(file) for file in folder.glob("*.safetensors")
             if file.stem not in ("optimizer", "gradients")]  # fmt: skip
    return {name: tensor for tensors in found for name, tensor in tensors.items()}


@pytest.fixture
def recipe(tiny_values: dict[str, Any], tmp_path: Path) -> Path:
    """With dropout, a broken number of packs a step, and parts of all kinds."""
    values = tiny_values | {
        "train": tiny_values["train"] | {
            "steps": 4, "accumulate": 3, "cache_features": "never", "learning_rate": 1e-4,
        },
        "evaluation": {"captions": 2},
    }  # fmt: skip
    assert values["model"]["lora"]["dropout"] > 0
    config_from(values)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize(
    ("strategy", "lora"), [("ddp", True), ("fsdp", False)], ids=["ddp-lora", "fsdp-full"]
)
def test_two_devices_train_what_one_does(
    recipe: Path, tmp_path: Path, strategy: str, lora: bool
) -> None:
    full = [] if lora else ["--set", "model.lora=null"]
    runs = {devices: tmp_path / f"run-{devices}" for devices in (1, 2)}
    for devices, folder in runs.items():
        words = ["train", str(recipe), "--run-dir", str(folder), "--devices", str(devices),
                 "--set", f"strategy={strategy}", *full]  # fmt: skip
        assert main(words) == 0
    one, two = (json.loads((run / "metrics.json").read_text()) for run in runs.values())
    assert two["validation_nll"] == pytest.approx(one["validation_nll"], rel=1e-4)
    assert two["data"] == one["data"]
    mine, other = weights(runs[2]), weights(runs[1])
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        difference = (tensor - other[name]).norm() / other[name].norm().clamp(min=1e-3)
        assert difference < 1e-2, name  # Adam turns round-off into parts of steps


def test_a_run_goes_on_with_another_number_of_devices(recipe: Path, tmp_path: Path) -> None:
    def trained(folder: Path, devices: int) -> int:
        return main(["train", str(recipe), "--run-dir", str(folder), "--devices", str(devices)])

    assert trained(tmp_path / "whole", 1) == 0
    stopped = tmp_path / "stopped"
    config = load_config(recipe, [f"run_dir={stopped}"])
    run = TrainingRun(config, Console(quiet=True))
    run._stop.set()
    with pytest.raises(Interrupted):
        run.execute()
    assert trained(stopped, 2) == 0
    mine, other = weights(stopped), weights(tmp_path / "whole")
    for name, tensor in mine.items():
        assert (tensor - other[name]).norm() < 1e-2 * other[name].norm().clamp(min=1e-3), name


def test_a_client_on_two_devices(tiny_values: dict[str, Any], tmp_path: Path, lab: Any) -> None:
    losses = []
    for devices in (1, 2):
        with plait.ServiceClient(tmp_path / str(devices), devices=devices) as service:
            client = service.create_training_client(lab.spec(), seed=0)
            data = [client.datum(sample) for sample in lab.samples]
            for _ in range(3):
                found = client.forward_backward(data)
                client.optim_step(plait.AdamParams(learning_rate=1e-3))
            losses.append(found.result().metrics["loss:sum"])
            assert client.save_state("end").result().path.endswith("/weights/end")
            if devices == 2:
                [pid] = service._engine._work.team.pids
                with pytest.raises(ConfigError, match="close the other client"):
                    plait.ServiceClient(tmp_path / "more", devices=2)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)

"""`plait train` and a flat loop through the primitives are the same computation, bit for bit."""

from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from plait.client import ServiceClient
from plait.trainer.build import build
from plait.trainer.config import RunConfig, config_from
from plait.trainer.data import open_data
from plait.trainer.engine.controller import EngineSettings
from plait.trainer.run import train
from plait.trainer.schedule import settings_at
from plait.trainer.workbench import Workbench
from plait.types import AdamParams

STEPS = 4


def recipe(values: dict[str, Any], accumulate: int, cached: bool, folder: Path) -> RunConfig:
    assert values["model"]["lora"]["dropout"] > 0
    training = values["train"] | {
        "steps": STEPS, "accumulate": accumulate, "grad_clip_norm": 0.5,
        "cache_features": "always" if cached else "never",
        "weight_decay": 0.1, "part_learning_rates": {"projector": 0.002},
    }  # fmt: skip
    return config_from(
        values | {
            "run_dir": str(folder),
            "views": {"count": 1},
            "train": training,
            "evaluation": {"captions": 1},
        }
    )  # fmt: skip


def trained(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = folder / "checkpoints" / f"step-{STEPS:06d}"
    files = ("adapter_model.safetensors", "encoders.safetensors")
    return {k: v for name in files for k, v in load_file(checkpoint / name).items()}


def flat_loop(config: RunConfig, folder: Path) -> dict[str, torch.Tensor]:
    """What a user writes, over the packs that the run takes."""
    data = open_data(config.data)
    bench = Workbench(config, build(config.model, config.seed), data)
    service = ServiceClient(folder, engine=EngineSettings(capacity=config.train.capacity))
    client = service.create_training_client(config.model, seed=config.seed)
    accumulate = config.train.accumulate
    with bench.loader() as loader:
        packs = islice(loader, STEPS * accumulate)
        for number, pack in enumerate(packs):
            client.forward_backward([client.datum(data.records[row]) for row in pack.rows])
            if number % accumulate == accumulate - 1:
                settings = settings_at(number // accumulate, config.train)
                known = {field.name for field in fields(AdamParams)}
                values = {k: v for k, v in asdict(settings).items() if k in known}
                client.optim_step(AdamParams(**values), divide_by_weight=True).result()
    path = client.save_state("end").result().path
    client.close()
    saved = folder / path.removeprefix("tinker://")
    files = ("adapter_model.safetensors", "encoders.safetensors")
    return {k: v for name in files for k, v in load_file(saved / name).items()}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_bit_equal_weights(tiny_values: dict[str, Any], tmp_path: Path, accumulate: int) -> None:
    config = recipe(tiny_values, accumulate, False, tmp_path / "run")
    loop = flat_loop(config, tmp_path / "loop")
    start = build(config.model, config.seed).model.state_dict()
    assert any(not torch.equal(start[k], v) for k, v in renamed(loop).items() if k in start)
    for cached in (False, True):
        folder = tmp_path / f"run-{cached}"
        metrics = train(recipe(tiny_values, accumulate, cached, folder), Console(quiet=True))
        assert metrics is not None
        assert metrics["cached_encoders"] == (["hf_vision"] if cached else [])
        run = trained(folder)
        assert run.keys() == loop.keys()
        assert [name for name in run if not torch.equal(run[name], loop[name])] == []


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Projector tensors under the model's own names."""
    return {
        f"encoders.{name}": tensor
        for name, tensor in tensors.items()
        if ".projector." in name
    }  # fmt: skip

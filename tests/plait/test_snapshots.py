"""Guarantee 8: a snapshot neither changes nor is changed by training, on disk or in memory."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.client import SamplingClient, ServiceClient, TrainingClient
from plait.stream import Sample
from plait.trainer import checkpoint
from plait.trainer.config import config_from
from plait.trainer.spec import LoraSpec, ModelSpec
from plait.types import AdamParams, Datum, SampleResponse, SamplingParams

STEP = AdamParams(learning_rate=0.02, weight_decay=0.1)
DRAWN = SamplingParams(max_tokens=6, temperature=0.9, seed=5, stop=())

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"lora": LoraSpec(rank=4, dora=True)},
    "dropout": {"lora": LoraSpec(rank=4, dropout=0.3)},
    "full": {"lora": None, "train": ("language", "projector", "vision")},
}


@pytest.fixture(scope="module")
def wide_language(tiny_language: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads of 64 bytes: wherever a sampler keeps a sequence's keys, they begin at a border of
    so many, as for most real models. Off it, the last bits of some CPUs' products differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide-language")
    shutil.copytree(tiny_language, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_language, head_dim=16)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def spec(tiny_values: dict[str, Any], wide_language: Path) -> ModelSpec:
    model = config_from(tiny_values).model
    return replace(model, language=str(wide_language), lora=LoraSpec(rank=4))


class Loop:
    """A run that trains, and a prompt with a picture to look at it through."""

    def __init__(self, client: TrainingClient, samples: list[Sample]) -> None:
        self.client = client
        self.data = [client.datum(sample) for sample in samples]
        self.prompt = client.prompt("which: ", samples[1].media()[0])
        row = list(self.data[0].model_input.chunks)
        self.scored = Datum(type(self.prompt)(row)).model_input

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.client.forward_backward(self.data)
            self.client.optim_step(STEP).result()

    def seen(self, sampler: SamplingClient) -> tuple[SampleResponse, list[float | None]]:
        """Samples with their logprobs, and logprobs of a fixed text: exact numbers."""
        drawn = sampler.sample(self.prompt, 2, DRAWN).result()
        return drawn, sampler.compute_logprobs(self.scored).result()

    def digest(self, name: str) -> str:
        """Of all that the run holds."""
        return self.client.save_state(name).result().digest


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_is_bit_equal_whatever_comes_after(
    make: Any, samples: list[Sample], tmp_path: Path, kind: str
) -> None:
    loop = Loop(make(**KINDS[kind]), samples)
    loop.train()
    saved = loop.client.save_weights_for_sampler("first").result().path
    state = loop.client.save_state("start").result().path
    service = ServiceClient(tmp_path / "states")
    held = loop.client.save_weights_and_get_sampling_client()
    read = service.create_sampling_client(saved)
    before = {"in memory": loop.seen(held), "from disk": loop.seen(read)}
    assert before["in memory"] == before["from disk"]
    with service.create_sampling_client(saved) as another:  # beside the first, on the same model
        assert loop.seen(another) == before["from disk"]

    def check(what: str) -> None:
        assert loop.seen(held) == before["in memory"], what
        assert loop.seen(read) == before["from disk"], what

    loop.train(2)
    check("more training")
    other = loop.client.save_weights_and_get_sampling_client("other")
    assert loop.seen(other) != before["in memory"]
    check("another snapshot")
    loop.client.forward_backward(loop.data).result()
    loop.client.load_state_with_optimizer(state).result()
    loop.train()
    check("save and load")
    other.close()
    service.delete_checkpoint(saved)
    check("another one closed, and its own checkpoint deleted")
    service.close()


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bit_equal_with_sampling_between_and_during_its_steps(
    make: Any, samples: list[Sample], kind: str
) -> None:
    alone, watched = (Loop(make(**KINDS[kind]), samples) for _ in range(2))
    alone.train(3)
    views = [watched.client.save_weights_and_get_sampling_client()]
    for _ in range(3):
        drawn = views[-1].sample(watched.prompt, 2, DRAWN)
        watched.client.forward_backward(watched.data)
        watched.seen(views[0])
        watched.client.optim_step(STEP)
        views.append(watched.client.save_weights_and_get_sampling_client())
        watched.seen(views[-1])
        drawn.result()
    assert watched.digest("end") == alone.digest("end")


def test_a_snapshot_in_memory_never_touches_the_disk(
    make: Any, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a file was written")

    loop = Loop(make(), samples)
    for name in ("save_file", "load_file", "write"):
        monkeypatch.setattr(checkpoint, name, refuse)
    loop.train()
    with loop.client.save_weights_and_get_sampling_client() as sampler:
        loop.seen(sampler)
    assert not (tmp_path / "states").exists()

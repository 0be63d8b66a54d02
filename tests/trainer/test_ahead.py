"""Media of commands that wait are decoded before their turn, and nothing else is different."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from plait.errors import MediaError, ModelError, UnknownNameError
from plait.modalities import Image, Limits, Text
from plait.stream import Document, Message, Sample, render
from plait.trainer.config import config_from
from plait.trainer.engine import ahead, commands
from plait.trainer.engine.controller import Engine, EngineSettings
from plait.trainer.optimiser import StepSettings
from plait.trainer.sampling.settings import SamplerSettings
from plait.trainer.spec import LoraSpec, ModelSpec

ONE = 3 * 32 * 32 * 4
"""Bytes of a picture as the tiny tower reads it."""


@pytest.fixture
def spec(tiny_values: dict[str, Any]) -> ModelSpec:
    return replace(config_from(tiny_values).model, lora=LoraSpec(rank=2))


class Blocked:
    """An engine with a run and a view, whose thread can be held up."""

    def __init__(self, spec: ModelSpec, folder: Path) -> None:
        self.engine = Engine(EngineSettings(capacity=64))
        self.folder = folder
        self.name, self.built = self.engine.create_run(spec, 0, Limits())
        self.engine.submit(commands.TakeView(self.name, "view")).result()
        self.ahead = self.engine.executor.ahead
        self.threads: list[str] = []
        """Of each picture that was processed."""

        encoder = self.built.model.media_encoder("hf_vision").encoder
        process = encoder.process

        def noted(pixels: Any) -> Any:
            self.threads.append(threading.current_thread().name)
            return process(pixels)

        encoder.process = noted  # type: ignore[method-assign]

    def hold(self) -> Callable[[], None]:
        """Hold the engine's thread up, until what is returned is called."""
        here, free = threading.Event(), threading.Event()

        def wait(*_: Any) -> None:
            here.set()
            assert free.wait(60)

        prompt = self.document([Text("a")], generation=True)
        settings = SamplerSettings(max_tokens=1)
        self.engine.submit(commands.Sample("view", prompt, settings, on_token=wait))
        assert here.wait(60)
        return free.set

    def picture(self, seed: int) -> Image:
        file = self.folder / f"{seed}.png"
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(file)
        return Image(file)

    def document(self, parts: Sequence[Any], generation: bool = False) -> Document:
        turns = (Message("user", tuple(parts)), Message("assistant", (Text("a red bar"),)))
        return render(Sample(turns), self.built.tokenizer, self.built.layout, generation)

    def documents(self, *seeds: int) -> list[Document]:
        return [self.document([self.picture(seed), Text("a")]) for seed in seeds]

    def train(self, documents: list[Document]) -> Any:
        return self.engine.forward_backward(self.name, documents)

    def until(self, true: Callable[[], bool]) -> None:
        ends = time.monotonic() + 30
        while not true():
            assert time.monotonic() < ends, "it never happens"
            time.sleep(0.005)

    @property
    def empty(self) -> bool:
        return self.ahead.waiting == 0 and self.ahead.held_bytes == 0


@pytest.fixture
def blocked(spec: ModelSpec, tmp_path: Path) -> Iterator[Blocked]:
    made = Blocked(spec, tmp_path)
    yield made
    made.engine.close()


def in_turn(blocked: Blocked, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nothing is decoded ahead."""
    monkeypatch.setattr(blocked.ahead, "queue", lambda *_: None)


def test_media_are_decoded_while_the_engine_is_busy_and_change_nothing(
    blocked: Blocked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of training documents, over several micro-batches, and of prompts."""
    documents = blocked.documents(*range(9))
    prompt = blocked.document([blocked.picture(20), Text("a")], generation=True)
    settings = SamplerSettings(max_tokens=3, seed=1)

    def results(decoded: int) -> tuple[Any, ...]:
        release = blocked.hold()
        trained = blocked.train(documents)
        sampled = blocked.engine.submit(commands.Sample("view", prompt, settings, 2))
        blocked.until(lambda: blocked.ahead.held_bytes == decoded * ONE)
        release()
        logprobs = [one.logprobs.tolist() for one in trained.result()]
        rows, run = sampled.result().samples, blocked.engine.executor.runs[blocked.name]
        gradients = [g.clone() for g in run.gradients if g is not None]
        step = commands.OptimStep(blocked.name, StepSettings(learning_rate=0.0))
        blocked.engine.submit(step).result()
        return logprobs, rows, gradients

    found = results(decoded=10)
    assert len(blocked.threads) == 10 and blocked.empty
    assert all(name.startswith("plait-ahead") for name in blocked.threads)
    blocked.threads.clear()
    monkeypatch.setattr(blocked.ahead, "queue", lambda *_: None)
    expected = results(decoded=0)
    assert blocked.threads == 10 * ["plait-engine"]
    assert found[:2] == expected[:2]
    assert all(torch.equal(a, b) for a, b in zip(found[2], expected[2], strict=True))


def test_memory_of_what_waits_is_bounded(blocked: Blocked, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is decoded as what waits is taken, or in its turn."""
    monkeypatch.setattr(blocked.ahead, "_most", 3 * ONE)
    release = blocked.hold()
    futures = [blocked.train(blocked.documents(*range(n, n + 5))) for n in range(0, 20, 5)]
    blocked.until(lambda: blocked.ahead.held_bytes > 3 * ONE)
    time.sleep(0.1)
    assert blocked.ahead.held_bytes <= (3 + ahead.WORKERS) * ONE
    assert blocked.ahead.waiting == 20
    release()
    for future in futures:
        assert len(future.result()) == 5
    assert len(blocked.threads) == 20
    blocked.until(lambda: blocked.empty)


def test_errors_are_their_own_commands(blocked: Blocked) -> None:
    """They name the file, a failed call adds nothing, and what it did not take is forgotten."""
    broken = blocked.picture(50)
    Path(broken.file).write_bytes(Path(broken.file).read_bytes()[:200])
    before, after = blocked.documents(1, 2), blocked.documents(3, 4)
    bad = [*blocked.documents(5), blocked.document([broken, Text("a")]), *blocked.documents(6)]
    prompt = blocked.document([broken, Text("a")], generation=True)
    release = blocked.hold()
    futures = [blocked.train(documents) for documents in (before, bad, after)]
    settings = SamplerSettings(max_tokens=1)
    futures.append(blocked.engine.submit(commands.Sample("view", prompt, settings)))
    gone = commands.Sample("gone", before[0], settings)
    futures.append(blocked.engine.submit(gone))
    blocked.until(lambda: len(blocked.threads) == 6)
    release()
    assert len(futures[0].result()) == len(futures[2].result()) == 2
    for number in (1, 3):
        with pytest.raises(MediaError, match=r"50\.png"):
            futures[number].result()
    with pytest.raises(UnknownNameError):
        futures[4].result()
    with pytest.raises(ModelError, match=r"one failed.*50\.png"):
        blocked.engine.submit(commands.OptimStep(blocked.name, StepSettings())).result()
    blocked.until(lambda: blocked.empty)


def test_a_document_in_two_commands_is_there_for_both(blocked: Blocked) -> None:
    documents = blocked.documents(1, 2)
    release = blocked.hold()
    futures = [blocked.train(documents) for _ in range(2)]
    futures.append(blocked.train([documents[0], documents[0]]))
    blocked.until(lambda: blocked.ahead.held_bytes == 6 * ONE)
    release()
    first, second, third = ([one.loss for one in future.result()] for future in futures)
    assert first == second and third == [first[0], first[0]]
    assert len(blocked.threads) == 6
    blocked.until(lambda: blocked.empty)


def test_what_was_decoded_in_its_turn_is_not_decoded_again(
    blocked: Blocked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its turn came before there was room for it."""
    monkeypatch.setattr(blocked.ahead, "_most", -1)
    blocked.train(blocked.documents(1, 2, 3)).result()
    assert blocked.threads == 3 * ["plait-engine"]
    monkeypatch.setattr(blocked.ahead, "_most", 100 * ONE)
    blocked.train(blocked.documents(4)).result()
    blocked.until(lambda: not blocked.ahead._pending and blocked.ahead._working == 0)
    assert len(blocked.threads) == 4 and blocked.empty

"""Engines of two real processes, shared by the tests of a file: starting one takes seconds."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.modalities import Limits
from plait.stream import Document, Sample, render
from plait.trainer.engine import commands
from plait.trainer.engine.controller import Engine, EngineSettings
from plait.trainer.engine.runs import Run
from plait.trainer.optimiser import StepSettings
from plait.trainer.places import Place
from plait.trainer.source import Source
from plait.trainer.spec import LoraSpec, ModelSpec
from plait.trainer.store import Store

SGD = StepSettings(optimizer="sgd", learning_rate=0.001)

LOSS = '''
import gc
import os
import time
from pathlib import Path

import torch

def of_two_at_most(batch):
    """A loss that needs more memory than there is for three documents."""
    if len(batch.lengths) > 2:
        raise torch.OutOfMemoryError("out of memory")
    return batch.per_document(-batch.logprobs * batch.weights)

def steep(batch):
    """Finite, with a gradient that is not, where a weight is 7."""
    heavy = (batch.weights > 6).float()
    nothing = (batch.logprobs - batch.logprobs.detach()) * 3e38 * 10 * heavy
    return batch.per_document(-batch.logprobs * batch.weights + nothing)

def broken(batch):
    raise ValueError("this loss is broken")

def slow_or_broken(batch):
    """Fails at once where a weight is 7, else takes its time."""
    if (batch.weights > 6).any():
        raise ValueError("a heavy document")
    time.sleep(1)
    return batch.per_document(-batch.logprobs * batch.weights)

def held(batch):
    """Notes how many models and views this process has."""
    gc.collect()
    names = [type(one).__name__ for one in gc.get_objects()]
    counts = [names.count(name) for name in ("Base", "View", "Run", "PlaitModel")]
    Path(__file__).with_name(f"held-{os.getpid()}").write_text(str(counts))
    return batch.per_document(-batch.logprobs * batch.weights)
'''


class Driver:
    """One run on an engine, as its controller sees it."""

    def __init__(self, engine: Engine, spec: ModelSpec, folder: Path, seed: int = 0) -> None:
        self.engine, self.store = engine, Store(folder)
        self.name, self.built = engine.create_run(spec, seed, Limits())
        self._saved = 0

    @property
    def run(self) -> Run:
        return self.engine.executor.runs[self.name]

    def documents(self, samples: Sequence[Sample]) -> list[Document]:
        return [render(s, self.built.tokenizer, self.built.layout) for s in samples]

    def submit(self, samples: Sequence[Sample], **options: Any) -> "Future[Any]":
        return self.engine.forward_backward(self.name, self.documents(samples), **options)

    def step(self, settings: StepSettings = SGD) -> "Future[Any]":
        return self.engine.submit(commands.OptimStep(self.name, settings))

    def save(self) -> Path:
        self._saved += 1
        place = Place(self.name, "weights", str(self._saved))
        self.engine.submit(commands.SaveState(self.name, self.store, place)).result()
        return place.under(self.store.root)

    def load(self, folder: Path) -> None:
        source = Source(self.store, str(folder))
        self.engine.submit(commands.LoadState(self.name, source, with_optimizer=True)).result()

    def pending(self) -> dict[str, Tensor]:
        """The summed gradients that no step has used."""
        file = self.save() / "gradients.safetensors"
        return load_file(file) if file.is_file() else {}

    def weights(self) -> dict[str, Tensor]:
        folder = self.save()
        names = [path.name for path in folder.glob("*.safetensors")]
        found: dict[str, Tensor] = {}
        for name in sorted(set(names) - {"optimizer.safetensors", "gradients.safetensors"}):
            found |= load_file(folder / name)
        return found

    def drop(self) -> None:
        self.engine.finish(commands.DropRun(self.name))


Make = Callable[..., Driver]


@pytest.fixture(scope="session")
def loss_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A module of losses that other processes can import too."""
    folder = tmp_path_factory.mktemp("losses")
    (folder / "plait_test_losses.py").write_text(LOSS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        yield folder


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def strategy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pair(strategy: str, loss_module: Path) -> Iterator[Engine]:
    """Two ranks."""
    torch.set_num_threads(1)
    engine = Engine(EngineSettings(devices=2, strategy=strategy))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def alone() -> Iterator[Engine]:
    engine = Engine(EngineSettings())
    yield engine
    engine.close()


@pytest.fixture
def specs(lab: Any) -> dict[str, ModelSpec]:
    lora = LoraSpec(rank=4, alpha=8.0)
    return {
        "lora": lab.spec(lora=lora),
        "full": lab.spec(lora=None, train=("language", "projector", "vision")),
        "projector": lab.spec(lora=lora, train=("projector",)),
    }


@pytest.fixture
def drive(tmp_path: Path, specs: dict[str, ModelSpec]) -> Iterator[Make]:
    """Runs by their kind, dropped at the test's end."""
    made: list[Driver] = []

    def make(engine: Engine, kind: str = "lora", seed: int = 0) -> Driver:
        made.append(Driver(engine, specs[kind], tmp_path / f"of-{len(made)}", seed))
        return made[-1]

    yield make
    for driver in made:
        driver.drop()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    """Relatively, tensor by tensor; a gradient that is 0 but for round-off counts as 0."""
    assert found.keys() == expected.keys() and found
    nothing = 1e-6 * max(float(tensor.norm()) for tensor in expected.values())
    for name, one in found.items():
        norm = max(float(expected[name].norm()), nothing)
        assert float((one - expected[name]).norm()) <= bound * norm, name

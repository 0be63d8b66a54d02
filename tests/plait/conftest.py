"""Clients on a tiny model, and samples to give them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plait.client import ServiceClient, TrainingClient
from plait.modalities import Image, Text
from plait.stream import Message, Sample
from plait.trainer.config import config_from
from plait.trainer.spec import LoraSpec, ModelSpec

Make = Callable[..., TrainingClient]


@pytest.fixture
def spec(tiny_values: dict[str, Any]) -> ModelSpec:
    return replace(config_from(tiny_values).model, lora=LoraSpec(rank=4))


@pytest.fixture
def make(spec: ModelSpec, tmp_path: Path) -> Iterator[Make]:
    clients: list[TrainingClient] = []

    def create(**changes: Any) -> TrainingClient:
        service = ServiceClient(tmp_path / "states", engine=changes.pop("engine", None))
        client = service.create_training_client(replace(spec, **changes), seed=3)
        clients.append(client)
        return client

    yield create
    for client in clients:
        client.close()


@pytest.fixture
def samples(picture_folder: Path) -> list[Sample]:
    """Text alone, a picture, text before a picture: of different lengths."""
    disc = Image(picture_folder / "disc" / "00.png")
    bar = Image(picture_folder / "bar" / "01.png")
    return [
        told((Text("the shape"),), "a red disc."),
        told((disc,), "a disc."),
        told((Text("which: "), bar), "a green bar, small."),
    ]


def told(question: tuple[Any, ...], answer: str) -> Sample:
    return Sample(messages=(Message("user", question), Message("assistant", (Text(answer),))))

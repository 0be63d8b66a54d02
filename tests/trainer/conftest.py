"""Small models in memory, and samples of text and pictures to put through them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plait.modalities import Image, Text
from plait.stream import Document, ItemInputs, Message, Sample, TokenStream, pack, render
from plait.trainer.build import Built, build
from plait.trainer.spec import EncoderSpec, LoraSpec, ModelSpec
from plait.trainer.together import Part, computed


class Lab:
    """Builds models over the tiny checkpoints, and streams for them."""

    def __init__(self, language: Path, vision: Path) -> None:
        self.language, self.vision = language, vision

    def spec(self, **changes: Any) -> ModelSpec:
        encoder = EncoderSpec(
            name="hf_vision",
            weights=str(self.vision),
            grid=changes.pop("grid", (2, 2)),
            projector=changes.pop("projector", "mlp"),
        )
        facts: dict[str, Any] = {
            "language": str(self.language),
            "encoders": {"image": encoder},
            "lora": LoraSpec(rank=4),
        }
        return ModelSpec(**facts | changes)

    def build(self, bidirectional: bool = False, **changes: Any) -> Built:
        """A model whose adapter and output are not at their first values."""
        built = build(self.spec(**changes), seed=0)
        generator = torch.Generator().manual_seed(1)
        for _, name, parameter in built.model.trainable():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1, generator=generator)
        for encoder in built.model.encoders.values():
            encoder.encoder.bidirectional = bidirectional
        return built

    def picture(self, seed: int) -> Image:
        shape = (24 + 8 * (seed % 3), 40, 3)
        return Image(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))

    def sample(self, answer: str, *parts: str | int, **facts: Any) -> Sample:
        """A question of texts and pictures (by their seeds), and an answer."""
        asked = tuple(Text(p) if isinstance(p, str) else self.picture(p) for p in parts)
        turns = (Message("user", asked), Message("assistant", (Text(answer),)))
        return Sample(turns, **facts)

    @property
    def samples(self) -> list[Sample]:
        """With a picture, two pictures, none, and one at the end of the question."""
        return [
            self.sample("a red disc", "look ", 1, " what is it"),
            self.sample("blue square, green bar", 2, "and", 3),
            self.sample("small !", "the shape of a big yellow cross"),
            self.sample("the bar.", "a shape ", 4),
        ]

    def documents(
        self, built: Built, samples: Sequence[Sample], for_generation: bool = False
    ) -> tuple[list[Document], list[list[ItemInputs]]]:
        made = [render(s, built.tokenizer, built.layout, for_generation) for s in samples]
        return made, [self.inputs(built, document) for document in made]

    def inputs(self, built: Built, document: Document) -> list[ItemInputs]:
        return [
            ItemInputs(
                built.model.media_encoder(item.plan.encoder).encoder.process(item.part.decode())
            )
            for item in document.items
        ]

    def stream(self, built: Built, samples: Sequence[Sample]) -> TokenStream:
        return pack(*self.documents(built, samples))

    def extended(self, document: Document, tokens: Sequence[int]) -> Document:
        """The document with more text, for the plain layout."""
        ids = np.concatenate([document.token_ids, np.array(tokens, dtype=np.int64)])
        nothing = np.zeros(len(ids), dtype=np.int64)
        return replace(
            document,
            token_ids=ids,
            targets=nothing,
            weights=nothing.astype(np.float32),
            positions=np.arange(len(ids)),
        )

    def gradients(self, built: Built, streams: Sequence[TokenStream]) -> tuple[Any, torch.Tensor]:
        """Losses by document, and the summed gradients of these streams as one vector."""
        built.model.zero_grad(set_to_none=True)
        losses = []
        for stream in streams:
            with computed([Part(built.model, stream)]) as [sums]:
                sums.loss.backward()  # type: ignore[no-untyped-call]
            losses += [loss for loss, _ in sums.documents]
        parts = [p.grad.double().flatten() for _, _, p in built.model.trainable()
                 if p.grad is not None]  # fmt: skip
        return torch.tensor(losses), torch.cat(parts).clone()


@pytest.fixture(scope="session")
def lab(tiny_language: Path, tiny_vision: Path) -> Lab:
    return Lab(tiny_language, tiny_vision)


@pytest.fixture(scope="session")
def mixed_media(
    tmp_path_factory: pytest.TempPathFactory,
    write_sound: Callable[[Path, int], None],
    write_film: Callable[[Path, int], None],
) -> dict[str, Path]:
    """Tables of sounds, films and chats by name; one of ten sounds and of ten films is cut."""
    folder = tmp_path_factory.mktemp("mixed-media")
    for number in range(10):
        write_sound(folder / f"{number}.wav", number)
        write_film(folder / f"{number}.mp4", number)
    for broken in (folder / "4.wav", folder / "7.mp4"):
        broken.write_bytes(broken.read_bytes()[:40])
    answers = ["red disc", "blue bar", "green cross"]
    kinds = {"sounds": ("audio", "audios", "wav"), "films": ("video", "videos", "mp4")}
    tables = {}
    for name in ("sounds", "films", "chats"):
        rows = []
        for number in range(10):
            answer = {"role": "assistant", "content": answers[number % 3]}
            mark, key, ending = kinds.get(name, ("", "", ""))
            asked = f"<{mark}>a shape" if mark else f"the shape {number}"
            row: dict[str, Any] = {"messages": [{"role": "user", "content": asked}, answer]}
            rows.append(row | ({key: [f"{number}.{ending}"]} if key else {}))
        tables[name] = folder / f"{name}.jsonl"
        tables[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tables

"""Text, pictures, sounds and films in one stream: what holds for pictures holds for all of them."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plait.encoders.base import Encoder, Grid, Inputs
from plait.encoders.layouts.plain import PlainLayout
from plait.encoders.media_encoder import MediaEncoder
from plait.encoders.projectors import create_pool, create_projector
from plait.modalities import Audio, AudioRequest, FrameSampling, Text, Video
from plait.primitives.inputs import input_from, piece_of
from plait.stream import (
    Document,
    Encoded,
    ItemInputs,
    Message,
    Sample,
    check_placeholders,
    pack,
    render,
)
from plait.trainer.build import Built
from plait.trainer.engine.inputs import document_from
from plait.trainer.model import PlaitModel
from plait.trainer.sampling.generating import generate
from plait.trainer.sampling.settings import SamplerSettings

RATE = 8000


class Loudness(Encoder):
    """Ten features a second of a sound."""

    medium, width = "audio", 4

    def __init__(self) -> None:
        super().__init__("loudness")
        torch.manual_seed(3)
        self.net = nn.Linear(RATE // 10, 4)

    def plan(self, header: Any) -> Grid:
        return max(1, header.samples_at(RATE) // (RATE // 10)), 1, 1

    def seconds(self, header: Any, grid: Grid) -> tuple[float, ...]:
        return tuple(row / 10 for row in range(grid[0]))

    def wanted(self, header: Any) -> AudioRequest:
        return AudioRequest(RATE)

    def process(self, media: Any) -> dict[str, Tensor]:
        rows = max(1, len(media) // (RATE // 10))
        padded = np.zeros(rows * (RATE // 10), dtype=np.float32)
        padded[: len(media)] = media[: len(padded)]
        return {"rows": torch.from_numpy(padded.reshape(rows, -1))}

    def forward(self, inputs: Sequence[Inputs]) -> list[Encoded]:
        return [Encoded(self.net(i["rows"]), grid=(len(i["rows"]), 1, 1)) for i in inputs]

    def processing(self) -> str:
        return "tenths of a second"


class Stripes(Encoder):
    """Two features a frame: the left and the right half of it."""

    medium, width = "video", 3
    sampling = FrameSampling(fps=2.0, max_frames=8)

    def __init__(self) -> None:
        super().__init__("stripes")
        torch.manual_seed(4)
        self.net = nn.Linear(3, 3)

    def plan(self, header: Any) -> Grid:
        return len((header.sampling or self.sampling).times(header.seconds)), 1, 2

    def seconds(self, header: Any, grid: Grid) -> tuple[float, ...]:
        return tuple((header.sampling or self.sampling).times(header.seconds))

    def wanted(self, header: Any) -> FrameSampling:
        return header.sampling or self.sampling

    def process(self, media: Any) -> dict[str, Tensor]:
        halves = np.stack(np.array_split(media.pixels, 2, axis=2), axis=1).mean((2, 3)) / 255
        return {"halves": torch.from_numpy(halves.astype(np.float32)).reshape(-1, 3)}

    def forward(self, inputs: Sequence[Inputs]) -> list[Encoded]:
        return [Encoded(self.net(i["halves"]), grid=(len(i["halves"]) // 2, 1, 2)) for i in inputs]

    def processing(self) -> str:
        return "halves"


def plaited(lab: Any) -> Built:
    """The tiny model with an encoder for each medium; all but the towers trains."""
    built: Built = lab.build()
    generator = torch.Generator().manual_seed(0)
    encoders = {"hf_vision": built.model.media_encoder("hf_vision")}
    for tower in (Loudness(), Stripes()):
        projector = create_projector("mlp", tower.width, 32, embedding_std=1, generator=generator)
        encoders[tower.name] = MediaEncoder(tower, create_pool("keep"), projector)
    layout = PlainLayout(
        {encoder.encoder.medium: encoder for encoder in encoders.values()}, timestamped=["stripes"]
    )
    return replace(built, model=PlaitModel(built.model.language, encoders), layout=layout)


def tone(seconds: float, pitch: float) -> Audio:
    time = np.arange(round(seconds * RATE)) / RATE
    return Audio(np.sin(2 * np.pi * pitch * time).astype(np.float32), rate=RATE)


def film(path: Path, seconds: float, sound: Any = None) -> Video:
    """A film whose colours change, with a tone."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, width=32, height=16, pix_fmt="yuv420p")
        track = container.add_stream("aac", rate=RATE, layout="mono")
        for number in range(round(seconds * 10)):
            pixels = np.full((16, 32, 3), (20 * number) % 256, dtype=np.uint8)
            pixels[:, 16:, 1] = 255 - pixels[:, 16:, 1]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        samples = np.sin(np.arange(round(seconds * RATE)) / 9).astype(np.float32)
        for at in range(0, len(samples), 1024):
            heard = av.AudioFrame.from_ndarray(samples[None, at : at + 1024], "fltp", "mono")
            heard.sample_rate, heard.pts, heard.time_base = RATE, at, Fraction(1, RATE)
            container.mux(track.encode(heard))
        container.mux(track.encode(None))
        container.mux(stream.encode(None))
    return Video(str(path), sound=sound)


@pytest.fixture
def samples(lab: Any, tmp_path: Path) -> list[Sample]:
    """Text alone, each medium, a film with its sound in both ways, and three media together."""

    def sample(answer: str, *parts: Any) -> Sample:
        asked = tuple(Text(p) if isinstance(p, str) else p for p in parts)
        return Sample((Message("user", asked), Message("assistant", (Text(answer),))), id=answer)

    return [
        sample("a bar", "what shape"),
        sample("a red disc", "look ", lab.picture(1)),
        sample("blue", tone(0.7, 440), " hear"),
        sample("green", "see ", film(tmp_path / "a.mp4", 2.3)),
        sample("small", film(tmp_path / "b.mp4", 2.0, "interleaved"), " and hear"),
        sample("big", film(tmp_path / "c.mp4", 1.5, "after")),
        sample("a yellow cross", "this ", lab.picture(2), " has sound ", tone(0.4, 300), " and"),
    ]


def loaded(built: Built, document: Document) -> list[ItemInputs]:
    return [
        ItemInputs(
            built.model.media_encoder(item.plan.encoder).encoder.process(
                item.part.decode(built.limits, item.plan.wanted)
            )
        )
        for item in document.items
    ]


def documents(built: Built, samples: Sequence[Sample], generation: bool = False) -> list[Any]:
    made = [render(s, built.tokenizer, built.layout, generation) for s in samples]
    for document in made:
        check_placeholders(document, built.layout.placeholder_id)
    return [(document, loaded(built, document)) for document in made]


def test_packed_and_single_rows_of_all_media_agree(lab: Any, samples: list[Sample]) -> None:
    built = plaited(lab)
    rows = documents(built, samples)
    apart = lab.gradients(built, [pack([document], [inputs]) for document, inputs in rows])
    together = lab.gradients(built, [pack(*zip(*rows, strict=True))])
    for alone, packed in zip(apart, together, strict=True):
        assert float((alone - packed).norm() / alone.norm()) < 1e-5


def test_every_trainable_parameter_is_entered_whatever_a_row_holds(
    lab: Any, samples: list[Sample]
) -> None:
    built = plaited(lab)
    for row in documents(built, samples):
        built.model.zero_grad(set_to_none=True)
        built.model.compute(pack([row[0]], [row[1]])).loss.backward()
        assert all(p.grad is not None for _, _, p in built.model.trainable())


def test_the_sound_of_a_film_stands_between_its_frames_in_time(
    lab: Any, samples: list[Sample]
) -> None:
    built = plaited(lab)
    document = render(samples[4], built.tokenizer, built.layout)
    assert [item.part.medium for item in document.items] == ["video", "audio"]
    assert [item.track_of for item in document.items] == [None, 0]
    heard = document.items[1]
    assert heard.plan.length == 20
    places: dict[str, list[tuple[int, float]]] = {"stripes": [], "loudness": []}
    for span in document.spans:
        plan = document.items[span.item].plan
        each = plan.length // len(plan.seconds)
        for row in range(span.offset // each, (span.offset + span.length) // each):
            places[span.encoder].append((span.start + row * each, plan.seconds[row]))
    order = sorted([place for found in places.values() for place in found])
    whole_seconds = [int(at) for _, at in order]
    assert whole_seconds == sorted(whole_seconds) and set(whole_seconds) == {0, 1}
    text = built.tokenizer.decode([i for i in document.token_ids.tolist() if i >= 0])
    assert "0.5s:" in text or "0.2s:" in text


def test_a_prompt_and_its_answer_are_the_training_row(lab: Any, samples: list[Sample]) -> None:
    built = plaited(lab)
    for sample in samples:
        row = render(sample, built.tokenizer, built.layout)
        prompt = render(
            replace(sample, messages=sample.messages[:1]), built.tokenizer, built.layout, True
        )
        assert row.token_ids[: prompt.length].tolist() == prompt.token_ids.tolist()
        assert row.spans == prompt.spans


def test_a_document_survives_the_way_through_chunks(lab: Any, samples: list[Sample]) -> None:
    built = plaited(lab)
    vocabulary = built.model.output_weight.shape[0]

    def encode(text: str) -> list[int]:
        ids: list[int] = built.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    for sample in samples:
        document = render(sample, built.tokenizer, built.layout)
        chunks = input_from(document).chunks
        again = document_from(
            [piece_of(chunk) for chunk in chunks],
            built.layout,
            encode,
            {"target_tokens": document.targets, "weights": document.weights},
            vocabulary=vocabulary,
        )
        assert again.token_ids.tolist() == document.token_ids.tolist()
        assert again.spans == document.spans
        assert [i.track_of for i in again.items] == [i.track_of for i in document.items]
        media = [chunk for chunk in chunks if not hasattr(chunk, "tokens")]
        assert len(media) == len(sample.media())
        assert sum(chunk.length for chunk in chunks) == document.length


def test_sampled_logprobs_are_the_trainers(lab: Any, samples: list[Sample]) -> None:
    built = plaited(lab)
    settings = SamplerSettings(max_tokens=5, temperature=1.0, seed=1, stop=())
    for prompt, inputs in documents(built, samples, generation=True):
        with torch.inference_mode():
            ((row,),) = generate(
                built.model, built.tokenizer, built.layout, [prompt], [inputs], settings
            )
        whole = lab.extended(prompt, row.tokens)
        weights = np.zeros(whole.length, dtype=np.float32)
        weights[prompt.length - 1 : -1] = 1
        targets = np.zeros(whole.length, dtype=np.int64)
        targets[prompt.length - 1 : -1] = row.tokens
        whole = replace(whole, weights=weights, targets=targets)
        with torch.no_grad():
            trained = built.model.compute(pack([whole], [inputs])).logprobs
        assert torch.allclose(trained, torch.tensor(row.logprobs), atol=1e-4)

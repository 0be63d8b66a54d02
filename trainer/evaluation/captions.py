"""Greedy answers to held-out prompts."""

from collections.abc import Sequence
from typing import Any

from plait.stream import Layout, Sample
from plait.trainer.evaluation.classes import prompt_of
from plait.trainer.evaluation.reader import Reader
from plait.trainer.model import PlaitModel
from plait.trainer.sampling.generating import generate
from plait.trainer.sampling.settings import SamplerSettings

PROMPTS_AT_ONCE = 16


def captions(
    model: PlaitModel,
    reader: Reader,
    tokenizer: Any,
    layout: Layout,
    samples: Sequence[Sample],
    max_tokens: int,
) -> list[str]:
    """The model's greedy answer to each sample's prompt, as text."""
    settings = SamplerSettings(max_tokens=max_tokens, temperature=0)
    texts: list[str] = []
    for some in reader.prompts([prompt_of(sample) for sample in samples], PROMPTS_AT_ONCE):
        documents, inputs = zip(*some, strict=True)
        for rows in generate(model, tokenizer, layout, documents, inputs, settings):
            texts.append(tokenizer.decode(rows[0].tokens, skip_special_tokens=True).strip())
    return texts

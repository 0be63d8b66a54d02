"""The rows that `benchmarks.step` trains on, as both sides get them.

Shape letters: T tokens of a row, N positions of a picture, C channels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.step_model import PICTURE, Batch, Row
from plait.datasets.records import open_records
from plait.errors import PlaitError
from plait.modalities import Text
from plait.trainer.config import load_config
from plait.trainer.data import locate

RECIPE = Path(__file__).parent.parent / "configs" / "stamps.yaml"
BATCH = 16
START = 1
"""SmolLM2's start token."""

VLM_SAMPLES = 20_000
VLM_LEARNED = 0.25
"""Share of a sample's text that is an answer: its end, after the last picture."""


def fill_of(batches: Sequence[Batch]) -> float:
    """The share of positions that samples take when each batch is padded to its longest."""
    padded = sum(len(batch) * max(len(row.ids) for row in batch) for batch in batches)
    return round(sum(len(row.ids) for batch in batches for row in batch) / padded, 3)


def stamps(tokenizer: Any, count: int, channels: int) -> tuple[list[Batch], str]:
    """Shuffled batches of the start token, a picture of 2 x 2 positions and its caption.

    Returns:
        The batches, and where the captions are from.

    Args:
        tokenizer: Of the language model; None draws captions' lengths and tokens instead.
    """
    r = np.random.default_rng(0)
    captions, source = _captions(tokenizer, r, count * BATCH)
    rows = [
        _row(np.concatenate([[START], np.full(4, PICTURE), caption]), 5, [4], channels, r)
        for caption in captions
    ]
    return [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)], source


def _captions(
    tokenizer: Any, r: np.random.Generator, count: int
) -> tuple[list[NDArray[np.int64]], str]:
    if tokenizer is not None:
        try:
            texts = _stamp_texts()
        except PlaitError:
            pass  # not fetched, which the result says
        else:
            chosen = r.permutation(len(texts))[:count]
            ids = [[*tokenizer(texts[i]).input_ids, tokenizer.eos_token_id] for i in chosen]
            return [np.array(row) for row in ids], "the stamps' captions, shuffled"
    lengths = np.clip(r.lognormal(np.log(7.2), 0.5, count).astype(np.int64), 4, 45)
    return [r.integers(3, 49_152, n) for n in lengths], "drawn: the stamps are not fetched"


def _stamp_texts() -> list[str]:
    data = load_config(RECIPE, []).data
    records = open_records(locate(data.path), captions=data.captions)
    answers = [sample.messages[-1].parts[0] for sample in records]
    return [answer.text for answer in answers if isinstance(answer, Text)]


def vlm(vocabulary: int, count: int, channels: int) -> list[Batch]:
    """The first `count` shuffled batches of the `vlm` mix of lengths.

    Its draws are those of `benchmarks.packing`: text log-normal around 120 tokens, then k pictures
    of 256, 576 or 1024 positions.
    """
    r = np.random.default_rng(0)
    text = np.clip(r.lognormal(np.log(120), 0.9, VLM_SAMPLES).astype(np.int64), 8, 4096)
    pictures = r.choice([0, 1, 2, 4], VLM_SAMPLES, p=[0.15, 0.60, 0.15, 0.10])
    each = r.choice([256, 576, 1024], VLM_SAMPLES, p=[0.5, 0.3, 0.2])
    chosen = np.random.default_rng(1).permutation(VLM_SAMPLES)[: count * BATCH]
    rows = [
        _vlm_row(int(text[i]), int(pictures[i]), int(each[i]), vocabulary, channels, r)
        for i in chosen
    ]
    return [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]


def _vlm_row(
    text: int, pictures: int, each: int, vocabulary: int, channels: int, r: np.random.Generator
) -> Row:
    answer = max(1, round(VLM_LEARNED * text))
    question = r.integers(0, vocabulary, text - answer)
    head = np.concatenate([np.full(pictures * each, PICTURE), question])
    ids = np.concatenate([head, r.integers(0, vocabulary, answer)])
    return _row(ids, len(head), [each] * pictures, channels, r)


def _row(
    ids: NDArray[np.int64], learned_from: int, pictures: list[int], channels: int,
    r: np.random.Generator,
) -> Row:  # fmt: skip
    learned = np.arange(len(ids)) >= max(1, learned_from)
    features = tuple(
        torch.from_numpy(r.standard_normal((n, channels), dtype=np.float32)) for n in pictures
    )
    return Row(ids.astype(np.int64), learned, features)

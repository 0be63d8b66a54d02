"""Negative log-likelihood of held-out answers, with their own media and with others'."""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from plait.modalities import MediaPart
from plait.stream import Message, Sample
from plait.trainer.evaluation.reader import Reader
from plait.trainer.model import PlaitModel

DERANGEMENT_SEEDS = (1, 2, 3)
"""Each seed gives one fixed exchange of media between samples of other classes."""

_ATTEMPTS = 1000


@torch.inference_mode()
def nll(model: PlaitModel, reader: Reader, samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """(summed nll in nats, summed weight) of each sample's learned tokens, the end included."""
    model.eval()
    sums: list[tuple[float, float]] = [(0.0, 0.0)] * len(samples)
    for held, stream in reader.streams(samples):
        for number, pair in zip(held, model.compute(stream).documents, strict=True):
            sums[number] = pair
    return sums


def per_token(sums: Sequence[tuple[float, float]]) -> float:
    """Nats per learned token over all samples."""
    return sum(loss for loss, _ in sums) / sum(weight for _, weight in sums)


def deranged(samples: Sequence[Sample], seed: int) -> list[Sample] | None:
    """Samples with one another's media, every one of another class; None where none exists.

    Without labels every sample counts as a class of its own. A class with more than half of the
    samples cannot be deranged, nor can samples without media or with unequal numbers of them.
    """
    counts = {len(sample.media()) for sample in samples}
    if len(counts) != 1 or counts == {0}:
        return None
    labels = [sample.label or str(number) for number, sample in enumerate(samples)]
    order = _derangement(labels, random.Random(seed))
    if order is None:
        return None
    return [
        with_media(sample, samples[i].media()) for sample, i in zip(samples, order, strict=True)
    ]


def _derangement(labels: Sequence[str], rng: random.Random) -> list[int] | None:
    """A permutation that moves every entry to a place of another label."""
    order = list(range(len(labels)))
    if not order or 2 * max(labels.count(label) for label in set(labels)) > len(labels):
        return None
    rng.shuffle(order)
    for _ in range(_ATTEMPTS):
        wrong = [i for i, j in enumerate(order) if labels[i] == labels[j]]
        if not wrong:
            return order
        for i in wrong:
            k = rng.randrange(len(order))
            # Only exchanges that leave both places right, or no worse than they are.
            if labels[i] != labels[order[k]] and labels[k] != labels[order[i]]:
                order[i], order[k] = order[k], order[i]
    return None


def with_media(sample: Sample, media: Sequence[MediaPart]) -> Sample:
    """The sample with its media replaced, in order; both must have the same number."""
    given = iter(media)

    def swap(message: Message) -> Message:
        parts = tuple(next(given) if isinstance(p, MediaPart) else p for p in message.parts)
        return replace(message, parts=parts)

    messages = tuple(swap(message) for message in sample.messages)
    parts = tuple(next(given) if isinstance(p, MediaPart) else p for p in sample.parts)
    return replace(sample, messages=messages, parts=parts)

"""Negative log-likelihood of held-out answers, and how much it changes with the samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plait.stream import Sample
from plait.trainer.evaluation.reader import Reader
from plait.trainer.model import PlaitModel

RESAMPLES = 10_000
"""Of the bootstrap; its interval's ends then vary by about a hundredth of its width."""

Sums = Sequence[tuple[float, float]]
"""(summed nll in nats, summed weight) of each sample."""


def nll(model: PlaitModel, reader: Reader, samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """(summed nll in nats, summed weight) of each sample's learned tokens, the end included."""
    model.eval()
    sums: list[tuple[float, float]] = [(0.0, 0.0)] * len(samples)
    with model.backbone.without_gradients():
        for held, stream in reader.streams(samples):
            for number, pair in zip(held, model.compute(stream).documents, strict=True):
                sums[number] = pair
    return sums


def per_token(sums: Sums) -> float:
    """Nats per learned token over all samples."""
    return sum(loss for loss, _ in sums) / sum(weight for _, weight in sums)


@dataclass(frozen=True, slots=True)
class Gap:
    """By how many nats a token changed samples are worse than the samples as they are.

    `low` and `high` are the ends of the 95 % paired bootstrap interval over `count` samples.
    """

    difference: float
    low: float
    high: float
    count: int


def gap(as_they_are: Sums, changed: Sequence[Sums]) -> Gap:
    """Compare samples with one or more changed versions of themselves, whose losses are averaged.

    Samples are drawn with replacement, each with its changed versions (Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993, section 13.3), from a fixed seed.
    """
    losses = np.array([loss for loss, _ in as_they_are])
    weights = np.array([weight for _, weight in as_they_are])
    worse = np.mean([[loss for loss, _ in sums] for sums in changed], axis=0) - losses
    draws = np.random.default_rng(0).integers(len(losses), size=(RESAMPLES, len(losses)))
    found: NDArray[np.float64] = worse[draws].sum(1) / weights[draws].sum(1)
    low, high = np.quantile(found, [0.025, 0.975])
    return Gap(float(worse.sum() / weights.sum()), float(low), float(high), len(losses))

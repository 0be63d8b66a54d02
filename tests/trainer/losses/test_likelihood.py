"""Cross entropy, dense and over soft targets."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from plait.trainer.losses import loss_named


def cross_entropy(document: Any, config: Any) -> Any:
    terms = [-w * lp for w, lp in zip(document["w"], document["lp"], strict=True)]
    return terms, [-w for w in document["w"]]


def soft_cross_entropy(document: Any, config: Any) -> Any:
    terms, slopes = [], []
    for weights, logprobs in zip(document["w"], document["lp"], strict=True):
        terms += [-w * lp for w, lp in zip(weights, logprobs, strict=True)]
        slopes.append([-w for w in weights])
    return terms, slopes


def test_cross_entropy_is_the_weighted_sum(make: Any, agrees: Callable[..., None]) -> None:
    agrees(make("cross_entropy"), cross_entropy)
    agrees(make("cross_entropy", (1,)), cross_entropy)


@pytest.mark.parametrize("targets", [1, 2, 5])
def test_soft_targets_are_weighted_each(
    make: Any, agrees: Callable[..., None], targets: int
) -> None:
    agrees(make("cross_entropy", targets=targets), soft_cross_entropy)


def test_positions_with_any_weight_are_learned() -> None:
    learned = loss_named("cross_entropy").learned
    assert learned({"weights": np.array([0, 1, -0.5, 0])}, {}).tolist() == [0, 1, 1, 0]
    soft = np.array([[0, 0], [0, 0.5], [1, 0]])
    assert learned({"weights": soft}, {}).tolist() == [False, True, True]

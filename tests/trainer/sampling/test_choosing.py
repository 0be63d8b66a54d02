"""Tokens are chosen as the settings say, row by row, whatever stands in the other rows.

Shape letters: B rows, V tokens of the vocabulary.
"""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from plait.trainer.sampling.choosing import _FIRST_LOOK, Chosen, Draws, choose
from plait.trainer.sampling.settings import SamplerSettings

FEW, MANY = 40, _FIRST_LOOK + 512
"""Vocabularies: one that is sorted at the first look, one that needs a second."""

NONE = torch.empty(0, dtype=torch.long)


class At(Draws):
    """A draw that is known."""

    def __init__(self, uniform: float) -> None:
        self._uniform = uniform

    def next(self) -> float:
        return self._uniform


def logits_of(seed: int, size: int, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def distribution(logits: Tensor, banned: Tensor, **settings: Any) -> NDArray[np.float64]:
    """(V,) what a token is drawn with, as the settings' docstrings say it, in float64."""
    values = SamplerSettings(**settings)
    scores = logits.double().numpy() / values.temperature
    scores[banned.numpy()] = -np.inf
    probabilities: NDArray[np.float64] = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    if values.top_k != -1:
        probabilities[order[values.top_k :]] = 0
        probabilities /= probabilities.sum()
    held = np.cumsum(probabilities[order])
    if values.top_p < 1:
        probabilities[order[int(np.searchsorted(held, values.top_p)) + 1 :]] = 0
    probabilities[probabilities < values.min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


def chosen_at(
    logits: Tensor, uniform: NDArray[np.float64], banned: Tensor = NONE, **settings: Any
) -> Chosen:
    """A row for each draw, all with the same logits."""
    values = SamplerSettings(**settings)
    rows = logits.expand(len(uniform), -1)
    return choose(rows, [values] * len(rows), [At(float(u)) for u in uniform], banned)


CUTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7, "temperature": 2.0},
    {"top_k": 10_000},
    {"top_p": 0.5},
    {"top_p": 0.9, "temperature": 2.0},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 0.3, "temperature": 2.5},
    {"min_p": 1.0},
    {"top_k": 12, "top_p": 0.6},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.2, "temperature": 1.7},
]


@pytest.mark.parametrize("settings", CUTS, ids=str)
@pytest.mark.parametrize("size", [FEW, MANY])
def test_every_token_is_drawn_as_often_as_the_settings_say(
    settings: dict[str, Any], size: int
) -> None:
    """Draws at equal distances hit each token as often as it is likely, but for two ends."""
    logits, banned = logits_of(1, size), torch.tensor([3, 17])
    expected = distribution(logits, banned, **settings)
    count = 2000
    chosen = chosen_at(logits, (np.arange(count) + 0.5) / count, banned, **settings)
    made = np.bincount(chosen.tokens, minlength=size)
    assert np.abs(made - count * expected).max() < 2
    assert not made[expected == 0].any()
    raw = logits.log_softmax(-1)
    assert chosen.logprobs == pytest.approx(raw[chosen.tokens].tolist(), abs=1e-5)


@pytest.mark.parametrize("settings", CUTS, ids=str)
def test_the_least_and_the_greatest_draw_are_tokens_too(settings: dict[str, Any]) -> None:
    """The first and the last that may be drawn; never one that may not."""
    for size in (FEW, MANY):
        logits, banned = logits_of(2, size), torch.tensor([0, size - 1])
        expected = distribution(logits, banned, **settings)
        chosen = chosen_at(logits, np.array([0.0, 1 - 2**-53]), banned, **settings)
        assert all(expected[token] > 0 for token in chosen.tokens)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.95},
        {"top_p": 0.9, "temperature": 1.5},
        {"top_k": _FIRST_LOOK + 200},
        {"top_k": _FIRST_LOOK + 200, "top_p": 0.97},
        {"top_k": _FIRST_LOOK + 400, "top_p": 0.3},
        {"top_k": _FIRST_LOOK + 1, "top_p": 0.999},
    ],
    ids=str,
)
def test_flat_distributions_need_more_than_the_first_look(settings: dict[str, Any]) -> None:
    logits = logits_of(3, MANY, spread=0.5)
    expected = distribution(logits, NONE, **settings)
    kept = int((expected > 0).sum())
    assert max(kept, settings.get("top_k", 0)) > _FIRST_LOOK
    count = 2 * MANY
    chosen = chosen_at(logits, (np.arange(count) + 0.5) / count, **settings)
    made = np.bincount(chosen.tokens, minlength=MANY)
    assert np.abs(made - count * expected).max() < 2
    assert abs(len(set(chosen.tokens)) - kept) <= 1  # a rounding error may move the last


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.6}, {"top_k": 9, "top_p": 0.8}], ids=str
)
def test_draws_of_seeds_follow_the_distribution(settings: dict[str, Any]) -> None:
    """A chi-square of many samples of one prompt: its mean is its degrees of freedom."""
    logits, count = logits_of(4, FEW, spread=1.0), 4000
    values = SamplerSettings(seed=5, **settings)
    draws = [Draws(values.seed, number) for number in range(count)]
    chosen = choose(logits.expand(count, -1), [values] * count, draws, NONE)
    expected = count * distribution(logits, NONE, **settings)
    made = np.bincount(chosen.tokens, minlength=FEW)
    usual = expected >= 5
    freedom = int(usual.sum()) - 1
    chi_square = float(((made - expected)[usual] ** 2 / expected[usual]).sum())
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_greedy_takes_the_likeliest_that_is_allowed() -> None:
    logits = torch.stack([logits_of(seed, FEW) for seed in range(8)])
    banned = logits.argmax(-1)[:3].unique()
    chosen = choose(logits, [SamplerSettings(temperature=0)] * 8, [At(0.5)] * 8, banned)
    scores = logits.double().numpy()
    raw = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    scores[:, banned.numpy()] = -np.inf
    assert chosen.tokens == scores.argmax(-1).tolist()
    expected = raw[np.arange(8), chosen.tokens].tolist()
    assert chosen.logprobs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("temperature", [1e-4, 1e-20, 1e-45, 1e-300])
@pytest.mark.parametrize("more", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
def test_next_to_no_temperature_is_greedy(temperature: float, more: dict[str, Any]) -> None:
    logits, banned = logits_of(6, FEW), torch.tensor([0])
    logits[0] = 30
    best = int(logits[1:].argmax()) + 1
    uniform = np.array([0.0, 0.3, 0.999])
    assert chosen_at(logits, uniform, banned, temperature=temperature, **more).tokens == 3 * [best]


def many_rows(count: int) -> tuple[Tensor, list[SamplerSettings]]:
    """Rows as a bfloat16 model makes them, where many tokens are equally likely, of every
    sharpness, and settings of every kind."""
    generator = np.random.default_rng(8)
    rows, settings = [], []
    for number in range(count):
        row = logits_of(number, MANY, spread=float(generator.choice([0.3, 2.0, 8.0])))
        rows.append(row.bfloat16().float())
        options = dict(CUTS[number % len(CUTS)])
        options["temperature"] = float(generator.choice([0.0, 0.5, 1.0, 2.0]))
        settings.append(SamplerSettings(seed=number % 3, **options))
    return torch.stack(rows), settings


def test_rows_choose_what_they_choose_alone() -> None:
    """Exactly, though flat rows make the sampler sort more than sharp ones need."""
    count = 6 * len(CUTS)
    logits, settings = many_rows(count)
    banned = torch.tensor([1, 5, MANY - 1])
    for turn in range(4):
        draws = [[Draws(s.seed, turn) for s in settings] for _ in range(2)]
        together = choose(logits, settings, draws[0], banned)
        for row in range(count):
            one = slice(row, row + 1)
            alone = choose(logits[one], settings[one], draws[1][one], banned)
            assert alone.tokens[0] == together.tokens[row], settings[row]
            assert alone.logprobs[0] == pytest.approx(together.logprobs[row], abs=1e-6)


def test_banned_tokens_are_never_chosen_and_still_count_in_logprobs() -> None:
    logits = logits_of(9, FEW)
    banned = logits.topk(5).indices
    raw = logits.double().log_softmax(-1)
    for settings in CUTS:
        chosen = chosen_at(logits, np.linspace(0, 0.999, 200), banned, **settings)
        assert not set(chosen.tokens) & set(banned.tolist())
        assert chosen.logprobs == pytest.approx(raw[chosen.tokens].tolist(), abs=1e-5)


def drawn(seed: int, number: int, count: int = 50) -> list[float]:
    draws = Draws(seed, number)
    return [draws.next() for _ in range(count)]


def test_draws_are_those_of_the_seed_and_the_sample() -> None:
    seeds = [0, 1, 7, 2**32, 2**63 + 1, 2**64 - 1]
    made = {(seed, number): drawn(seed, number) for seed in seeds for number in range(5)}
    for (seed, number), values in made.items():
        assert values == drawn(seed, number)
        assert all(0 <= value < 1 for value in values)
    assert len({tuple(values) for values in made.values()}) == len(made)
    assert len({value for values in made.values() for value in values}) == 50 * len(made)
    assert abs(np.mean([drawn(3, number) for number in range(40)]) - 0.5) < 0.03


@pytest.mark.parametrize("temperature", [1e38, 1e39, 1e300])
def test_no_temperature_lets_in_what_is_excluded(temperature: float) -> None:
    """However hot, also beyond what a float32 holds: all others, each as often."""
    logits, banned = logits_of(8, FEW), torch.tensor([0, FEW - 1])
    chosen = chosen_at(logits, (np.arange(FEW) + 0.5) / FEW, banned, temperature=temperature)
    assert set(chosen.tokens) == set(range(1, FEW - 1))
    assert np.isfinite(chosen.logprobs).all()

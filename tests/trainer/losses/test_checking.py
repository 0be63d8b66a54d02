"""Settings and inputs that a loss cannot use are refused before anything is computed."""

import re
from typing import Any

import numpy as np
import pytest

from plait.errors import ConfigError, DataError, Origin, UnknownNameError
from plait.trainer.losses import check_inputs, config_of, loss_named

N, K = 5, 3
ONES = np.ones(N, np.float32)
TARGETS = np.arange(N)
SOFT_TARGETS = np.arange(N * K).reshape(N, K)
SOFT = np.full((N, K), -2.0, np.float32)
POLICY = {"target_tokens": TARGETS, "logprobs": -ONES, "advantages": ONES}
GOOD: dict[str, dict[str, Any]] = {
    "cross_entropy": {"target_tokens": TARGETS, "weights": ONES},
    "importance_sampling": POLICY,
    "ppo": POLICY,
    "cispo": POLICY | {"weights": ONES},
    "dro": POLICY | {"reference_logprobs": -ONES},
    "gspo": POLICY | {"sequence_ratio_mask": ONES},
    "dpo": {"target_tokens": TARGETS, "weights": ONES, "reference_logprobs": -ONES},
    "kto": {
        "target_tokens": TARGETS,
        "weights": ONES,
        "reference_logprobs": -ONES,
        "labels": -ONES,
    },
    "distillation": {"target_tokens": SOFT_TARGETS, "target_logprobs": SOFT, "weights": ONES},
}


def check(name: str, positions: int = N, config: Any = None, **changes: Any) -> None:
    """The good inputs of a loss, with some changed and those that are None left out."""
    changed = GOOD[name] | changes
    inputs = {key: values for key, values in changed.items() if values is not None}
    check_inputs(loss_named(name), inputs, positions, Origin("rows", 7), config)


@pytest.mark.parametrize("name", sorted(GOOD))
def test_good_inputs_pass(name: str) -> None:
    check(name)
    empty = {key: values[:0] for key, values in GOOD[name].items()}
    check(name, 0, **empty)


def test_soft_targets_have_soft_weights() -> None:
    check("cross_entropy", target_tokens=SOFT_TARGETS, weights=-SOFT)


def at(*places: int, value: float = np.nan, like: Any = ONES) -> Any:
    changed = like.copy()
    changed[places] = value
    return changed


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("ppo", {"logprobs": None}, "needs target_tokens, logprobs, advantages; logprobs is missing"),
    ("importance_sampling", {"advantages": None}, "advantages is missing"),
    ("cross_entropy", {"target_tokens": None}, "target_tokens is missing"),
    ("gspo", {"sequence_ratio_mask": None}, "sequence_ratio_mask is missing"),
    ("dpo", {"reference_logprobs": None}, "reference_logprobs is missing"),
    ("kto", {"labels": None}, "labels is missing"),
    ("distillation", {"target_logprobs": None}, "target_logprobs is missing"),
    ("ppo", {"advantages": ONES[:4]}, "advantages needs one value per position: the input has 5 "
     "and it has 4"),
    ("ppo", {"target_tokens": np.arange(6)}, "target_tokens needs one value per position: the "
     "input has 5 and it has 6"),
    ("ppo", {"advantages": np.float32(1)}, "it has a single number"),
    ("distillation", {"target_logprobs": SOFT[:4]}, "has 5 and it has 4"),
    ("ppo", {"target_tokens": SOFT_TARGETS}, "takes target_tokens of shape (N,); they are (5, 3)"),
    ("distillation", {"target_tokens": TARGETS}, "of shape (N, K); they are (5,)"),
    ("cross_entropy", {"target_tokens": SOFT_TARGETS[..., None]},
     "of shape (N,) or (N, K); they are (5, 3, 1)"),
    ("cross_entropy", {"target_tokens": SOFT_TARGETS}, "weights must have the shape (5, 3) for "
     "loss 'cross_entropy' and targets of shape (5, 3); it is (5,)"),
    ("cross_entropy", {"weights": SOFT}, "weights must have the shape (5,)"),
    ("cross_entropy", {"target_tokens": SOFT_TARGETS, "weights": SOFT[:, :2]},
     "must have the shape (5, 3)"),
    ("ppo", {"logprobs": SOFT}, "logprobs must have the shape (5,)"),
    ("distillation", {"weights": SOFT}, "weights must have the shape (5,) for loss"),
    ("distillation", {"target_logprobs": ONES}, "target_logprobs must have the shape (5, 3)"),
    ("ppo", {"logprobs": at(2)}, "logprobs must be finite; it is nan at position 2"),
    ("ppo", {"advantages": at(4, value=np.inf)}, "advantages must be finite; it is inf at pos"),
    ("cispo", {"weights": at(0, value=-np.inf)}, "weights must be finite; it is -inf at"),
    ("distillation", {"target_logprobs": at(3, 1, like=SOFT)}, "it is nan at position 3"),
    ("gspo", {"sequence_ratio_mask": 0 * ONES}, "sequence_ratio_mask marks the tokens that the "
     "ratio is taken over; it is 0 in all"),
    ("kto", {"labels": at(2, value=1, like=-ONES)}, "the same at every position of a document; "
     "they are -1, 1"),
    ("kto", {"labels": 0 * ONES}, "they are 0"),
    ("kto", {"labels": 2 * ONES}, "labels are 1 (desirable) or -1 (undesirable)"),
    ("distillation", {"target_logprobs": at(1, like=SOFT, value=-0.5)}, "at position 1 they sum "
     "to 1.82"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "match"), REFUSED)
def test_what_a_loss_cannot_use_is_refused(name: str, changes: Any, match: str) -> None:
    with pytest.raises(DataError, match=re.escape(match)) as refused:
        check(name, **changes)
    assert refused.value.origin == Origin("rows", 7)
    assert not isinstance(refused.value, UnknownNameError)


def test_an_input_that_a_loss_does_not_read_is_refused() -> None:
    with pytest.raises(
        UnknownNameError, match=r"input of loss 'ppo' 'advantage'; did you mean 'advantages'\?"
    ):
        check("ppo", advantage=ONES)
    with pytest.raises(UnknownNameError, match="input of loss 'cross_entropy' 'advantages'"):
        check("cross_entropy", advantages=ONES)
    with pytest.raises(UnknownNameError, match="did you mean 'logprobs'"):
        check("ppo", target_logprobs=ONES)


def test_a_coefficient_needs_its_input() -> None:
    config = config_of(loss_named("ppo"), {"kl_coefficient": 0.1})
    with pytest.raises(DataError, match="reference_logprobs is missing"):
        check("ppo", config=config)
    check("ppo", config=config, reference_logprobs=-ONES)
    check("ppo", reference_logprobs=-ONES)


def test_a_document_without_advantages_needs_no_mask() -> None:
    check("gspo", sequence_ratio_mask=0 * ONES, advantages=0 * ONES)


def test_settings_are_numbers_in_their_ranges() -> None:
    loss = loss_named("ppo")
    config = config_of(loss, {"clip_low_threshold": 1, "clip_high_threshold": np.float32(1.5)})
    assert config == {
        "clip_low_threshold": 1.0,
        "clip_high_threshold": 1.5,
        "kl_coefficient": 0.0,
        "entropy_coefficient": 0.0,
    }
    assert all(type(value) is float for value in config.values())
    assert config_of(loss, None) == config_of(loss, {}) == loss.defaults
    assert config_of(loss) is not loss.defaults


@pytest.mark.parametrize(
    ("name", "given", "match"),
    [
        ("ppo", {"clip_low_threshold": -0.1}, "at least 0; it is -0.1"),
        ("ppo", {"clip_low_threshold": 1.3}, "clip_low_threshold must not be above clip_high_thre"
         "shold; they are 1.3 and 1.2: both are ratios, by default 0.8 and 1.2"),
        ("cispo", {"clip_high_threshold": float("inf")}, "it is inf"),
        ("gspo", {"clip_high_threshold": float("nan")}, "it is nan"),
        ("dro", {"beta": 0}, "loss_fn_config['beta'] must be a number above 0; it is 0"),
        ("dro", {"beta": True}, "it is True"),
        ("dro", {"beta": "0.1"}, "it is '0.1'"),
        ("dpo", {"beta": -1}, "above 0; it is -1"),
        ("dpo", {"label_smoothing": 0.6}, "in [0, 0.5]; it is 0.6"),
        ("kto", {"beta": 0}, "above 0; it is 0"),
        ("kto", {"desirable_weight": -1}, "at least 0"),
        ("kto", {"undesirable_weight": -1}, "at least 0"),
        ("kto", {"reference_kl": -1}, "at least 0"),
        ("ppo", {"kl_coefficient": -1}, "at least 0"),
        ("ppo", {"entropy_coefficient": -1}, "at least 0"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_used_is_refused(name: str, given: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(match)):
        config_of(loss_named(name), given)


def test_an_unknown_setting_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        UnknownNameError, match=r"key of loss 'ppo' 'clip_low'; did you mean 'clip_low_threshold'"
    ):
        config_of(loss_named("ppo"), {"clip_low": 0.2})
    with pytest.raises(UnknownNameError, match="key of loss 'cross_entropy' 'beta'"):
        config_of(loss_named("cross_entropy"), {"beta": 0.2})

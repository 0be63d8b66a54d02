"""Failure budgets."""

import json

import pytest

from plait.datasets.policy import FailurePolicy
from plait.errors import ConfigError, DataError, FailureBudgetError, MediaError, Origin


def broken(row: int) -> MediaError:
    return MediaError("a picture must be whole", Origin("d", row, f"{row}.png"))


def test_raise_hands_on_the_error_itself() -> None:
    error = broken(3)
    with pytest.raises(MediaError) as caught:
        FailurePolicy().failure(error)
    assert caught.value is error


def test_the_total_counts_rows_and_not_attempts() -> None:
    policy = FailurePolicy("skip", max_consecutive=None, max_total=2)
    for row in (0, 1, 0, 1, 0):
        policy.failure(broken(row))
    assert policy.total == 2
    with pytest.raises(FailureBudgetError, match=r"at most 2 .* 3 broke.*max_total.*row 7"):
        policy.failure(broken(7))


def test_consecutive_failures_are_forgotten_at_a_good_row() -> None:
    policy = FailurePolicy("skip", max_consecutive=2, max_total=None)
    for row in range(10):
        policy.failure(broken(2 * row))
        policy.failure(broken(2 * row + 1))
        policy.success()
    policy.failure(broken(50))
    policy.failure(broken(51))
    with pytest.raises(FailureBudgetError, match=r"one after another.*max_consecutive") as caught:
        policy.failure(broken(52))
    assert caught.value.origin == Origin("d", 52, "52.png")
    assert isinstance(caught.value, DataError)


def test_a_budget_of_none_broken() -> None:
    with pytest.raises(FailureBudgetError, match="at most 0"):
        FailurePolicy("skip", max_total=0).failure(broken(1))


def test_counters_survive_json() -> None:
    policy = FailurePolicy("skip", max_consecutive=5, max_total=3)
    for row in (0, 1, 2):
        policy.failure(broken(row))
    again = FailurePolicy("skip", max_consecutive=5, max_total=3)
    again.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert (again.total, again.consecutive) == (3, 3)
    again.failure(broken(1))
    with pytest.raises(FailureBudgetError):
        again.failure(broken(9))


@pytest.mark.parametrize(
    "settings", [{"on_error": "ignore"}, {"too_long": "cut"}, {"max_total": -1}]
)
def test_settings_are_checked(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        FailurePolicy(**settings)  # type: ignore[arg-type]

"""Numbers that settings may have: one check, and one sentence, for all of them."""

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from plait.errors import ConfigError

ADAMW = {
    "learning_rate": "[0, inf)",
    "beta1": "[0, 1)",
    "beta2": "[0, 1)",
    "eps": "(0, inf)",
    "weight_decay": "[0, inf)",
    "grad_clip_norm": "[0, inf)",
}
"""The settings of an AdamW step, by name, with the intervals that they lie in."""

SAMPLING = {"temperature": "[0, inf)", "top_p": "(0, 1]", "min_p": "[0, 1]"}
"""The settings of sampling that are real numbers."""


def check_number(name: str, value: Any, interval: str, *, whole: bool = False) -> None:
    """Refuse what is not a number in an interval; NaN and infinity are in none.

    Args:
        interval: As it is written in mathematics: "[0, 1)" holds 0 and not 1.

    Raises:
        ConfigError: with the rule and the value.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    fits = (
        is_number(value, whole=whole)
        and (low <= value if interval[0] == "[" else low < value)
        and (value <= high if interval[-1] == "]" else value < high)
    )
    if not fits:
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{name} must be {kind} {_in_words(interval)}; it is {value!r}")


def is_number(value: object, *, whole: bool = False) -> bool:
    """Python's and numpy's numbers; True and False are none."""
    return not isinstance(value, bool) and isinstance(value, Integral if whole else Real)


def check_numbers(settings: object, intervals: Mapping[str, str]) -> None:
    """`check_number` for the attributes of `settings` that `intervals` names.

    Raises:
        ConfigError: as `check_number`, for the first that does not fit.
    """
    for name, interval in intervals.items():
        check_number(name, getattr(settings, name), interval)


def _in_words(interval: str) -> str:
    low, high = interval[1:-1].split(", ")
    if high != "inf":
        return f"in {interval}"
    return f"of at least {low}" if interval[0] == "[" else f"above {low}"

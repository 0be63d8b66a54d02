"""Numbers of settings: what is in an interval, and how a refusal reads."""

import math
from typing import Any

import numpy as np
import pytest

from plait.errors import ConfigError
from plait.ranges import check_number


@pytest.mark.parametrize(("interval", "inside", "outside"), [
    ("[0, inf)", [0, 0.5, 1e300, np.float32(2), np.int64(3)], [-1e-9, math.inf, math.nan]),
    ("(0, inf)", [1e-300], [0, -1]),
    ("[0, 1)", [0, 0.999], [1, 1.0]),
    ("(0, 1]", [1, 0.1], [0, 1.001]),
])  # fmt: skip
def test_intervals(interval: str, inside: list[Any], outside: list[Any]) -> None:
    for value in inside:
        check_number("it", value, interval)
    for value in [*outside, None, "1", True, [1]]:
        with pytest.raises(ConfigError, match=r"^it must be a number .*; it is "):
            check_number("it", value, interval)


def test_whole_numbers() -> None:
    for value in (1, 10**400, np.int64(7)):
        check_number("it", value, "[1, inf)", whole=True)
    for wrong in (0, 1.0, True, None):
        with pytest.raises(ConfigError, match="it must be a whole number of at least 1; it is"):
            check_number("it", wrong, "[1, inf)", whole=True)


def test_a_refusal_says_the_interval() -> None:
    with pytest.raises(ConfigError, match=r"^beta1 must be a number in \[0, 1\); it is 1$"):
        check_number("beta1", 1, "[0, 1)")
    with pytest.raises(ConfigError, match=r"^eps must be a number above 0; it is nan$"):
        check_number("eps", math.nan, "(0, inf)")

"""Fixtures of the kernels' tests, which need nothing but torch: a GPU machine runs them alone.

python -m pytest --confcutdir=tests/kernels tests/kernels
"""

import plait  # noqa: F401, I001  (must come first; see plait/__init__.py)

import math
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote is NaN, or no index of anything, so that reading it shows."""

    def poison(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def fresh(*args: Any, **options: Any) -> Tensor:
            made: Tensor = original(*args, **options)
            if made.is_floating_point():
                return made.fill_(math.nan)
            return made.fill_(10**9) if made.dtype in (torch.int32, torch.int64) else made

        monkeypatch.setattr(owner, name, fresh)

    for name in ("empty", "empty_like", "empty_strided"):
        poison(torch, name)
    poison(Tensor, "new_empty")

"""Grouped LoRA as its definition says, in float64, one segment after another. Truth for tests.

Shape letters: T positions, I inputs, O outputs, r_g rank of adapter g.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def grouped_lora(
    x: Tensor,
    base: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    bounds: Sequence[tuple[int, int]],
    adapters: Sequence[int | None],
) -> Tensor:
    """x (T, I), base (T, O), a[g] (r_g, I), b[g] (O, r_g) -> (T, O) in float64."""
    added = torch.zeros_like(base, dtype=torch.float64)
    for (start, stop), g in zip(bounds, adapters, strict=True):
        if g is not None:
            low = x[start:stop].double() @ a[g].double().T
            added[start:stop] = scales[g] * low @ b[g].double().T
    return base.double() + added

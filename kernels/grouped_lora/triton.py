"""Grouped LoRA on a GPU: a shrink, an expand and an outer product over blocks of one adapter each.

The rows of a block are read and written through the adapter order, so scattered documents cost
the same as adjacent ones. No sum is atomic: repetitions give the same bits.

Shape letters: T positions, N positions with an adapter, I inputs, O outputs, R the padded rank.
"""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv, knobs

from plait.kernels.grouped_lora.machine import Adapters
from plait.kernels.grouped_lora.triton_kernels import (
    LAUNCHES,
    ROWS,
    expand_kernel,
    launch_of,
    outer_kernel,
    padded,
    shrink_kernel,
)

LARGEST_RANK = max(LAUNCHES)


def add(x: Tensor, out: Tensor, adapters: Adapters) -> Tensor | None:
    """See `machine.Machine`; the result is low (N, R) in adapter order."""
    grid = _Grid.of(adapters, x, out)
    with _device_of(x):
        low = grid.shrink(x, _joined(adapters.a), by_rank=True)
        grid.expand(low, _joined(adapters.b), out, by_rank=False)
    return low


def gradients(
    grad: Tensor,
    x: Tensor | None,
    grad_x: Tensor | None,
    low: Tensor | None,
    adapters: Adapters,
) -> tuple[list[Tensor], list[Tensor]]:
    """See `machine.Machine`. With l = scale x A^T: dB = dy^T l, dl = scale dy B, dA = dl^T x."""
    grid = _Grid.of(adapters, grad, *(t for t in (x, grad_x) if t is not None))
    found_a: list[Tensor] = []
    found_b: list[Tensor] = []
    with _device_of(grad):
        if low is not None:
            found_b = grid.outer(grad, low, adapters.b, by_rank=False)
        if x is None and grad_x is None:
            return found_a, found_b
        slope = grid.shrink(grad, _joined(adapters.b), by_rank=False)
        if x is not None:
            found_a = grid.outer(x, slope, adapters.a, by_rank=True)
        if grad_x is not None:
            grid.expand(slope, _joined(adapters.a), grad_x, by_rank=True)
    return found_a, found_b


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its tensors' device is."""
    if not tensor.is_cuda:
        return nullcontext()
    return torch.cuda.device(tensor.device)


def _joined(factors: Sequence[Tensor]) -> Tensor:
    """All factors one after another in one flat tensor."""
    if len(factors) == 1:
        return factors[0].reshape(-1)
    if not factors:
        return torch.empty(0)
    return torch.cat([factor.reshape(-1) for factor in factors])


@functools.cache
def constants(rank: int, precise: bool, interpreted: bool = False) -> dict[str, Any]:
    """The constexpr arguments of all kernels for a padded rank, except `by_rank`.

    Args:
        precise: For float32 rows: three TF32 products give float32's precision.
    """
    return {
        "precision": "tf32x3" if precise else "tf32",
        "interpreted": interpreted,
        "rank_block": rank,
        "rank_part": min(rank, 64),
        "row_block": ROWS,
        "channel_block": launch_of(rank, precise).channels,
    }


class _Grid(NamedTuple):
    """One batch's block map and adapters on the device, and the launches over them."""

    order: Tensor
    blocks: Tensor
    ranges: Tensor
    ranks: Tensor
    scales: Tensor
    rank: int
    settings: dict[str, Any]
    """See `constants`, with warps and stages; each kernel takes those it knows."""

    @classmethod
    def of(cls, adapters: Adapters, *tensors: Tensor) -> "_Grid":
        """For one call over `tensors`, whose device and dtypes it takes."""
        device = tensors[0].device
        ranks = tuple(len(factor) for factor in adapters.a)
        rank = padded(max(ranks, default=1))
        table, scales = adapters.segments.keep(
            ("adapters", device, ranks, adapters.scales),
            lambda: _adapter_tables(ranks, adapters.scales, device),
        )
        blocks = adapters.segments.blocks(device, ROWS, len(ranks))
        interpreted = bool(knobs.runtime.interpret)
        precise = any(tensor.dtype == torch.float32 for tensor in tensors)
        launch = launch_of(rank, precise)
        settings = constants(rank, precise, interpreted)
        settings = settings | {"num_warps": launch.warps, "num_stages": launch.stages}
        return cls(*blocks, table, scales, rank, settings)

    def _without(self, *names: str) -> dict[str, Any]:
        return {key: value for key, value in self.settings.items() if key not in names}

    def shrink(self, x: Tensor, factor: Tensor, by_rank: bool) -> Tensor:
        """x (T, K), flat F -> scale x F^T (N, R)."""
        low = torch.empty(len(self.order), self.rank, device=x.device)
        if len(self.blocks):
            shrink_kernel[(len(self.blocks),)](
                x, factor, low, self.order, self.blocks, self.ranks, self.scales, x.shape[1],
                by_rank=by_rank, **self._without("rank_part", "interpreted"),
            )  # fmt: skip
        return low

    def expand(self, low: Tensor, factor: Tensor, out: Tensor, by_rank: bool) -> None:
        """low (N, R), flat F: out (T, K) += low F in place."""
        channels = out.shape[1]
        if len(self.blocks):
            expand_kernel[(len(self.blocks), cdiv(channels, self.settings["channel_block"]))](
                low, factor, out, self.order, self.blocks, self.ranks, channels,
                by_rank=by_rank, **self._without("interpreted"),
            )  # fmt: skip

    def outer(
        self, x: Tensor, low: Tensor, factors: Sequence[Tensor], by_rank: bool
    ) -> list[Tensor]:
        """x (T, K), low (N, R) -> low^T x for every adapter, in float32 and each factor's shape."""
        sizes = [factor.numel() for factor in factors]
        flat = torch.empty(sum(sizes), device=x.device)
        channels = x.shape[1]
        if len(factors):
            outer_kernel[(len(factors), cdiv(channels, self.settings["channel_block"]))](
                x, low, flat, self.order, self.ranges, self.ranks, channels,
                by_rank=by_rank, **self._without("rank_part"),
            )  # fmt: skip
        parts = torch.split(flat, sizes) if sizes else ()
        return [part.view_as(factor) for part, factor in zip(parts, factors, strict=True)]


def _adapter_tables(
    ranks: tuple[int, ...], scales: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """(G, 2) int32, each rank and the sum of those before it; (G,) float32 scales."""
    table = []
    before = 0
    for rank in ranks:
        table.append((rank, before))
        before += rank
    numbers = torch.tensor(table, dtype=torch.int32).reshape(-1, 2)
    return numbers.to(device), torch.tensor(scales, dtype=torch.float32).to(device)

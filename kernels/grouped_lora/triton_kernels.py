"""The three kernels of grouped LoRA, and their block sizes.

A factor F of adapter g is read as F[r, k], k the input or output channel. All a lie one after
another in one tensor, and so do all b; `by_rank` says that r is the slow index (as in a), else k is
(as in b). Tiles become float32 as soon as they are loaded and products use TF32: every 16-bit
number is a TF32 number, and Triton's interpreter computes wrongly in bf16.
"""

from typing import NamedTuple

import triton
import triton.language as tl

ROWS = 64
"""Positions of a block: the map from blocks to adapters is the same for every layer."""


class Launch(NamedTuple):
    """Channels of a tile, warps of a program and stages of its loads."""

    channels: int
    warps: int
    stages: int


LAUNCHES = {16: Launch(128, 4, 3), 32: Launch(128, 4, 3), 64: Launch(64, 4, 3),
            128: Launch(64, 8, 2), 256: Launch(32, 8, 2)}  # fmt: skip
"""By the padded rank."""

PRECISE_LAUNCHES = LAUNCHES | {16: Launch(64, 4, 3), 32: Launch(64, 4, 3), 256: Launch(16, 8, 2)}
"""For three TF32 products, whose operands take three times the registers."""


def launch_of(rank: int, precise: bool) -> Launch:
    """For a padded rank."""
    return (PRECISE_LAUNCHES if precise else LAUNCHES)[rank]


def padded(rank: int) -> int:
    """The rank that the kernels compute with: a power of two, 16 or more."""
    return max(16, 1 << (rank - 1).bit_length())


@triton.jit  # type: ignore[untyped-decorator]
def _factor_at(
    ranks: tl.tensor,
    adapter: tl.tensor,
    r: tl.tensor,
    k: tl.tensor,
    channels: tl.tensor,
    by_rank: tl.constexpr,
) -> tl.tensor:
    """Offsets of F[r, k] of an adapter, 64 bits wide."""
    rank = tl.load(ranks + adapter * 2)
    before = tl.load(ranks + adapter * 2 + 1).to(tl.int64)
    if by_rank:
        return before * channels + r.to(tl.int64) * channels + k
    return before * channels + k.to(tl.int64) * rank + r


@triton.jit  # type: ignore[untyped-decorator]
def shrink_kernel(
    x: tl.tensor,
    factor: tl.tensor,
    low: tl.tensor,
    order: tl.tensor,
    blocks: tl.tensor,
    ranks: tl.tensor,
    scales: tl.tensor,
    channels: tl.tensor,
    by_rank: tl.constexpr,
    precision: tl.constexpr,
    rank_block: tl.constexpr,
    row_block: tl.constexpr,
    channel_block: tl.constexpr,
) -> None:
    """One block of positions: low (N, rank_block) = scale x F^T, in adapter order.

    Columns beyond the adapter's rank become zero.
    """
    block = tl.program_id(0)
    first = tl.load(blocks + block * 3)
    held = tl.load(blocks + block * 3 + 1)
    adapter = tl.load(blocks + block * 3 + 2)
    rank = tl.load(ranks + adapter * 2)
    lanes = tl.arange(0, row_block)
    r = tl.arange(0, rank_block)
    here = lanes < held
    rows = tl.load(order + first + lanes, mask=here, other=0).to(tl.int64)
    total = tl.zeros((row_block, rank_block), tl.float32)
    for start in range(0, channels, channel_block):
        k = start + tl.arange(0, channel_block)
        inside = k < channels
        x_at = rows[:, None] * channels + k[None, :]
        tile = tl.load(x + x_at, mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
        f_at = _factor_at(ranks, adapter, r[None, :], k[:, None], channels, by_rank)
        known = inside[:, None] & (r[None, :] < rank)
        turned = tl.load(factor + f_at, mask=known, other=0.0).to(tl.float32)
        total = tl.dot(tile, turned, total, input_precision=precision)
    total *= tl.load(scales + adapter)
    places = (first + lanes).to(tl.int64)
    tl.store(low + places[:, None] * rank_block + r[None, :], total, mask=here[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def expand_kernel(
    low: tl.tensor,
    factor: tl.tensor,
    out: tl.tensor,
    order: tl.tensor,
    blocks: tl.tensor,
    ranks: tl.tensor,
    channels: tl.tensor,
    by_rank: tl.constexpr,
    precision: tl.constexpr,
    rank_block: tl.constexpr,
    rank_part: tl.constexpr,
    row_block: tl.constexpr,
    channel_block: tl.constexpr,
) -> None:
    """One block of positions and channels: out += low F, each position written by one program.

    `rank_part` ranks at once, so that a large rank leaves registers.
    """
    block = tl.program_id(0)
    first = tl.load(blocks + block * 3)
    held = tl.load(blocks + block * 3 + 1)
    adapter = tl.load(blocks + block * 3 + 2)
    rank = tl.load(ranks + adapter * 2)
    lanes = tl.arange(0, row_block)
    k = tl.program_id(1) * channel_block + tl.arange(0, channel_block)
    here = lanes < held
    inside = k < channels
    rows = tl.load(order + first + lanes, mask=here, other=0).to(tl.int64)
    places = (first + lanes).to(tl.int64)
    added = tl.zeros((row_block, channel_block), tl.float32)
    for start in range(0, rank_block, rank_part):
        r = start + tl.arange(0, rank_part)
        low_at = places[:, None] * rank_block + r[None, :]
        tile = tl.load(low + low_at, mask=here[:, None], other=0.0)
        f_at = _factor_at(ranks, adapter, r[:, None], k[None, :], channels, by_rank)
        known = (r[:, None] < rank) & inside[None, :]
        up = tl.load(factor + f_at, mask=known, other=0.0).to(tl.float32)
        added = tl.dot(tile, up, added, input_precision=precision)
    out_at = rows[:, None] * channels + k[None, :]
    mine = here[:, None] & inside[None, :]
    before = tl.load(out + out_at, mask=mine, other=0.0).to(tl.float32)
    tl.store(out + out_at, (before + added).to(out.dtype.element_ty), mask=mine)


@triton.jit  # type: ignore[untyped-decorator]
def _outer_tile(
    total: tl.tensor,
    x: tl.tensor,
    low: tl.tensor,
    order: tl.tensor,
    first: tl.tensor,
    held: tl.tensor,
    k: tl.tensor,
    channels: tl.tensor,
    precision: tl.constexpr,
    rank_block: tl.constexpr,
    row_block: tl.constexpr,
) -> tl.tensor:
    """total + low^T x over the adapter order's places from `first`: `held`, one block at most."""
    lanes = tl.arange(0, row_block)
    r = tl.arange(0, rank_block)
    here = lanes < held
    rows = tl.load(order + first + lanes, mask=here, other=0).to(tl.int64)
    places = (first + lanes).to(tl.int64)
    low_at = places[:, None] * rank_block + r[None, :]
    tile = tl.load(low + low_at, mask=here[:, None], other=0.0)
    x_at = rows[:, None] * channels + k[None, :]
    mine = here[:, None] & (k < channels)[None, :]
    right = tl.load(x + x_at, mask=mine, other=0.0).to(tl.float32)
    return tl.dot(tl.trans(tile), right, total, input_precision=precision)


@triton.jit  # type: ignore[untyped-decorator]
def outer_kernel(
    x: tl.tensor,
    low: tl.tensor,
    gradient: tl.tensor,
    order: tl.tensor,
    ranges: tl.tensor,
    ranks: tl.tensor,
    channels: tl.tensor,
    by_rank: tl.constexpr,
    precision: tl.constexpr,
    interpreted: tl.constexpr,
    rank_block: tl.constexpr,
    row_block: tl.constexpr,
    channel_block: tl.constexpr,
) -> None:
    """One adapter and block of channels: gradient of F = low^T x, over its positions in order.

    One program sums, so the order of the sum, and its bits, never change. An adapter without
    positions is written as zero.
    """
    adapter = tl.program_id(0)
    first = tl.load(ranges + adapter * 2)
    count = tl.load(ranges + adapter * 2 + 1)
    rank = tl.load(ranks + adapter * 2)
    r = tl.arange(0, rank_block)
    k = tl.program_id(1) * channel_block + tl.arange(0, channel_block)
    total = tl.zeros((rank_block, channel_block), tl.float32)
    if interpreted:  # its `range` takes no bound that was loaded
        at = 0
        while at < count:
            total = _outer_tile(
                total, x, low, order, first + at, count - at, k, channels,
                precision, rank_block, row_block,
            )  # fmt: skip
            at += row_block
    else:  # loads of a `for` are pipelined, those of a `while` are not
        for at in range(0, count, row_block):
            total = _outer_tile(
                total, x, low, order, first + at, count - at, k, channels,
                precision, rank_block, row_block,
            )  # fmt: skip
    f_at = _factor_at(ranks, adapter, r[:, None], k[None, :], channels, by_rank)
    known = (r[:, None] < rank) & (k < channels)[None, :]
    tl.store(gradient + f_at, total, mask=known)

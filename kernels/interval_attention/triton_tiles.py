"""What the Triton kernels of the forward and the backward pass share.

Shape letters: R rows of a tile, D head size.
"""

import triton
import triton.language as tl

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Triton's interpreter computes on numpy arrays, which have no bfloat16: it widens tiles."""


@triton.jit  # type: ignore[untyped-decorator]
def load_rows(
    pointer: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    count: tl.tensor,
    size: tl.constexpr,
    padded: tl.constexpr,
    bounded: tl.constexpr,
    upcast: tl.constexpr,
) -> tl.tensor:
    """(R, padded) of a matrix; 0 beyond its size columns and, where bounded, its `count` rows."""
    at = pointer + rows[:, None] * stride + columns[None, :]
    if bounded:
        if padded == size:
            tile = tl.load(at, mask=rows[:, None] < count, other=0.0)
        else:
            tile = tl.load(at, mask=(rows[:, None] < count) & (columns[None, :] < size), other=0.0)
    else:
        if padded == size:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=columns[None, :] < size, other=0.0)
    if upcast:
        tile = tile.to(tl.float32)
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def store_rows(
    pointer: tl.tensor,
    tile: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    count: tl.tensor,
    size: tl.constexpr,
) -> None:
    """Write (R, padded) where there are rows and columns for it, in the type of `pointer`."""
    inside = (rows[:, None] < count) & (columns[None, :] < size)
    at = pointer + rows[:, None] * stride + columns[None, :]
    tl.store(at, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def tanh(x: tl.tensor) -> tl.tensor:
    """To 1e-7, in the operations that the interpreter and every chip have."""
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit  # type: ignore[untyped-decorator]
def log2_sums(lse: tl.tensor, row: tl.tensor, queries: tl.tensor) -> tl.tensor:
    """log2 of the sums; +inf where a row saw nothing or is none, so that its weights are 0."""
    values = tl.load(lse + row, mask=row < queries, other=float("inf"))
    return tl.where(values == float("-inf"), float("inf"), values) * 1.4426950408889634

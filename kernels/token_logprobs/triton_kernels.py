"""The two kernels over a chunk of float32 logits, and their block sizes.

Tiles become float32 as soon as they are loaded: logits are float32 already, and Triton's
interpreter computes wrongly in bf16. Row offsets are 64 bits wide, for a chunk may hold more than
2**31 logits. Sizes are constants, of which a run has few; bounds of loops that are arguments fail
in the interpreter of Triton 3.6.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Launch(NamedTuple):
    """How a kernel runs: columns of a tile and warps of a program."""

    block: int
    warps: int


_LAUNCHES = {1024: Launch(256, 1), 8192: Launch(1024, 4)}
"""By the largest vocabulary they serve."""

_WIDE = Launch(4096, 8)


def launch_of(vocabulary: int) -> Launch:
    """The launch for a vocabulary's size; a table, so that no run searches for its own."""
    for limit, launch in _LAUNCHES.items():
        if vocabulary <= limit:
            return launch
    return _WIDE


@triton.jit  # type: ignore[untyped-decorator]
def _tanh(x: tl.tensor) -> tl.tensor:
    """tanh by exp of a negative number, which never overflows."""
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit  # type: ignore[untyped-decorator]
def statistics_kernel(
    logits: tl.tensor,
    ids: tl.tensor,
    lse: tl.tensor,
    picked: tl.tensor,
    entropy: tl.tensor,
    softcap: tl.tensor,
    inverse_temperature: tl.tensor,
    vocabulary: tl.constexpr,
    count: tl.constexpr,
    capped: tl.constexpr,
    with_entropy: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One row: its log-sum-exp, entropy and the shaped logits at `count` ids, in one pass.

    Every lane keeps its own running maximum, sum and mean; they are joined once, at the end.
    """
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * vocabulary
    lanes = tl.arange(0, block)
    highest = tl.full((block,), -1e30, tl.float32)
    total = tl.zeros((block,), tl.float32)
    mean = tl.zeros((block,), tl.float32)
    for first in range(0, vocabulary, block):
        columns = first + lanes
        z = tl.load(start + columns, mask=columns < vocabulary, other=-float("inf")).to(tl.float32)
        if capped:
            z = softcap * _tanh(z / softcap)
        z = tl.where(columns < vocabulary, z * inverse_temperature, -float("inf"))
        higher = tl.maximum(highest, z)
        shrink = tl.exp(highest - higher)
        term = tl.exp(z - higher)
        if with_entropy:
            moved = shrink * (mean + total * (highest - higher))
            # A banned token has logit -inf and probability 0: it adds nothing, not 0 * inf.
            mean = moved + term * tl.maximum(z - higher, -1e30)
        total = total * shrink + term
        highest = higher
    top = tl.max(highest, 0)
    shrink = tl.exp(highest - top)
    whole = tl.sum(total * shrink, 0)
    tl.store(lse + row, top + tl.log(whole))
    if with_entropy:
        moved = shrink * (mean + total * (highest - top))
        tl.store(entropy + row, tl.log(whole) - tl.sum(moved, 0) / whole)
    for k in range(count):
        column = tl.load(ids + row * count + k)
        inside = (column >= 0) & (column < vocabulary)
        z = tl.load(start + column, mask=inside, other=-float("inf")).to(tl.float32)
        if capped:
            z = softcap * _tanh(z / softcap)
        tl.store(picked + row * count + k, tl.where(inside, z * inverse_temperature, -float("inf")))


@triton.jit  # type: ignore[untyped-decorator]
def gradient_kernel(
    logits: tl.tensor,
    gradient: tl.tensor,
    ids: tl.tensor,
    by_logprobs: tl.tensor,
    lse: tl.tensor,
    entropy: tl.tensor,
    by_entropy: tl.tensor,
    softcap: tl.tensor,
    inverse_temperature: tl.tensor,
    vocabulary: tl.constexpr,
    count: tl.constexpr,
    capped: tl.constexpr,
    with_entropy: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One block of a row: dL/d raw logits, from the logits and what the row's losses want.

    `gradient` may be `logits`: each lane reads its own logit before it writes.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < vocabulary
    z = tl.load(logits + row * vocabulary + columns, mask=inside, other=0.0).to(tl.float32)
    slope = tl.full((block,), 1.0, tl.float32) * inverse_temperature
    if capped:
        bent = _tanh(z / softcap)
        slope = slope * (1.0 - bent * bent)
        z = softcap * bent
    logprob = z * inverse_temperature - tl.load(lse + row)
    at_ids = tl.zeros((block,), tl.float32)
    whole = 0.0
    for k in range(count):
        wanted = tl.load(by_logprobs + row * count + k).to(tl.float32)
        column = tl.load(ids + row * count + k)
        at_ids += tl.where(columns == column, wanted, 0.0)
        whole += wanted
    probability = tl.exp(logprob)
    if with_entropy:
        surplus = tl.maximum(logprob, -1e30) + tl.load(entropy + row)
        factor = whole + tl.load(by_entropy + row) * surplus
        found = at_ids - probability * factor
    else:
        found = at_ids - probability * whole
    place = gradient + row * vocabulary + columns
    tl.store(place, (found * slope).to(gradient.dtype.element_ty), mask=inside)

"""Interval attention on a GPU: launches of its kernels, and their tile sizes.

Shape letters: H query heads, G key heads, T queries, S keys, D head size, B blocks.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from plait.kernels.interval_attention.intervals import Intervals
from plait.kernels.interval_attention.triton_backward import backward_keys, backward_queries, delta
from plait.kernels.interval_attention.triton_forward import forward
from plait.kernels.interval_attention.triton_tiles import INTERPRETED

LOG2E = 1.4426950408889634
LARGEST_HEAD = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tiles(NamedTuple):
    """Queries and keys of a block, and the warps and pipeline stages of its program."""

    queries: int
    keys: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tiles
    keys: Tiles
    """Of the gradients of keys and values."""
    queries: Tiles
    """Of the gradient of queries."""


_HALF = {
    64: Plan(Tiles(128, 128, 8, 3), Tiles(64, 128, 8, 2), Tiles(128, 64, 8, 3)),
    128: Plan(Tiles(128, 64, 8, 3), Tiles(32, 128, 8, 2), Tiles(128, 64, 8, 2)),
    256: Plan(Tiles(64, 64, 8, 2), Tiles(16, 64, 8, 2), Tiles(64, 32, 8, 2)),
}
"""For chips with 227 KB of shared memory (Hopper and later) and halves, by padded head size. No
tuning at run time: results and compile times stay the same from run to run. Chosen as the largest
that spill no register."""

_CAPPED_KEYS = {64: Tiles(32, 128, 8, 2), 128: Tiles(16, 128, 8, 2), 256: Tiles(16, 32, 8, 2)}
"""A cap on scores keeps its slope in registers as well."""

_OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
_OLD_KEYS = {64: Tiles(64, 128, 8, 1), 128: Tiles(32, 128, 8, 1), 256: Tiles(16, 32, 8, 2)}
"""Triton 3.6 needs more registers for the same tile; with a cap or without."""

_SINGLE = {
    64: Plan(Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 1), Tiles(64, 32, 8, 2)),
    128: Plan(Tiles(16, 16, 8, 2), Tiles(16, 32, 8, 2), Tiles(16, 32, 8, 2)),
    256: Plan(Tiles(16, 16, 8, 1), Tiles(16, 32, 8, 1), Tiles(16, 32, 8, 1)),
}
"""The same for float32."""

_SMALL = {
    64: Plan(Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
    128: Plan(Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1)),
    256: Plan(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
}
"""For every other chip, the newest for desks among them: they have 64 to 164 KB."""

HOPPER_BYTES = 227 << 10
"""Shared memory of a program on Hopper."""

OFFSETS = 2**31
"""The kernels count values of a head in 32 bits."""


def plan_for(q: Tensor, softcap: float | None) -> Plan:
    """The tiles for q (H, T, D) on the chip it is on."""
    if q.device.type == "cuda":
        chip: Any = torch.cuda.get_device_properties(q.device)
        if chip.shared_memory_per_block_optin >= HOPPER_BYTES:
            return hopper_plan(q.shape[-1], q.dtype, softcap is not None)
    return _SMALL[_padded(q.shape[-1])]


def hopper_plan(size: int, dtype: torch.dtype, capped: bool) -> Plan:
    """The tiles for heads of `size` where there is as much shared memory as on Hopper."""
    if dtype == torch.float32:
        return _SINGLE[_padded(size)]
    size = _padded(size)
    plan = _HALF[size]
    if _OLD:
        return plan._replace(keys=_OLD_KEYS[size])
    return plan._replace(keys=_CAPPED_KEYS[size]) if capped else plan


def _padded(size: int) -> int:
    """The head size that the tables know."""
    return max(64, int(triton.next_power_of_2(size)))


def refusal(q: Tensor) -> str | None:
    """Why these kernels cannot read `q` (H, T, D); None where they can."""
    if q.device.type != "cuda" and not INTERPRETED:
        return f"its tensors are on {q.device}, and Triton needs a GPU"
    if q.shape[-1] > LARGEST_HEAD:
        return f"heads have {q.shape[-1]} values, and it reads {LARGEST_HEAD} at most"
    if q.dtype not in DTYPES:
        return f"it does not read {q.dtype}"
    return None


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Intervals,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """q (H, T, D), k and v (G, S, D) -> out (H, T, D) and lse (H, T) in float32."""
    q, k, v = _readable(q), _readable(k), _readable(v)
    out, lse = _IntervalAttention.apply(q, k, v, intervals, scale, window, softcap)
    return out, lse


def _readable(tensor: Tensor) -> Tensor:
    """(H, T, D) as the kernels read it: values one behind another, rows within 32-bit offsets."""
    if tensor.stride(-1) == 1 and tensor.shape[1] * tensor.stride(1) < OFFSETS:
        return tensor
    return tensor.contiguous()


class _IntervalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        intervals: Intervals,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        heads, length, size = q.shape
        plan = plan_for(q, softcap)
        # Heads lie inside positions, as transformers wants them back.
        near = length * heads * size < OFFSETS
        out = q.new_empty(length, heads, size).transpose(0, 1) if near else torch.empty_like(q)
        lse = q.new_empty(heads, length, dtype=torch.float32)
        tiles = plan.forward
        blocks = intervals.block_map(window, k.shape[1], tiles.queries, tiles.keys)
        if heads * length:
            forward[(len(blocks.queries), heads)](
                q, k, v, out, lse, blocks.lo, blocks.hi, blocks.queries,
                *_strides(q, k, v, out), length, k.shape[1],
                *_factors(scale, softcap)[1:],
                **_constants(q, k, softcap, tiles),
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.intervals, ctx.options = intervals, (scale, window, softcap)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad_out, grad_lse = grads
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grad_out = _readable(grad_out)
        deltas = _delta(grad_out, out, grad_lse)
        run = _Backward(q, k, v, grad_out, lse, deltas, ctx.intervals, *ctx.options)
        d_q, (d_k, d_v) = run.queries(), run.keys()
        return d_q, d_k, d_v, None, None, None, None


def _delta(grad_out: Tensor, out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """(H, T) float32: what each row's softmax subtracts from the gradients of its weights."""
    heads, length, size = out.shape
    found = torch.empty(heads, length, dtype=torch.float32, device=out.device)
    if heads * length == 0:
        return found
    block = 64
    delta[(triton.cdiv(length, block), heads)](
        grad_out, out, found if grad_lse is None else grad_lse.contiguous(), found,
        grad_out.stride(0), grad_out.stride(1), out.stride(0), out.stride(1), length,
        size=size, padded=triton.next_power_of_2(size), block=block,
        with_lse=grad_lse is not None,
    )  # fmt: skip
    return found


class _Backward(NamedTuple):
    """What the two kernels of the backward pass read."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    lse: Tensor
    deltas: Tensor
    intervals: Intervals
    scale: float
    window: int | None
    softcap: float | None

    def queries(self) -> Tensor:
        """The gradient of q (H, T, D)."""
        made = torch.empty_like(self.q)
        if made.numel():
            self._launch(backward_queries, plan_for(self.q, self.softcap).queries, made)
        return made

    def keys(self) -> tuple[Tensor, Tensor]:
        """The gradients of k and v (G, S, D)."""
        made = torch.empty_like(self.k), torch.empty_like(self.v)
        if made[0].numel():
            self._launch(backward_keys, plan_for(self.q, self.softcap).keys, *made)
        return made

    def _launch(self, kernel: Any, tiles: Tiles, *made: Tensor) -> None:
        """A program for each block and head of what is made: of queries, or of keys and values."""
        keys = self.k.shape[1]
        blocks = self.intervals.block_map(self.window, keys, tiles.queries, tiles.keys)
        loops = blocks.queries if len(made) == 1 else blocks.keys
        kernel[(len(loops), len(made[0]))](
            self.q, self.k, self.v, self.grad_out, self.lse, self.deltas, *made,
            blocks.lo, blocks.hi, loops,
            *_strides(self.q, self.k, self.v, self.grad_out, *made),
            self.q.shape[1], keys, *_factors(self.scale, self.softcap),
            **_constants(self.q, self.k, self.softcap, tiles),
        )  # fmt: skip


def _strides(*tensors: Tensor) -> list[int]:
    """Of heads and positions; that of a head's values is 1."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _factors(scale: float, softcap: float | None) -> tuple[float, float, float]:
    """(scale, what turns scores into powers of two, what a cap divides scores by)."""
    if softcap is None:
        return scale, scale * LOG2E, 1.0
    return scale, softcap * LOG2E, scale / softcap


def _constants(q: Tensor, k: Tensor, softcap: float | None, tiles: Tiles) -> dict[str, Any]:
    return constants(q.shape[-1], len(q) // len(k), q.dtype, softcap is not None, tiles) | {
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def constants(
    size: int, group: int, dtype: torch.dtype, capped: bool, tiles: Tiles
) -> dict[str, Any]:
    """The constexpr arguments that all three kernels share."""
    return {
        "group": group,
        "size": size,
        "padded": max(16, triton.next_power_of_2(size)),
        "block_q": tiles.queries,
        "block_k": tiles.keys,
        "capped": capped,
        # Three products in tf32 are as good as one in float32, and take three times the registers.
        "precision": "tf32x3" if dtype == torch.float32 and size <= 64 else "ieee",
        "upcast": INTERPRETED,
    }

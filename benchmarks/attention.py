"""Interval attention against what a user could take instead, checked in the same run.

    python -m benchmarks.attention --json

On a CPU: a packed row of 8,192 positions with pictures as groups, float32, forward and backward,
against `scaled_dot_product_attention` with the dense mask (given as what it adds, so that nothing
is converted in the clock); and what is known of a row before attention can run, at 16,384
positions, against FlexAttention's `create_block_mask`. With a GPU, the cases of `attention_gpu`
follow under "gpu". A ratio is the peer's time over ours, the median over rounds; none is printed
where results differ.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_rows import Row, packed_with_groups
from benchmarks.timing import alternate, apart, largest, machine, summary
from plait.kernels.interval_attention import Intervals, interval_attention

LENGTH, MASK_LENGTH = 8192, 16_384
HEADS, KEY_HEADS, SIZE = 9, 3, 64
"""Of SmolLM2-135M."""

BLOCK = 128
"""Positions of a block, which is FlexAttention's own default."""

TOLERANCE = 1e-4
"""Relative difference of outputs and gradients, in norm."""

Step = Callable[[], list[Tensor]]


def inputs(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS, length, SIZE), (KEY_HEADS, length, SIZE), (KEY_HEADS, length, SIZE)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def ours(row: Row, tensors: list[Tensor], above: Tensor) -> Step:
    intervals = Intervals(row.lo, row.hi)
    intervals.tiles()
    q, k, v = tensors

    def step() -> list[Tensor]:
        out, _ = interval_attention(q, k, v, intervals)
        return [out.detach(), *torch.autograd.grad(out, tensors, above)]

    return step


def dense(row: Row, tensors: list[Tensor], above: Tensor) -> Step:
    mask = torch.zeros(row.length, row.length).masked_fill_(~row.dense(), -torch.inf)
    q, k, v = tensors

    def step() -> list[Tensor]:
        made = scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask[None, None], enable_gqa=True
        )[0]
        return [made.detach(), *torch.autograd.grad(made, tensors, above)]

    return step


def check(left: list[Tensor], right: list[Tensor]) -> float:
    """The largest relative difference.

    Raises:
        SystemExit: the two sides do not compute the same.
    """
    found = largest(apart(a, b) for a, b in zip(left, right, strict=True))
    if not found <= TOLERANCE:
        raise SystemExit(f"both sides must give the same; they differ by {found:.1e}: no number")
    return float(f"{found:.1e}")


def attention_case(length: int, rounds: int) -> dict[str, Any]:
    """ratio_dense and what it was taken from."""
    row, tensors = packed_with_groups(length), inputs(length)
    above = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1))
    mine, peer = ours(row, tensors, above), dense(row, tensors, above)
    difference = check(mine(), peer())
    return summary(alternate([(mine, peer)], rounds)) | {
        "difference": difference,
        "length": length,
        "documents": len(row.bounds),
        "share_of_pairs": round(row.pairs / length**2, 4),
        "heads": [HEADS, KEY_HEADS, SIZE],
        "peer": "scaled_dot_product_attention, float32 additive mask (1, 1, T, T), enable_gqa",
    }


def metadata(row: Row) -> Intervals:
    """All that is known of a row: checked intervals, CPU tiles, and both block maps of a GPU."""
    intervals = Intervals(row.lo, row.hi)
    intervals.tiles()
    intervals.block_map(None, row.length, BLOCK, BLOCK)
    return intervals


def block_mask(row: Row) -> Any:
    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        return (key >= row.lo[query]) & (key < row.hi[query])

    return create_block_mask(seen, 1, 1, row.length, row.length, device="cpu", BLOCK_SIZE=BLOCK)


def check_blocks(row: Row) -> None:
    """Both say the same of every block: how many pairs of it are seen, some or all.

    Raises:
        SystemExit: they do not.
    """
    start, full_lo, full_hi, stop = (
        metadata(row).block_map(None, row.length, BLOCK, BLOCK).queries // BLOCK
    ).T
    theirs = block_mask(row)
    full = theirs.full_kv_num_blocks[0, 0]
    some = theirs.kv_num_blocks[0, 0]
    if not (torch.equal(full_hi - full_lo, full) and torch.equal(stop - start - full, some)):
        raise SystemExit("both sides must find the same blocks; they do not: no number")


def mask_case(length: int, rounds: int) -> dict[str, Any]:
    """ratio_mask and what it was taken from."""
    row = packed_with_groups(length)
    check_blocks(row)
    made = summary(alternate([(lambda: metadata(row), lambda: block_mask(row))], rounds))
    return made | {"length": length, "block": BLOCK, "peer": "create_block_mask, not compiled"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Interval attention against dense masks.")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=LENGTH, help="positions of the packed row")
    parser.add_argument("--mask-length", type=int, default=MASK_LENGTH)
    parser.add_argument("--only", choices=("cpu", "gpu"), help="leave the other machine out")
    parser.add_argument("--seconds", type=float, help="after which no case of a GPU is begun")
    words = parser.parse_args()
    found: dict[str, Any] = {}
    if words.only != "gpu":
        packed = attention_case(words.length, words.rounds)
        mask = mask_case(words.mask_length, words.rounds)
        found = {"ratio_dense": packed["ratio"], "ratio_mask": mask["ratio"]}
        found |= {"packed": packed, "mask": mask}
        if not words.json:
            print(f"dense mask {packed['ratio']:.2f}  block mask {mask['ratio']:.1f}")
    if words.only != "cpu" and torch.cuda.is_available():
        from benchmarks.attention_gpu import measure

        found["gpu"] = measure(words.seconds)
    print(json.dumps(found | {"machine": machine()}))


if __name__ == "__main__":
    main()

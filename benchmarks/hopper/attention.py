"""The kernels of interval attention, at the tiles that they run with on Hopper."""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.hopper.compiling import Case
from plait.kernels.interval_attention import triton as launches

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
SIZES = (64, 80, 96, 128, 256)
_FLOATS = {"lse": "*fp32", "deltas": "*fp32"}
_INTEGERS = {"lo": "*i32", "hi": "*i32", "blocks": "*i32"}
_TENSORS = ("q", "k", "v", "out", "grad", "d_q", "d_k", "d_v")
_SCALARS = {"scale": "fp32", "outer": "fp32", "inner": "fp32"}


def cases(
    sizes: tuple[int, ...] = SIZES,
    dtypes: tuple[torch.dtype, ...] = tuple(TYPES),
    capped: tuple[bool, ...] = (False, True),
) -> list[Case]:
    """Every kernel for every head size, dtype and cap asked for; four query heads to a key head."""
    return [
        case
        for size in sizes
        for dtype in dtypes
        for cap in capped
        for case in _kernels(size, dtype, cap)
    ]


def _kernels(size: int, dtype: torch.dtype, capped: bool) -> Iterator[Case]:
    plan = launches.hopper_plan(size, dtype, capped)
    tiles = {"forward": plan.forward, "backward_queries": plan.queries, "backward_keys": plan.keys}
    for name, chosen in tiles.items():
        kernel: Any = getattr(launches, name)
        constants = launches.constants(size, 4, dtype, capped, chosen)
        types = _FLOATS | _INTEGERS | _SCALARS
        pointers = [a for a in kernel.arg_names if a in _TENSORS]
        types |= dict.fromkeys(pointers, TYPES[dtype])
        whole = [a for a in kernel.arg_names if a not in types and a not in constants]
        types |= dict.fromkeys(whole, "i32")
        aligned = [a for a in kernel.arg_names if a in pointers or a.endswith(("_row", "_head"))]
        yield Case(
            f"attention {name}, head {size}, {TYPES[dtype][1:]}{', capped' if capped else ''}",
            kernel, types, constants, chosen.warps, chosen.stages,
            tensor_cores=dtype != torch.float32 or size <= 64, aligned=tuple(aligned),
        )  # fmt: skip

"""The kernels of grouped LoRA, at the tiles that they run with on Hopper."""

from collections.abc import Iterator
from typing import Any

from benchmarks.hopper.compiling import Case
from plait.kernels.grouped_lora import triton as launches
from plait.kernels.grouped_lora import triton_kernels as kernels

KERNELS = ("shrink_kernel", "expand_kernel", "outer_kernel")
TYPES = ("*bf16", "*fp16", "*fp32")
_TABLES = {"order": "*i32", "blocks": "*i32", "ranges": "*i32", "ranks": "*i32", "scales": "*fp32"}
_FLOATS = {"low": "*fp32", "factor": "*fp32", "gradient": "*fp32"}
_ALIGNED = ("x", "out", "low", "factor", "gradient", "order", "channels")


def cases(
    ranks: tuple[int, ...] = tuple(kernels.LAUNCHES), types: tuple[str, ...] = TYPES
) -> list[Case]:
    """Every kernel for every padded rank and type of row, over factors a and factors b."""
    return [
        case
        for rank in ranks
        for row in types
        for by_rank in (True, False)
        for case in _kernels(rank, row, by_rank)
    ]


def _kernels(rank: int, row: str, by_rank: bool) -> Iterator[Case]:
    precise = row == "*fp32"
    launch = kernels.launch_of(rank, precise)
    known = launches.constants(rank, precise) | {"by_rank": by_rank}
    for name in KERNELS:
        kernel: Any = getattr(kernels, name)
        constants = {key: value for key, value in known.items() if key in kernel.arg_names}
        types = _TABLES | _FLOATS | {"x": row, "out": row, "channels": "i32"}
        yield Case(
            f"grouped lora {name[:-7]}, rank {rank}, {row[1:]}, {'a' if by_rank else 'b'}",
            kernel,
            {key: types[key] for key in kernel.arg_names if key not in constants},
            constants,
            launch.warps,
            launch.stages,
            tensor_cores=True,
            aligned=tuple(key for key in _ALIGNED if key in kernel.arg_names),
        )

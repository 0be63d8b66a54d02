"""The GPU's cases of `benchmarks.attention`: bf16, forward and backward apart, and their rates.

Peers: compiled FlexAttention with its block mask made beforehand, and torch's
`scaled_dot_product_attention` (sdpa) with the dense mask or, for causal documents, called document
by document. Every backend of it that runs is measured, with grouped heads and with keys repeated
for each query head; the ratio to compare with is that of the fastest.
Operations are counted over the pairs that are seen: 4 D a pair and head forward, 10 D backward.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_rows import Row, causal_documents, packed_with_groups
from benchmarks.cuda_timing import medians
from benchmarks.timing import apart
from plait.kernels.interval_attention import Intervals, interval_attention

DEVICE = "cuda"
HEADS, KEY_HEADS = 32, 8
SIZES, LENGTHS = (64, 128), (2048, 4096, 8192, 16_384)
TOLERANCE = 0.02
"""Relative difference in bf16, in norm."""

BACKENDS = (
    SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
)  # fmt: skip
MOST_DENSE = 8192
"""Positions of the longest row whose dense mask is measured: its cost is known by then."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (H, T, D), k and v (G, T, D) -> out (H, T, D)."""

Sdpa = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""The same, and whether torch is to group the heads (else k and v have as many as q)."""


def ours(row: Row, route: str = "auto") -> Attention:
    intervals = Intervals(row.lo, row.hi, route=route).to(torch.device(DEVICE))
    return lambda q, k, v: interval_attention(q, k, v, intervals)[0]


def flex(row: Row) -> Attention:
    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        return (key >= row.lo[query]) & (key < row.hi[query])

    mask = create_block_mask(seen, 1, 1, row.length, row.length, device=DEVICE)
    functorch.donated_buffer = False  # or its backward pass can be run, and timed, only once
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(q[None], k[None], v[None], block_mask=mask, enable_gqa=True)[0]
        return out

    return attention


def dense(row: Row) -> Sdpa:
    mask = torch.zeros(row.length, row.length, device=DEVICE, dtype=torch.bfloat16)
    mask.masked_fill_(~row.dense(), -torch.inf)
    return lambda q, k, v, gqa: scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask[None, None], enable_gqa=gqa
    )[0]


def by_document(row: Row) -> Sdpa:
    def attention(q: Tensor, k: Tensor, v: Tensor, gqa: bool) -> Tensor:
        parts = [
            scaled_dot_product_attention(
                *(t[None, :, start:stop] for t in (q, k, v)), is_causal=True, enable_gqa=gqa
            )
            for start, stop in row.bounds
        ]
        return torch.cat(parts, 2)[0]

    return attention


def through(sdpa: Sdpa, backend: SDPBackend, repeated: bool) -> Attention:
    """`sdpa` by one backend, with grouped heads or keys and values repeated for each query head."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if repeated:
            k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
        with sdpa_kernel(backend):
            return sdpa(q, k, v, not repeated)

    return attention


def gradients(attention: Attention, tensors: list[Tensor], above: Tensor) -> list[Tensor]:
    out = attention(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, above)]


def check(left: list[Tensor], right: list[Tensor], name: str) -> None:
    """
    Raises:
        SystemExit: the two sides do not compute the same.
    """
    for a, b in zip(left, right, strict=True):
        difference = apart(a, b)
        if not difference <= TOLERANCE:
            raise SystemExit(f"{name} differs by {difference:.1e} from ours: no number")


def compare(row: Row, size: int, peers: dict[str, Attention]) -> dict[str, Any]:
    """Milliseconds of every side, ratios to ours, and our rates."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    tensors = [
        torch.randn(row.length, heads, size, device=DEVICE, generator=generator)
        .bfloat16().transpose(0, 1).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]  # fmt: skip
    above = torch.randn(tensors[0].shape, device=DEVICE, generator=generator).bfloat16()
    sides = {"ours": ours(row)} | peers
    right = gradients(sides["ours"], tensors, above)
    for name, attention in peers.items():
        check(right, gradients(attention, tensors, above), name)
    with torch.no_grad():
        forward = medians({n: lambda a=a: a(*tensors) for n, a in sides.items()})  # type: ignore[misc]
    backward = {}
    for name, attention in sides.items():
        out = attention(*tensors)
        backward[name] = lambda o=out: torch.autograd.grad(o, tensors, above, retain_graph=True)
    behind = medians(backward)
    work = row.pairs * HEADS * size
    return {
        "forward_ms": {n: round(s * 1e3, 4) for n, s in forward.items()},
        "backward_ms": {n: round(s * 1e3, 4) for n, s in behind.items()},
        "forward_ratio": {n: round(forward[n] / forward["ours"], 3) for n in peers},
        "backward_ratio": {n: round(behind[n] / behind["ours"], 3) for n in peers},
        "forward_tflops": round(4 * work / forward["ours"] / 1e12, 1),
        "backward_tflops": round(10 * work / behind["ours"] / 1e12, 1),
    }


def backends(sdpa: Sdpa, length: int, size: int) -> dict[str, Attention]:
    """Those that run this at all; only where none does, plain operations."""
    probe = [torch.zeros(h, length, size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
             for h in (HEADS, KEY_HEADS, KEY_HEADS)]  # fmt: skip
    found = {}
    for backend in BACKENDS:
        for repeated in (False, True):
            attention = through(sdpa, backend, repeated)
            try:
                attention(*probe).sum().backward()  # type: ignore[no-untyped-call]
            except RuntimeError:  # this build of torch has it not, or not for such heads or masks
                continue
            name = backend.name.lower().removesuffix("_attention")
            found[f"sdpa {name}{', keys repeated' if repeated else ''}"] = attention
    return found or {"sdpa math": through(sdpa, SDPBackend.MATH, repeated=True)}


def with_groups(length: int, size: int) -> dict[str, Any]:
    """Documents with pictures, against FlexAttention and dense masks."""
    torch._dynamo.reset()
    row = packed_with_groups(length).to(DEVICE)
    peers = {"flex": flex(row)}
    if length <= MOST_DENSE:
        peers |= backends(dense(row), length, size)
    return compare(row, size, peers)


def causal(documents: int, length: int, size: int) -> dict[str, Any]:
    """Documents of text alone, against the vendors' kernels."""
    row = causal_documents(length, documents).to(DEVICE)
    peers = backends(by_document(row), length, size)
    return compare(row, size, peers | {"flash route": ours(row, "flash")})


def cases() -> dict[str, Callable[[], dict[str, Any]]]:
    """By name; what the targets are about comes first."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for size in reversed(SIZES):
        found[f"causal, head {size}, 8192"] = partial(causal, 1, 8192, size)
        found[f"causal documents, head {size}, 8192"] = partial(causal, 4, 8192, size)
    for length in LENGTHS:
        for size in SIZES:
            found[f"groups, head {size}, {length}"] = partial(with_groups, length, size)
    return found


def measure(seconds: float | None = None) -> dict[str, Any]:
    """Every case that is begun within `seconds`; the names of the others under "left_out"."""
    ends = time.monotonic() + (seconds or float("inf"))
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "heads": [HEADS, KEY_HEADS]}
    left_out = []
    for name, case in cases().items():
        if time.monotonic() < ends:
            found[name] = case()
        else:
            left_out.append(name)
    return found | {"left_out": left_out}

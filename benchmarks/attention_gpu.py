"""The GPU's cases of `benchmarks.attention`: bf16, forward and backward apart, and their rates.

Peers: compiled FlexAttention with its block mask made beforehand, `scaled_dot_product_attention`
with the dense mask, and, for causal documents, its fastest backend called document by document.
Operations are counted over the pairs that are seen: 4 D a pair and head forward, 10 D backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_rows import Row, causal_documents, packed_with_groups
from benchmarks.cuda_timing import medians
from plait.kernels.interval_attention import Intervals, interval_attention

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


def ours(row: Row, route: str = "auto") -> Attention:
    intervals = Intervals(row.lo, row.hi, route=route).to(torch.device("cuda"))
    return lambda q, k, v: interval_attention(q, k, v, intervals)[0]


def flex(row: Row) -> Attention:
    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        return (key >= row.lo[query]) & (key < row.hi[query])

    mask = create_block_mask(seen, 1, 1, row.length, row.length, device="cuda")
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(q[None], k[None], v[None], block_mask=mask, enable_gqa=True)[0]
        return out

    return attention


def dense(row: Row) -> Attention:
    mask = torch.zeros(row.length, row.length, device="cuda", dtype=torch.bfloat16)
    mask.masked_fill_(~row.dense(), -torch.inf)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask[None, None], enable_gqa=True
        )[0]

    return attention


def by_document(row: Row, backend: SDPBackend) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            parts = [
                scaled_dot_product_attention(
                    q[None, :, start:stop],
                    k[None, :, start:stop],
                    v[None, :, start:stop],
                    is_causal=True,
                    enable_gqa=True,
                )
                for start, stop in row.bounds
            ]
        return torch.cat(parts, 2)[0]

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
        difference = float((a.float() - b.float()).norm() / b.float().norm())
        if not difference <= TOLERANCE:
            raise SystemExit(f"{name} differs by {difference:.1e} from ours: no number")


def compare(row: Row, size: int, peers: dict[str, Attention]) -> dict[str, Any]:
    """Milliseconds of every side, ratios to ours, and our rates."""
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [
        torch.randn(row.length, heads, size, device="cuda", generator=generator)
        .bfloat16().transpose(0, 1).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]  # fmt: skip
    above = torch.randn(tensors[0].shape, device="cuda", generator=generator).bfloat16()
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


def best_backend(row: Row, size: int) -> dict[str, Attention]:
    """The backends that run such documents at all."""
    found = {}
    probe = [torch.zeros(h, row.length, size, device="cuda", dtype=torch.bfloat16)
             for h in (HEADS, KEY_HEADS, KEY_HEADS)]  # fmt: skip
    for backend in BACKENDS:
        attention = by_document(row, backend)
        try:
            attention(*probe)
        except RuntimeError:  # this build of torch has it not, or not for grouped heads
            continue
        found[backend.name.lower()] = attention
    return found


def measure() -> dict[str, Any]:
    """Every case; the keys say head size and length."""
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "heads": [HEADS, KEY_HEADS]}
    for size in SIZES:
        for length in LENGTHS:
            torch._dynamo.reset()
            row = packed_with_groups(length).to("cuda")
            peers = {"flex": flex(row)}
            if length <= MOST_DENSE:
                peers["dense"] = dense(row)
            found[f"groups, head {size}, {length}"] = compare(row, size, peers)
        row = causal_documents(8192, 4).to("cuda")
        peers = best_backend(row, size) | {"flash route": ours(row, "flash")}
        found[f"causal documents, head {size}, 8192"] = compare(row, size, peers)
        whole = causal_documents(8192, 1).to("cuda")
        found[f"causal, head {size}, 8192"] = compare(whole, size, best_backend(whole, size))
    return found

"""The forward kernel: a program owns one block of queries and walks the keys that they see.

It walks them in three stretches: where some pair is hidden, where none is, and where some is
again. Only the outer two compare positions with intervals. Scores are powers of two,
`score * log2(e)`, since a GPU computes exp2 faster than exp.

Arguments: `*_head` and `*_row` are strides; a head's values lie side by side. `outer` and `inner`
turn a product q.k into such a score: product * outer, where capped outer * tanh(product * inner).
"""

import triton
import triton.language as tl

from plait.kernels.interval_attention.triton_tiles import load_rows, store_rows, tanh


@triton.jit  # type: ignore[untyped-decorator]
def _attend(
    total: tl.tensor,
    high: tl.tensor,
    sums: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    k_row: tl.tensor,
    v_row: tl.tensor,
    columns: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    keys: tl.tensor,
    outer: tl.tensor,
    inner: tl.tensor,
    size: tl.constexpr,
    padded: tl.constexpr,
    block_k: tl.constexpr,
    capped: tl.constexpr,
    masked: tl.constexpr,
    precision: tl.constexpr,
    upcast: tl.constexpr,
) -> tl.tensor:
    """Online softmax over keys [start, stop): weighted values, highest score, sum of weights."""
    for first in range(start, stop, block_k):
        key = first + tl.arange(0, block_k)
        k_tile = load_rows(k, key, columns, k_row, keys, size, padded, masked, upcast)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=precision)
        scores = outer * tanh(scores * inner) if capped else scores * outer
        if masked:
            seen = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(high, tl.max(scores, 1))
        # A row that has seen nothing yet has no highest score to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher) if masked else higher
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(high - base)
        sums = sums * shrink + tl.sum(weights, 1)
        v_tile = load_rows(v, key, columns, v_row, keys, size, padded, masked, upcast)
        total = total * shrink[:, None]
        total = tl.dot(weights.to(v_tile.dtype), v_tile, total, input_precision=precision)
        high = higher
    return total, high, sums


@triton.jit  # type: ignore[untyped-decorator]
def forward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    blocks: tl.tensor,
    q_head: tl.tensor,
    q_row: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    out_head: tl.tensor,
    out_row: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    outer: tl.tensor,
    inner: tl.tensor,
    group: tl.constexpr,
    size: tl.constexpr,
    padded: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    capped: tl.constexpr,
    precision: tl.constexpr,
    upcast: tl.constexpr,
) -> None:
    """out and lse of one block of queries of one head."""
    # The last blocks of a long document see most keys: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = block * block_q + tl.arange(0, block_q)
    columns = tl.arange(0, padded)
    inside = row < queries
    low = tl.load(lo + row, mask=inside, other=0)
    high_end = tl.load(hi + row, mask=inside, other=0)
    q_tile = load_rows(q + head * q_head, row, columns, q_row, queries, size, padded, True, upcast)
    k += head // group * k_head
    v += head // group * v_head

    total = tl.zeros([block_q, padded], tl.float32)
    high = tl.full([block_q], float("-inf"), tl.float32)
    sums = tl.zeros([block_q], tl.float32)
    for stretch in tl.static_range(3):
        start = tl.load(blocks + 4 * block + stretch)
        stop = tl.load(blocks + 4 * block + stretch + 1)
        total, high, sums = _attend(
            total, high, sums, q_tile, k, v, k_row, v_row, columns, low, high_end, start, stop,
            keys, outer, inner, size, padded, block_k, capped, stretch != 1, precision, upcast,
        )  # fmt: skip

    nothing = sums == 0
    sums = tl.where(nothing, 1.0, sums)
    found = tl.where(nothing, float("-inf"), (high + tl.log2(sums)) * 0.6931471805599453)
    tl.store(lse + head * queries + row, found, mask=inside)
    total = total / sums[:, None]
    store_rows(out + head * out_head, total, row, columns, out_row, queries, size)

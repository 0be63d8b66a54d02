"""The backward kernels: one sums over the keys of a block of queries, one over the queries of keys.

Each result is summed by one program in one order: no atomics, so every repetition gives the same
bits. Stretches, strides, `outer` and `inner` are those of `triton_forward`.

    delta = sum_d grad_out out - grad_lse        d_score = weight (grad_out . v - delta)
"""

import triton
import triton.language as tl

from plait.kernels.interval_attention.triton_tiles import load_rows, log2_sums, store_rows, tanh


@triton.jit  # type: ignore[untyped-decorator]
def delta(
    grad: tl.tensor,
    out: tl.tensor,
    lse_grad: tl.tensor,
    found: tl.tensor,
    grad_head: tl.tensor,
    grad_row: tl.tensor,
    out_head: tl.tensor,
    out_row: tl.tensor,
    queries: tl.tensor,
    size: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
    with_lse: tl.constexpr,
) -> None:
    """What each row's softmax subtracts from the gradients of its weights, for one head."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * block + tl.arange(0, block)
    columns = tl.arange(0, padded)
    grad += head * grad_head
    out += head * out_head
    grad_tile = load_rows(grad, row, columns, grad_row, queries, size, padded, True, True)
    out_tile = load_rows(out, row, columns, out_row, queries, size, padded, True, True)
    value = tl.sum(grad_tile * out_tile, 1)
    if with_lse:
        value -= tl.load(lse_grad + head * queries + row, mask=row < queries, other=0.0)
    tl.store(found + head * queries + row, value, mask=row < queries)


@triton.jit  # type: ignore[untyped-decorator]
def _from_keys(
    d_q: tl.tensor,
    q: tl.tensor,
    grad: tl.tensor,
    log2_sum: tl.tensor,
    delta_rows: tl.tensor,
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
    """Add what the keys [start, stop) give to the gradient of a block of queries, unscaled."""
    for first in range(start, stop, block_k):
        key = first + tl.arange(0, block_k)
        k_tile = load_rows(k, key, columns, k_row, keys, size, padded, masked, upcast)
        v_tile = load_rows(v, key, columns, v_row, keys, size, padded, masked, upcast)
        product = tl.dot(q, tl.trans(k_tile), input_precision=precision)
        d_weights = tl.dot(grad, tl.trans(v_tile), input_precision=precision)
        if capped:
            bent = tanh(product * inner)
            weights = tl.exp2(outer * bent - log2_sum[:, None])
        else:
            weights = tl.exp2(product * outer - log2_sum[:, None])
        if masked:
            seen = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
            weights = tl.where(seen, weights, 0.0)
        d_scores = weights * (d_weights - delta_rows[:, None])
        if capped:
            d_scores = d_scores * (1 - bent * bent)
        d_q = tl.dot(d_scores.to(k_tile.dtype), k_tile, d_q, input_precision=precision)
    return d_q


@triton.jit  # type: ignore[untyped-decorator]
def backward_queries(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    deltas: tl.tensor,
    d_q: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    blocks: tl.tensor,
    q_head: tl.tensor,
    q_row: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    grad_head: tl.tensor,
    grad_row: tl.tensor,
    d_q_head: tl.tensor,
    d_q_row: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    scale: tl.tensor,
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
    """The gradient of one block of queries of one head."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = block * block_q + tl.arange(0, block_q)
    columns = tl.arange(0, padded)
    inside = row < queries
    low = tl.load(lo + row, mask=inside, other=0)
    high = tl.load(hi + row, mask=inside, other=0)
    q += head * q_head
    grad += head * grad_head
    q_tile = load_rows(q, row, columns, q_row, queries, size, padded, True, upcast)
    grad_tile = load_rows(grad, row, columns, grad_row, queries, size, padded, True, upcast)
    log2_sum = log2_sums(lse + head * queries, row, queries)
    delta_rows = tl.load(deltas + head * queries + row, mask=inside, other=0.0)
    k += head // group * k_head
    v += head // group * v_head

    total = tl.zeros([block_q, padded], tl.float32)
    for stretch in tl.static_range(3):
        start = tl.load(blocks + 4 * block + stretch)
        stop = tl.load(blocks + 4 * block + stretch + 1)
        total = _from_keys(
            total, q_tile, grad_tile, log2_sum, delta_rows, k, v, k_row, v_row, columns, low, high,
            start, stop, keys, outer, inner, size, padded, block_k, capped, stretch != 1,
            precision, upcast,
        )  # fmt: skip
    store_rows(d_q + head * d_q_head, total * scale, row, columns, d_q_row, queries, size)


@triton.jit  # type: ignore[untyped-decorator]
def _from_queries(
    d_k: tl.tensor,
    d_v: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    key: tl.tensor,
    q: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    deltas: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    q_row: tl.tensor,
    grad_row: tl.tensor,
    columns: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    queries: tl.tensor,
    outer: tl.tensor,
    inner: tl.tensor,
    size: tl.constexpr,
    padded: tl.constexpr,
    block_q: tl.constexpr,
    capped: tl.constexpr,
    masked: tl.constexpr,
    precision: tl.constexpr,
    upcast: tl.constexpr,
) -> tl.tensor:
    """Add what the queries [start, stop) give to the gradients of a block of keys and values.

    Keys are rows here, so that both sums read their weights as they are.
    """
    for first in range(start, stop, block_q):
        row = first + tl.arange(0, block_q)
        inside = row < queries
        q_tile = load_rows(q, row, columns, q_row, queries, size, padded, masked, upcast)
        grad_tile = load_rows(grad, row, columns, grad_row, queries, size, padded, masked, upcast)
        log2_sum = log2_sums(lse, row, queries)
        delta_rows = tl.load(deltas + row, mask=inside, other=0.0)
        product = tl.dot(k, tl.trans(q_tile), input_precision=precision)
        if capped:
            bent = tanh(product * inner)
            weights = tl.exp2(outer * bent - log2_sum[None, :])
        else:
            weights = tl.exp2(product * outer - log2_sum[None, :])
        if masked:
            low = tl.load(lo + row, mask=inside, other=0)
            high = tl.load(hi + row, mask=inside, other=0)
            seen = (key[:, None] >= low[None, :]) & (key[:, None] < high[None, :])
            weights = tl.where(seen, weights, 0.0)
        d_v = tl.dot(weights.to(grad_tile.dtype), grad_tile, d_v, input_precision=precision)
        d_weights = tl.dot(v, tl.trans(grad_tile), input_precision=precision)
        d_scores = weights * (d_weights - delta_rows[None, :])
        if capped:
            d_scores = d_scores * (1 - bent * bent)
        d_k = tl.dot(d_scores.to(q_tile.dtype), q_tile, d_k, input_precision=precision)
    return d_k, d_v


@triton.jit  # type: ignore[untyped-decorator]
def backward_keys(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    deltas: tl.tensor,
    d_k: tl.tensor,
    d_v: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    blocks: tl.tensor,
    q_head: tl.tensor,
    q_row: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    grad_head: tl.tensor,
    grad_row: tl.tensor,
    d_k_head: tl.tensor,
    d_k_row: tl.tensor,
    d_v_head: tl.tensor,
    d_v_row: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    scale: tl.tensor,
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
    """The gradients of one block of keys and values, over all query heads that read them."""
    block = tl.program_id(0)
    key_head = tl.program_id(1).to(tl.int64)
    key = block * block_k + tl.arange(0, block_k)
    columns = tl.arange(0, padded)
    k += key_head * k_head
    v += key_head * v_head
    k_tile = load_rows(k, key, columns, k_row, keys, size, padded, True, upcast)
    v_tile = load_rows(v, key, columns, v_row, keys, size, padded, True, upcast)

    k_total = tl.zeros([block_k, padded], tl.float32)
    v_total = tl.zeros([block_k, padded], tl.float32)
    for member in range(group):
        head = key_head * group + member
        at = head * queries
        q_of, grad_of = q + head * q_head, grad + head * grad_head
        for stretch in tl.static_range(3):
            start = tl.load(blocks + 4 * block + stretch)
            stop = tl.load(blocks + 4 * block + stretch + 1)
            k_total, v_total = _from_queries(
                k_total, v_total, k_tile, v_tile, key, q_of, grad_of, lse + at, deltas + at, lo,
                hi, q_row, grad_row, columns, start, stop, queries, outer, inner, size, padded,
                block_q, capped, stretch != 1, precision, upcast,
            )  # fmt: skip
    store_rows(d_k + key_head * d_k_head, k_total * scale, key, columns, d_k_row, keys, size)
    store_rows(d_v + key_head * d_v_head, v_total, key, columns, d_v_row, keys, size)

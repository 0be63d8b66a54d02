"""The Triton route against float64: for real on a GPU, else in Triton's interpreter.

Needs torch, triton, numpy and pytest alone. Without a GPU, TRITON_INTERPRET=1 must be set before
Triton is first imported; tests/conftest.py does.
"""

import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.kernels.token_logprobs import naive, token_logprobs, weighted_nll

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET is not set", allow_module_level=True)
pytest.importorskip("triton")

from plait.kernels.token_logprobs import triton  # noqa: E402
from plait.kernels.token_logprobs.triton_kernels import launch_of  # noqa: E402

VOCABULARY = 301
"""More than one tile of 256, and odd."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three positions of float32, two of 16 bits."""
    monkeypatch.setattr(triton, "CHUNK_BYTES", 4 * VOCABULARY * 3)


def inputs(
    length: int,
    targets: int | None = None,
    dtype: torch.dtype = torch.float32,
    vocabulary: int = VOCABULARY,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    hidden = torch.randn(length, 16, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(vocabulary, 16, generator=generator).to(DEVICE, dtype).requires_grad_()
    shape = (length,) if targets is None else (length, targets)
    return hidden, weight, torch.randint(0, vocabulary, shape, generator=generator).to(DEVICE)


def shapings() -> list[dict[str, Any]]:
    bias = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    return [{}, {"softcap": 5.0}, {"bias": bias, "softcap": 4.0, "temperature": 1.3}]


def close(have: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(have.double(), want.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("targets", [None, 3])
@pytest.mark.parametrize("number", range(3))
def test_all_scores_and_their_gradients_equal_the_definition(
    length: int, targets: int | None, number: int
) -> None:
    shaping = shapings()[number]
    hidden, weight, ids = inputs(length, targets)
    found = token_logprobs(hidden, weight, ids, entropy=True, top_k=4, route="triton", **shaping)
    top, top_ids = naive.top_logprobs(hidden, weight, 4, **shaping)
    expected = [
        naive.token_logprobs(hidden, weight, ids, **shaping),
        naive.entropy(hidden, weight, **shaping),
        top,
    ]
    assert found.entropy is not None and found.top_logprobs is not None
    assert found.top_ids is not None and torch.equal(found.top_ids, top_ids)
    scores = [found.logprobs, found.entropy, found.top_logprobs]
    for have, want in zip(scores, expected, strict=True):
        assert have.dtype == torch.float32 and have.shape == want.shape
        close(have, want)
    slopes = [torch.randn(s.shape, generator=torch.Generator().manual_seed(1)) for s in scores]
    both = [
        torch.autograd.grad(
            sum((a * b.to(DEVICE)).sum() for a, b in zip(side, slopes, strict=True)),
            [hidden, weight],
        )
        for side in (scores, expected)
    ]
    for have, want in zip(*both, strict=True):
        close(have, want, 3e-5)


@pytest.mark.parametrize("targets", [None, 3])
@pytest.mark.parametrize("number", range(3))
def test_losses_and_their_gradients_equal_the_definition(targets: int | None, number: int) -> None:
    shaping = shapings()[number]
    hidden, weight, ids = inputs(7, targets)
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    expected = naive.weighted_nll(hidden, weight, ids, weights, **shaping)
    loss, _ = weighted_nll(hidden, weight, ids, weights, route="triton", **shaping)
    frozen = token_logprobs(hidden, weight.detach(), ids, route="triton", **shaping).logprobs
    close(loss, expected)
    want = torch.autograd.grad(3 * expected, [hidden, weight])
    for a, b in zip(torch.autograd.grad(3 * loss, [hidden, weight]), want, strict=True):
        close(a, b, 3e-5)
    close(torch.autograd.grad(-3 * (weights * frozen).sum(), hidden)[0], want[0], 3e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_keep_float32_statistics(dtype: torch.dtype) -> None:
    hidden, weight, ids = inputs(9, dtype=dtype)
    scored = token_logprobs(hidden, weight, ids, entropy=True, route="triton")
    assert scored.entropy is not None
    close(scored.logprobs, naive.token_logprobs(hidden, weight, ids))
    close(scored.entropy, naive.entropy(hidden, weight))
    weights = torch.rand(9, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    wide = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    naive.weighted_nll(wide[0], wide[1], ids, weights).backward()
    loss, _ = weighted_nll(hidden, weight, ids, weights, route="triton")
    for have, leaf in zip(torch.autograd.grad(loss, [hidden, weight]), wide, strict=True):
        assert have.dtype == dtype and leaf.grad is not None
        # The logits' gradient is rounded once for the product, and its result once more.
        error = (have.double() - leaf.grad).norm() / leaf.grad.norm()
        assert error < (5e-3 if dtype == torch.bfloat16 else 1e-3)


def test_wide_tiles_and_banned_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "CHUNK_BYTES", 1 << 20)
    hidden, weight, ids = inputs(3, vocabulary=9001)  # three tiles of 4096
    bias = torch.zeros(9001, device=DEVICE)
    bias[4000:8500] = -torch.inf  # a whole stretch of lanes sees nothing else
    bias[ids] = 0
    scored = token_logprobs(hidden, weight, ids, bias=bias, entropy=True, route="triton")
    assert scored.entropy is not None
    close(scored.logprobs, naive.token_logprobs(hidden, weight, ids, bias=bias))
    close(scored.entropy, naive.entropy(hidden, weight, bias=bias))
    have = torch.autograd.grad(scored.logprobs.sum() + scored.entropy.sum(), [hidden, weight])
    assert all(gradient.isfinite().all() for gradient in have)


def test_a_target_outside_of_the_vocabulary_has_no_probability() -> None:
    hidden, weight, ids = inputs(5)
    ids[1], ids[3] = -1, VOCABULARY
    logprobs = token_logprobs(hidden, weight, ids, route="triton").logprobs
    assert logprobs.isneginf().tolist() == [False, True, False, True, False]


def test_an_empty_row_and_repetitions() -> None:
    hidden, weight, ids = inputs(0)
    token_logprobs(hidden, weight, ids, route="triton").logprobs.sum().backward()
    assert weight.grad is not None and not weight.grad.any()
    hidden, weight, ids = inputs(7, 2, dtype=torch.bfloat16)
    ones = torch.ones(ids.shape, device=DEVICE)
    runs = [
        torch.autograd.grad(
            weighted_nll(hidden, weight, ids, ones, route="triton")[0], [hidden, weight]
        )
        for _ in range(2)
    ]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_chunks_are_a_function_of_sizes_and_free_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    gib = 1 << 30
    for length, free in itertools.product(
        (1, 63, 64, 100, 2047, 8192, 100_000), (1, gib, 80 * gib)
    ):
        rows = triton.rows_of(length, 131_072, 6, free)
        assert 1 <= rows <= max(1, length)
        if rows > 1:
            assert rows * 131_072 * 6 <= min(triton.CHUNK_BYTES, free // 4)
        if 64 <= rows < length:
            assert rows % 64 == 0
    # 8192 rows do not fit at once: they go in equal chunks, not in three whole ones and a rest.
    assert triton.rows_of(8192, 131_072, 6, 80 * gib) == 2048
    assert triton.rows_of(8192, 131_072, 6, 40 * gib) == 2048, "free memory enough, same chunks"
    assert triton.rows_of(8192, 131_072, 6, 4 * gib) == 1216
    assert triton.rows_of(0, 131_072, 6, gib) == 1


def test_block_sizes_come_from_a_table() -> None:
    sizes = [launch_of(size) for size in (2, 1024, 1025, 32_768, 262_144)]
    assert [launch.block for launch in sizes] == [256, 256, 1024, 4096, 4096]

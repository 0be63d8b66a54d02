"""Token logprobs against float64: chunks of 3 positions, groups of 2, blocks of 16 tokens."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plait.kernels.token_logprobs import cpu, naive, output_logits, token_logprobs, weighted_nll

VOCABULARY = 101
SHAPINGS: list[dict[str, Any]] = [
    {},
    {"softcap": 5.0},
    {"bias": torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(9))},
    {"temperature": 0.7},
    {
        "softcap": 4.0,
        "temperature": 1.3,
        "bias": torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(8)),
    },
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 4 * VOCABULARY * 3)
    monkeypatch.setattr(cpu, "MIN_ROWS", 1)
    monkeypatch.setattr(cpu, "BLOCK", 16)
    monkeypatch.setattr(cpu, "GROUP_BYTES", 4 * VOCABULARY * 2)


def inputs(
    length: int, targets: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a weight that want gradients, and targets (T,) or (T, K)."""
    generator = torch.Generator().manual_seed(seed + length)
    hidden = torch.randn(length, 12, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, 12, generator=generator).to(dtype).requires_grad_()
    shape = (length,) if targets is None else (length, targets)
    return hidden, weight, torch.randint(0, VOCABULARY, shape, generator=generator)


def close(have: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(have.double(), want.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("length", [1, 3, 7])
@pytest.mark.parametrize("targets", [None, 1, 3])
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_all_scores_and_their_gradients_equal_the_definition(
    length: int, targets: int | None, shaping: dict[str, Any]
) -> None:
    hidden, weight, ids = inputs(length, targets)
    found = token_logprobs(hidden, weight, ids, entropy=True, top_k=4, **shaping)
    top, top_ids = naive.top_logprobs(hidden, weight, 4, **shaping)
    expected = [
        naive.token_logprobs(hidden, weight, ids, **shaping),
        naive.entropy(hidden, weight, **shaping),
        top,
    ]
    assert found.entropy is not None and found.top_logprobs is not None
    scores = [found.logprobs, found.entropy, found.top_logprobs]
    assert found.top_ids is not None and torch.equal(found.top_ids, top_ids)
    for have, want in zip(scores, expected, strict=True):
        assert have.dtype == torch.float32 and have.shape == want.shape
        close(have, want)

    generator = torch.Generator().manual_seed(1)
    slopes = [torch.randn(score.shape, generator=generator) for score in scores]
    for chosen in ([0], [1], [2], [0, 1, 2]):
        both = [
            torch.autograd.grad(
                [side[i] for i in chosen], [hidden, weight], [slopes[i] for i in chosen],
                retain_graph=True,
            )
            for side in (scores, [want.float() for want in expected])
        ]  # fmt: skip
        for have, want in zip(*both, strict=True):
            close(have, want, 2e-5)


@pytest.mark.parametrize("length", [1, 3, 7])
@pytest.mark.parametrize("targets", [None, 3])
@pytest.mark.parametrize("shaping", SHAPINGS)
@pytest.mark.parametrize("trained", [False, True])
def test_logprobs_alone_equal_the_definition_with_a_frozen_and_a_trained_head(
    length: int, targets: int | None, shaping: dict[str, Any], trained: bool
) -> None:
    hidden, weight, ids = inputs(length, targets)
    weight.requires_grad_(trained)
    leaves = [hidden, weight] if trained else [hidden]
    logprobs = token_logprobs(hidden, weight, ids, **shaping).logprobs
    expected = naive.token_logprobs(hidden, weight, ids, **shaping)
    close(logprobs, expected)
    slopes = torch.randn(ids.shape, generator=torch.Generator().manual_seed(2))
    have = torch.autograd.grad((logprobs * slopes).sum(), leaves)
    want = torch.autograd.grad((expected * slopes).sum(), leaves)
    for a, b in zip(have, want, strict=True):
        close(a, b, 2e-5)


@pytest.mark.parametrize("length", [1, 3, 7])
@pytest.mark.parametrize("targets", [None, 1, 3])
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_the_weighted_loss_and_its_gradients_equal_the_definition(
    length: int, targets: int | None, shaping: dict[str, Any]
) -> None:
    hidden, weight, ids = inputs(length, targets)
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(3))
    loss, logprobs = weighted_nll(hidden, weight, ids, weights, **shaping)
    expected = naive.weighted_nll(hidden, weight, ids, weights, **shaping)
    assert loss.ndim == 0 and loss.dtype == torch.float32
    close(loss, expected)
    close(logprobs, naive.token_logprobs(hidden, weight, ids, **shaping))
    assert not logprobs.requires_grad and logprobs.shape == ids.shape
    want = torch.autograd.grad(3 * expected, [hidden, weight])
    for _ in range(2):  # scaling must leave what was saved as it is
        have = torch.autograd.grad(3 * loss, [hidden, weight], retain_graph=True)
        for a, b in zip(have, want, strict=True):
            close(a, b, 3e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_lose_nothing_but_the_rounding_of_their_gradients(
    dtype: torch.dtype,
) -> None:
    hidden, weight, ids = inputs(50, dtype=dtype)
    scored = token_logprobs(hidden, weight, ids, entropy=True)
    assert scored.entropy is not None
    close(scored.logprobs, naive.token_logprobs(hidden, weight, ids))
    close(scored.entropy, naive.entropy(hidden, weight))
    weights = torch.rand(50, generator=torch.Generator().manual_seed(4))
    wide = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    naive.weighted_nll(wide[0], wide[1], ids, weights).backward()
    losses = [
        weighted_nll(hidden, weight, ids, weights)[0],
        -(weights * token_logprobs(hidden, weight, ids).logprobs).sum(),
    ]
    for loss in losses:
        for have, leaf in zip(torch.autograd.grad(loss, [hidden, weight]), wide, strict=True):
            assert have.dtype == dtype and leaf.grad is not None
            # One rounding to 8 or 11 bits; sums over 17 chunks in bf16 would be off by far more.
            rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-10
            torch.testing.assert_close(have.double(), leaf.grad, rtol=rounding, atol=2e-4)
    frozen = token_logprobs(hidden, weight.detach(), ids).logprobs
    (have,) = torch.autograd.grad(-(weights * frozen).sum(), hidden)
    assert wide[0].grad is not None
    torch.testing.assert_close(have.double(), wide[0].grad, rtol=2.0**-7, atol=2e-4)


def test_a_scale_of_the_loss_is_not_rounded_to_16_bits() -> None:
    hidden, weight, ids = inputs(50, dtype=torch.bfloat16)
    loss, _ = weighted_nll(hidden, weight, ids, torch.ones(50))
    whole = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    for have, want in zip(torch.autograd.grad(loss * 0.1, [hidden, weight]), whole, strict=True):
        assert torch.equal(have, (want.float() * 0.1).bfloat16())


def test_an_entropy_over_a_frozen_weight_has_its_gradient() -> None:
    hidden, weight, ids = inputs(7)
    frozen = weight.detach()
    scored = token_logprobs(hidden, frozen, ids, entropy=True)
    assert scored.entropy is not None
    (have,) = torch.autograd.grad(scored.logprobs.sum() + 2 * scored.entropy.sum(), hidden)
    expected = naive.token_logprobs(hidden, frozen, ids).sum()
    (want,) = torch.autograd.grad(expected + 2 * naive.entropy(hidden, frozen).sum(), hidden)
    close(have, want)


def test_no_gradient_is_computed_that_nobody_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("logits", "gradient", "to_hidden", "add_to_weight"):
        original = getattr(cpu.Head, name)

        def spy(*args: Any, name: str = name, original: Any = original) -> Any:
            called.append(name)
            return original(*args)

        monkeypatch.setattr(cpu.Head, name, spy)

    def calls(loss: Tensor) -> set[str]:
        if loss.requires_grad:
            loss.backward()
        found = {name: called.count(name) for name in called}
        called.clear()
        products["logits"] = found.pop("logits")
        return set(found)

    products: dict[str, int] = {}
    hidden, weight, ids = inputs(7)
    frozen, fixed, ones = weight.detach(), hidden.detach(), torch.ones(7)
    assert calls(token_logprobs(fixed, frozen, ids).logprobs.sum()) == set()
    assert calls(weighted_nll(fixed, frozen, ids, ones)[0]) == set()
    with torch.no_grad():
        assert calls(token_logprobs(hidden, weight, ids).logprobs.sum()) == set()
        assert calls(weighted_nll(hidden, weight, ids, ones)[0]) == set()
    only_hidden = {"gradient", "to_hidden"}
    assert calls(token_logprobs(hidden, frozen, ids).logprobs.sum()) == only_hidden
    assert products["logits"] == 3  # three chunks: nothing was computed again
    assert calls(weighted_nll(hidden, frozen, ids, ones)[0]) == only_hidden
    assert products["logits"] == 3
    only_weight = {"gradient", "add_to_weight"}
    assert calls(token_logprobs(fixed, weight, ids).logprobs.sum()) == only_weight
    assert products["logits"] == 6
    assert calls(weighted_nll(fixed, weight, ids, ones)[0]) == only_weight
    assert hidden.grad is not None and weight.grad is not None


def test_repetitions_give_the_same_bits() -> None:
    hidden, weight, ids = inputs(7, 3)

    def once() -> list[Tensor]:
        scored = token_logprobs(hidden, weight, ids, entropy=True, top_k=2)
        loss, _ = weighted_nll(hidden, weight, ids, torch.ones(ids.shape))
        assert scored.entropy is not None
        total = scored.logprobs.sum() + scored.entropy.sum() + loss
        return [total, *torch.autograd.grad(total, [hidden, weight])]

    for a, b in zip(once(), once(), strict=True):
        assert torch.equal(a, b)


class Largest(TorchDispatchMode):
    """The largest storage, in float32 numbers, that an operator gave."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("trained", [False, True])
def test_the_whole_logits_matrix_is_never_held(trained: bool) -> None:
    hidden, weight, ids = inputs(60)
    weight.requires_grad_(trained)
    limit = max(3 * VOCABULARY, weight.numel(), hidden.numel())  # a chunk is three positions
    with Largest() as seen:
        token_logprobs(hidden, weight, ids).logprobs.sum().backward()
        scored = token_logprobs(hidden, weight, ids, entropy=True, top_k=3)
        assert scored.entropy is not None
        scored.entropy.sum().backward()
        weighted_nll(hidden, weight, ids, torch.ones(60))[0].backward()
    assert 3 * VOCABULARY <= seen.numbers <= limit
    with Largest() as seen:
        naive.token_logprobs(hidden, weight, ids)
    assert seen.numbers >= 60 * VOCABULARY


def test_banned_and_extreme_logits_give_no_nan() -> None:
    hidden, weight, ids = inputs(7)
    bias = torch.zeros(VOCABULARY)
    bias[:50] = -torch.inf
    scored = token_logprobs(hidden * 100, weight, ids % 50 + 50, bias=bias, entropy=True)
    assert scored.entropy is not None
    close(scored.entropy, naive.entropy(hidden * 100, weight, bias=bias))
    total = scored.logprobs.sum() + scored.entropy.sum()
    for gradient in torch.autograd.grad(total, [hidden, weight]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("slope", [3.0, -3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_banned_tokens_are_as_if_they_were_not_there(slope: float, temperature: float) -> None:
    hidden, weight, ids = inputs(7)
    bias = torch.zeros(VOCABULARY)
    bias[:50] = -torch.inf
    found = []
    for head, targets, banned in (
        (weight, ids % 50 + 50, bias),
        (weight[50:], ids % 50, bias[50:]),
    ):
        scored = token_logprobs(
            hidden, head, targets, bias=banned, temperature=temperature, entropy=True
        )
        assert scored.entropy is not None
        total = scored.logprobs.sum() + slope * scored.entropy.sum()
        found.append(torch.autograd.grad(total, [hidden, weight]))
    for have, want in zip(*found, strict=True):  # float32 on both sides
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def test_a_banned_target_without_weight_is_ignored() -> None:
    hidden, weight, ids = inputs(7)
    bias = torch.zeros(VOCABULARY)
    bias[ids[2]] = -torch.inf
    weights = torch.where(ids == ids[2], 0.0, 1.0)
    loss, logprobs = weighted_nll(hidden, weight, ids, weights, bias=bias)
    assert logprobs[2] == -torch.inf
    close(loss, -logprobs[weights > 0].sum())
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [hidden, weight]))


def test_an_empty_row_is_fine() -> None:
    hidden, weight, ids = inputs(0)
    scored = token_logprobs(hidden, weight, ids, entropy=True, top_k=2)
    assert scored.top_ids is not None and scored.top_ids.shape == (0, 2)
    scored.logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 12)
    assert weight.grad is not None and not weight.grad.any()
    loss, logprobs = weighted_nll(hidden, weight, ids, torch.ones(0))
    loss.backward()
    assert loss == 0 and logprobs.shape == (0,)


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, ids = inputs(3)
    refused: list[tuple[str, Any]] = [
        ("frozen", {"bias": torch.zeros(VOCABULARY, requires_grad=True)}),
        ("frozen", {"bias": torch.zeros(3)}),
        ("positive", {"temperature": 0.0}),
        ("positive", {"softcap": -1.0}),
        ("top_k", {"top_k": VOCABULARY + 1}),
        ("route", {"route": "gpu"}),
    ]
    for words, options in refused:
        with pytest.raises(ValueError, match=words):
            token_logprobs(hidden, weight, ids, **options)
    with pytest.raises(ValueError, match="one type"):
        token_logprobs(hidden.bfloat16(), weight, ids)
    with pytest.raises(ValueError, match="targets are"):
        token_logprobs(hidden, weight, ids[:2])
    with pytest.raises(ValueError, match="hidden"):
        token_logprobs(hidden[:, :5], weight, ids)
    for weights in (torch.ones(3, 1), torch.ones(3, requires_grad=True)):
        with pytest.raises(ValueError, match="loss weights"):
            weighted_nll(hidden, weight, ids, weights)


def test_a_cpu_needs_no_triton() -> None:
    program = """
import sys, torch
sys.modules["triton"] = None  # as where it is not installed
from plait.kernels.token_logprobs import token_logprobs
token_logprobs(torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2, dtype=torch.long))
assert "plait.kernels.token_logprobs.triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_logits_are_those_that_are_normalised(
    dtype: torch.dtype, softcap: float | None
) -> None:
    """Not rounded to 16 bits on the way: then a logprob would be off by hundredths."""
    hidden, weight, targets = (t.detach() for t in inputs(7, dtype=dtype))
    logits = output_logits(8 * hidden, weight, softcap=softcap)
    assert logits.dtype == torch.float32
    expected = token_logprobs(8 * hidden, weight, targets, softcap=softcap, route="cpu").logprobs
    found = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)

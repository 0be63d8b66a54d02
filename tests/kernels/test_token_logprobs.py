"""Token logprobs against float64, chunked so that several chunks are walked."""

import pytest
import torch

from plait.kernels.token_logprobs import cpu, naive, token_logprobs


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 4 * 101 * 3)  # three positions of a 101-word vocabulary


@pytest.mark.parametrize("length", [1, 3, 7])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logprobs_and_gradients_equal_the_definition(length: int, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(length)
    hidden = torch.randn(length, 12, generator=generator).requires_grad_()
    weight = torch.randn(101, 12, generator=generator).requires_grad_()
    targets = torch.randint(0, 101, (length,), generator=generator)
    expected = naive.token_logprobs(hidden, weight, targets, softcap)
    logprobs = token_logprobs(hidden, weight, targets, softcap=softcap)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)

    scale = torch.randn(length, generator=generator)
    want = torch.autograd.grad((expected * scale).sum(), [hidden, weight])
    have = torch.autograd.grad((logprobs * scale).sum(), [hidden, weight])
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_an_empty_row_is_fine() -> None:
    hidden = torch.randn(0, 12).requires_grad_()
    weight = torch.randn(101, 12)
    logprobs = token_logprobs(hidden, weight, torch.empty(0, dtype=torch.long))
    logprobs.sum().backward()
    assert logprobs.shape == (0,) and weight.grad is None
    assert hidden.grad is not None and hidden.grad.shape == (0, 12)


def test_the_whole_logits_matrix_is_never_held() -> None:
    held: list[int] = []
    hidden = torch.randn(20, 12).requires_grad_()
    weight = torch.randn(101, 12)
    original = cpu._logits

    def spy(*args: torch.Tensor | None) -> torch.Tensor:
        logits = original(*args)  # type: ignore[arg-type]
        held.append(logits.numel())
        return logits

    cpu._logits = spy  # type: ignore[assignment]
    try:
        token_logprobs(hidden, weight, torch.zeros(20, dtype=torch.long)).sum().backward()
    finally:
        cpu._logits = original
    assert len(held) == 14 and max(held) <= 3 * 101

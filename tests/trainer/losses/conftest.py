"""Batches for losses, and the comparison of a loss with a formula in Python's own floats."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.trainer.losses import LossBatch, config_of, loss_named

LENGTHS = (5, 0, 1, 7, 2, 1, 0, 13)
"""Odd sizes, documents of one position, empty documents."""


@dataclass(frozen=True)
class Case:
    """A batch of a loss; `numbers` gives a document's values as Python floats, in float64."""

    loss: str
    batch: LossBatch

    def evaluate(self, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """The documents' losses, and the gradient of their sum weighted by `upstream`."""
        self.batch.logprobs.grad = None
        losses = loss_named(self.loss).function(self.batch)
        (losses * upstream).sum().backward()
        gradient = self.batch.logprobs.grad
        assert gradient is not None
        return losses.detach(), gradient

    def documents(self) -> list[dict[str, Any]]:
        """Each document's logprobs `lp`, weights `w`, inputs and entropy, as lists of floats."""
        batch = self.batch
        columns: dict[str, Tensor] = {"lp": batch.logprobs.detach(), "w": batch.weights}
        columns |= batch.inputs
        if batch.entropy is not None:
            columns["entropy"] = batch.entropy.detach()
        found, start = [], 0
        for length in batch.lengths.tolist():
            stop = start + length
            found.append({n: v[start:stop].double().tolist() for n, v in columns.items()})
            start = stop
        return found


Make = Callable[..., Case]
Formula = Callable[[dict[str, Any], dict[str, float]], tuple[list[float], list[Any]]]
"""(document, config) -> terms that sum to its loss, and its gradient by each logprob."""


@pytest.fixture
def make() -> Make:
    return make_case


@pytest.fixture
def alone() -> Callable[[Case, int, int], Case]:
    return part_of


def make_case(
    loss: str,
    lengths: Sequence[int] = LENGTHS,
    *,
    seed: int = 0,
    apart: float = 0.5,
    given: dict[str, float] | None = None,
    targets: int | None = None,
) -> Case:
    """A random batch with every input that the loss may read.

    Args:
        apart: The standard deviation of the model's log-ratios.
        given: The loss_fn_config.
        targets: K of soft targets.
    """
    random = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    shape = (count,) if targets is None else (count, targets)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random)

    def logprobs(*size: int) -> Tensor:
        return torch.log_softmax(normal(*size, 50), -1)[..., 0]

    lp = logprobs(*shape)
    weights = torch.rand(count, generator=random) * 2 - 0.2
    sign = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) % 3 % 2 * 2.0 - 1
    inputs = {
        "logprobs": lp + apart * normal(*shape),
        "advantages": normal(count),
        "sequence_ratio_mask": (torch.rand(count, generator=random) < 0.7).float(),
        "reference_logprobs": lp + apart * normal(*shape),
        "labels": sign,
    }
    found = loss_named(loss)
    if targets is not None:  # the K likeliest of a teacher and of a student with 50 tokens
        teacher = torch.log_softmax(2 * normal(count, 50), -1)
        student = torch.log_softmax(2 * normal(count, 50), -1)
        inputs["target_logprobs"], chosen = teacher.topk(targets)
        lp = student.gather(1, chosen)
        if "weights" in found.per_target:
            weights = torch.rand(shape, generator=random)
    read = (*found.inputs, *found.optional)
    batch = LossBatch(
        logprobs=lp.requires_grad_(),
        weights=weights,
        inputs={name: values for name, values in inputs.items() if name in read},
        lengths=torch.tensor(lengths),
        config=config_of(found, given),
        entropy=torch.rand(count, generator=random).requires_grad_(),
    )
    return Case(loss, batch)


def part_of(case: Case, first: int, last: int) -> Case:
    """The documents from `first` until before `last` in a batch of their own."""
    batch = case.batch
    start, stop = int(batch.lengths[:first].sum()), int(batch.lengths[:last].sum())

    def cut(values: Tensor) -> Tensor:
        return values.detach()[start:stop].clone()

    entropy = None if batch.entropy is None else cut(batch.entropy)
    part = replace(
        batch,
        logprobs=cut(batch.logprobs).requires_grad_(),
        weights=cut(batch.weights),
        inputs={name: cut(values) for name, values in batch.inputs.items()},
        lengths=batch.lengths[first:last],
        entropy=entropy,
    )
    return Case(case.loss, part)


@pytest.fixture
def agrees() -> Callable[[Case, Formula], None]:
    """Compare every document's loss and gradient with a formula."""

    def compare(case: Case, formula: Formula) -> None:
        upstream = torch.linspace(-1, 2, len(case.batch.lengths))
        losses, gradient = case.evaluate(upstream)
        terms, gradients = [], []
        for document, factor in zip(case.documents(), upstream.tolist(), strict=True):
            parts, slopes = formula(document, dict(case.batch.config))
            terms.append(parts)
            gradients += [torch.tensor(slope, dtype=torch.float64) * factor for slope in slopes]
        expected = torch.tensor([sum(parts) for parts in terms], dtype=torch.float64)
        # What cancels in a sum counts: its rounding is that of its largest terms.
        size = torch.tensor([sum(abs(part) for part in parts) for parts in terms])
        assert losses.shape == expected.shape
        assert ((losses.double() - expected).abs() <= 2e-5 * size + 1e-7).all()
        slopes = torch.stack(gradients) if gradients else torch.zeros_like(gradient).double()
        torch.testing.assert_close(gradient.double(), slopes, rtol=2e-5, atol=1e-6)

    return compare

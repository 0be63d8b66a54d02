"""Losses are sums over weighted positions, said per document, and never normalised."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plait.errors import UnknownNameError
from plait.kernels.token_logprobs import naive
from plait.loss_inputs import LOSS_NAMES
from plait.stream import pack
from plait.trainer import losses
from plait.trainer.losses import LOSSES, Loss, LossBatch
from plait.trainer.model import Objective


def test_their_names_are_known_without_a_framework() -> None:
    assert set(LOSS_NAMES) <= LOSSES.keys()
    assert all(LOSSES[name].name == name for name in LOSS_NAMES)


def test_the_loss_is_the_weighted_sum_of_logprobs(lab: Any) -> None:
    built = lab.build()
    stream = lab.stream(built, lab.samples)
    stream.weights *= torch.linspace(0.5, 2, stream.length)
    with torch.no_grad():
        sums = built.model.compute(stream)
        hidden, _ = built.model.hidden(stream)
    expected = naive.token_logprobs(hidden, built.model.output_weight, stream.targets)
    assert torch.equal(sums.index, stream.weights.nonzero()[:, 0])
    torch.testing.assert_close(sums.logprobs.double(), expected[sums.index], rtol=1e-5, atol=1e-5)
    per_position = -expected * stream.weights
    assert float(sums.loss) == pytest.approx(float(per_position.sum()), rel=1e-5)
    assert sums.weight == pytest.approx(float(stream.weights.sum()), rel=1e-6)
    for (loss, weight), (start, stop) in zip(sums.documents, stream.bounds, strict=True):
        assert loss == pytest.approx(float(per_position[start:stop].sum()), rel=1e-5)
        assert weight == pytest.approx(float(stream.weights[start:stop].sum()), rel=1e-6)


def test_a_message_weight_scales_loss_and_gradient(lab: Any) -> None:
    built = lab.build()
    samples = lab.samples[:1]
    whole, gradient = lab.gradients(built, [lab.stream(built, samples)])
    user, answer = samples[0].messages
    halved = replace(samples[0], messages=(user, replace(answer, weight=0.5)))
    half, half_gradient = lab.gradients(built, [lab.stream(built, [halved])])
    torch.testing.assert_close(half * 2, whole, rtol=1e-6, atol=0)
    assert (2 * half_gradient - gradient).norm() <= 1e-6 * gradient.norm()


def test_a_stream_without_weight_adds_nothing(lab: Any) -> None:
    built = lab.build()
    stream = lab.stream(built, lab.samples[:2])
    stream.weights.zero_()
    sums = built.model.compute(stream)
    sums.loss.backward()
    assert float(sums.loss.detach()) == 0 and sums.weight == 0 and len(sums.logprobs) == 0
    for _, name, parameter in built.model.trainable():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_text_after_a_picture_counts_in_forward_as_in_backward(lab: Any) -> None:
    """The last position of a picture predicts the text after it."""
    built = lab.build()
    documents, inputs = lab.documents(built, lab.samples[3:])
    (span,) = documents[0].spans
    weights = documents[0].weights.copy()
    targets = documents[0].targets.copy()
    weights[span.stop - 1], targets[span.stop - 1] = 1.0, 7
    stream = pack([replace(documents[0], weights=weights, targets=targets)], inputs)
    with torch.no_grad():
        some = built.model.compute(stream)
        every = built.model.compute(stream, everywhere=True)
    assert span.stop - 1 in some.index.tolist()
    assert float(every.loss) == pytest.approx(float(some.loss), rel=1e-6)
    inside = torch.isin(every.index, some.index)
    torch.testing.assert_close(every.logprobs[inside], some.logprobs)
    assert len(every.index) == documents[0].length - span.length + 1


def test_a_loss_of_one_s_own_reads_its_inputs_by_document(lab: Any) -> None:
    """Three times the loss of the documents whose input says so, in one row with the others."""

    def scaled(batch: LossBatch) -> Tensor:
        return batch.per_document(-batch.logprobs * batch.weights * batch.inputs["scale"])

    built = lab.build()
    documents, inputs = lab.documents(built, lab.samples)
    scales = [1.0, 3.0, 3.0, 1.0]
    own = [
        replace(d, loss_inputs={"scale": np.full(d.length, scale, dtype=np.float32)})
        for d, scale in zip(documents, scales, strict=True)
    ]
    objective = Objective(Loss(name="scaled", function=scaled, inputs=("scale",)), {})
    with torch.no_grad():
        plain = built.model.compute(pack(documents, inputs)).documents
        made = built.model.compute(pack(own, inputs), objective).documents
    factors = [new[0] / old[0] for new, old in zip(made, plain, strict=True)]
    assert factors == pytest.approx(scales, rel=1e-5)


def test_an_unknown_loss_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match=r"loss 'cross_entrpy'.*'cross_entropy'"):
        losses.loss_named("cross_entrpy")

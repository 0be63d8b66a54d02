"""Every loss through the client: against the same formula as a custom loss, and what is refused."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plait.client import TrainingClient
from plait.errors import ConfigError, DataError, UnknownNameError
from plait.modalities import Image
from plait.primitives.documents import document_of
from plait.primitives.objectives import objective_of
from plait.stream import Sample
from plait.trainer.engine.controller import EngineSettings
from plait.trainer.losses import LossBatch
from plait.types import Datum, ImageChunk, ModelInput

Make = Callable[..., TrainingClient]
LENGTHS = (5, 3, 7, 4)


def gradients(client: TrainingClient) -> dict[str, Tensor]:
    run = client._engine.executor.runs[client._run]
    pending = zip(run.trainable, run.gradients, strict=True)
    found = {name: g.clone() for (_, name, _), g in pending if g is not None}
    run.clear()
    return found


def assert_close(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert mine.keys() == other.keys() and mine
    whole = torch.stack([g.norm() for g in other.values()]).norm()
    for name, gradient in mine.items():
        assert (gradient - other[name]).norm() <= 1e-5 * max(other[name].norm(), 1e-3 * whole), name


def data_with(**inputs: Callable[[np.random.Generator, int], Any]) -> list[Datum]:
    """Random tokens and targets, and inputs drawn for each of their positions."""
    draw = np.random.default_rng(0)
    return [
        Datum(
            ModelInput.from_ints(draw.integers(5, 200, length).tolist()),
            {"target_tokens": draw.integers(5, 200, length),
             **{name: make(draw, length) for name, make in inputs.items()}},
        )
        for length in LENGTHS
    ]  # fmt: skip


def near(draw: np.random.Generator, length: int) -> Any:
    """Logprobs about as large as a random model's."""
    return (-5.4 + 0.4 * draw.standard_normal(length)).astype(np.float32)


def signed(draw: np.random.Generator, length: int) -> Any:
    return draw.choice([-1.0, 0.5, 2.0], length)


def some(draw: np.random.Generator, length: int) -> Any:
    return (draw.random(length) < 0.7).astype(np.float32) * draw.choice([1.0, 0.5], length)


def ones(draw: np.random.Generator, length: int) -> Any:
    return np.ones(length)


def t(datum: Datum, name: str) -> Tensor:
    return datum.loss_fn_inputs[name].to_torch()


def ratio(datum: Datum, lp: Tensor) -> Tensor:
    return (lp - t(datum, "logprobs")).exp()


def clipped(r: Tensor, a: Tensor) -> Tensor:
    return -torch.minimum(r * a, r.clamp(0.8, 1.2) * a).sum()


def sequence_ratio(datum: Datum, lp: Tensor) -> Tensor:
    mask = t(datum, "sequence_ratio_mask")
    mean = ((lp - t(datum, "logprobs")) * mask).sum() / mask.sum()
    return mean.detach().exp() * (lp - lp.detach()).exp()


def dpo(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Tensor:
    gains = [
        (t(d, "weights") * (lp - t(d, "reference_logprobs"))).sum()
        for d, lp in zip(data, logprobs, strict=True)
    ]
    pairs = zip(gains[0::2], gains[1::2], strict=True)
    return sum((-torch.nn.functional.logsigmoid(0.1 * (a - b)) for a, b in pairs), torch.zeros(()))


Each = Callable[[Datum, Tensor], Tensor]
POLICY = {"logprobs": near, "advantages": signed}
EACH: dict[str, tuple[dict[str, Any], Each]] = {
    "cross_entropy": ({"weights": some}, lambda d, lp: -(lp * t(d, "weights")).sum()),
    "importance_sampling": (POLICY, lambda d, lp: -(ratio(d, lp) * t(d, "advantages")).sum()),
    "ppo": (POLICY, lambda d, lp: clipped(ratio(d, lp), t(d, "advantages"))),
    "cispo": (
        POLICY,
        lambda d, lp: -(ratio(d, lp).clamp(0, 4).detach() * lp * t(d, "advantages")).sum(),
    ),
    "dro": (
        POLICY,
        lambda d, lp: -(lp * t(d, "advantages") - 0.025 * (lp - t(d, "logprobs")).square()).sum(),
    ),
    "gspo": (
        {**POLICY, "sequence_ratio_mask": ones},
        lambda d, lp: clipped(sequence_ratio(d, lp), t(d, "advantages")),
    ),
}


@pytest.mark.parametrize("name", EACH)
def test_a_loss_is_its_formula_as_a_custom_loss(make: Make, name: str) -> None:
    """The custom way takes the formula's own autograd; losses and gradients must be the same."""
    inputs, formula = EACH[name]
    data = data_with(**inputs)
    client = make(encoders={}, train=("language",))

    def whole(data: Sequence[Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        each = [formula(d, lp) for d, lp in zip(data, logprobs, strict=True)]
        return torch.stack(each).sum(), {"data": len(data)}

    custom = client.forward_backward_custom(data, whole).result()
    expected = gradients(client)
    named = client.forward_backward(data, name).result()
    assert named.metrics["loss:sum"] == pytest.approx(custom.metrics["custom_loss:sum"], rel=1e-5)
    assert custom.metrics["data"] == 4
    assert_close(gradients(client), expected)


def test_dpo_reads_pairs_by_turns_however_they_are_packed(make: Make) -> None:
    data = data_with(weights=some, reference_logprobs=near)
    engine = EngineSettings(capacity=12)
    client, narrow = (make(encoders={}, train=("language",), engine=e) for e in (None, engine))
    custom = client.forward_backward_custom(data, lambda d, lp: (dpo(d, lp), {})).result()
    expected = gradients(client)
    for one in (client, narrow):
        named = one.forward_backward(data, "dpo").result()
        assert named.metrics["loss:sum"] == pytest.approx(
            custom.metrics["custom_loss:sum"], rel=1e-5
        )
        assert named.metrics["pairs:sum"] == 2
        assert_close(gradients(one), expected)
    objective = objective_of("dpo", None)
    documents = [document_of(d, narrow._built, objective, n // 2) for n, d in enumerate(data)]
    assert len(narrow._engine.plan(documents)) == 2
    with pytest.raises(DataError, match="reads pairs, chosen and rejected by turns"):
        client.forward_backward(data[:3], "dpo")


def test_soft_targets_are_weighted_sums_and_are_filled_up(make: Make) -> None:
    """Two targets with half a weight each, beside a datum with one."""
    client = make(encoders={}, train=("language",))
    tokens = [7, 9, 30]
    soft = Datum(
        ModelInput.from_ints(tokens),
        {"target_tokens": [[9, 11], [30, 12], [5, 6]], "weights": np.full((3, 2), 0.5)},
    )
    hard = Datum(ModelInput.from_ints(tokens), {"target_tokens": [9, 30, 5]})
    other = Datum(ModelInput.from_ints(tokens), {"target_tokens": [11, 12, 6]})
    output = client.forward_backward([soft, hard]).result()
    mixed = gradients(client)
    assert output.loss_fn_outputs[0]["logprobs"].shape == [3, 2]
    half = {"weights": np.full(3, 0.5)}
    apart = [
        Datum(d.model_input, {**d.loss_fn_inputs, **half}) for d in (hard, other)
    ]  # fmt: skip
    sums = client.forward_backward([*apart, hard]).result()
    assert output.metrics["loss:sum"] == pytest.approx(sums.metrics["loss:sum"], rel=1e-5)
    assert_close(mixed, gradients(client))


def test_a_loss_of_one_s_own_is_a_function(make: Make) -> None:
    client = make(encoders={}, train=("language",))
    data = data_with(weights=some)

    def twice(batch: LossBatch) -> Tensor:
        return batch.per_document(-2 * batch.weights * batch.logprobs)

    own = client.forward_backward(data, twice).result()
    found = gradients(client)
    plain = client.forward_backward(data).result()
    assert own.metrics["loss:sum"] == pytest.approx(2 * plain.metrics["loss:sum"], rel=1e-5)
    assert_close(found, {name: 2 * g for name, g in gradients(client).items()})
    with pytest.raises(ConfigError, match="a name, a Loss or a function; it is 7"):
        client.forward_backward(data, 7)  # type: ignore[arg-type]


def test_terms_pull_towards_a_reference_and_towards_spread(make: Make) -> None:
    client = make(encoders={}, train=("language",))
    data = data_with(**POLICY, reference_logprobs=near, weights=ones)
    plain = client.forward_backward(data, "importance_sampling").result().metrics["loss:sum"]
    gradients(client)
    with_kl = client.forward_backward(
        data, "importance_sampling", {"kl_coefficient": 0.5, "entropy_coefficient": 0.25}
    ).result()
    assert gradients(client)
    forward = client.forward(data, "importance_sampling").result()
    difference = 0.0
    for datum, row in zip(data, forward.loss_fn_outputs, strict=True):
        d = t(datum, "reference_logprobs") - row["logprobs"].to_torch()
        difference += 0.5 * float((d.exp() - 1 - d).sum())
    entropy = (plain + difference - with_kl.metrics["loss:sum"]) / 0.25
    assert 0 < entropy < sum(LENGTHS) * np.log(400)


def test_what_a_loss_cannot_use_is_refused_at_once(make: Make, samples: list[Sample]) -> None:
    client = make()
    data = data_with(**POLICY)
    bare = data_with(advantages=signed)
    with pytest.raises(UnknownNameError, match="'ppoo'; did you mean 'ppo'"):
        client.forward_backward(data, "ppoo")
    with pytest.raises(UnknownNameError, match="did you mean 'clip_low_threshold'"):
        client.forward_backward(data, "ppo", {"clip_low": 0.1})
    with pytest.raises(DataError, match="logprobs is missing"):
        client.forward_backward(bare, "ppo")
    with pytest.raises(UnknownNameError, match="input of loss 'cross_entropy' 'advantages'"):
        client.forward_backward(bare)
    picture = ImageChunk(Image(np.zeros((8, 8, 3), dtype=np.uint8)))
    mixed = ModelInput((picture,)).append_int(5)
    inputs = {"target_tokens": [0, 0, 0, 5, 9], "logprobs": [0.0] * 5,
              "advantages": [0, 1.0, 0, 1.0, 1.0]}  # fmt: skip
    with pytest.raises(DataError, match="next one is media"):
        client.forward_backward([Datum(mixed, inputs)], "ppo")
    wide = Datum(ModelInput.from_ints([5]), {"target_tokens": [[1, 2]], "weights": [1.0],
                                             "target_logprobs": [[-1.0, -2.0]]})  # fmt: skip
    wider = Datum(ModelInput.from_ints([5]), {"target_tokens": [[1, 2, 3]], "weights": [1.0],
                                              "target_logprobs": [[-1.0, -2.0, -3.0]]})  # fmt: skip
    with pytest.raises(DataError, match=r"some have \(2,\) and some \(3,\)"):
        client.forward_backward([wide, wider], "distillation")
    client.forward_backward([wide], "distillation").result()
    with pytest.raises(ConfigError, match="must return a scalar tensor"):
        client.forward_backward_custom(data_with(weights=some), lambda _, lp: (lp[0], {}))

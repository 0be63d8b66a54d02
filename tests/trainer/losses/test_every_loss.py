"""What must hold for every registered loss."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plait.errors import ConfigError, UnknownNameError
from plait.loss_inputs import INPUTS
from plait.trainer import losses
from plait.trainer.losses import (
    LOSSES,
    Loss,
    LossBatch,
    config_of,
    loss_named,
    register,
    registry,
)

README = Path(registry.__file__).with_name("README.md")
SOFT = {"cross_entropy": None, "distillation": 4}
EVERY = sorted(LOSSES)
TERMS = {"kl_coefficient": 0.3, "entropy_coefficient": 0.2}


@pytest.fixture
def registered() -> Any:
    """Forget what a test registers."""
    names, inputs = dict(LOSSES), dict(INPUTS)
    yield
    for table, before in ((LOSSES, names), (INPUTS, inputs)):
        for name in table.keys() - before.keys():
            del table[name]


def given(name: str) -> dict[str, float]:
    return TERMS if "kl_coefficient" in loss_named(name).defaults else {}


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_is_the_sum_of_its_documents(name: str, make: Any, alone: Any) -> None:
    """No document's loss or gradient depends on its neighbours; a pair's on its partner alone."""
    case = make(name, targets=SOFT.get(name), given=given(name))
    upstream = torch.linspace(1, 3, len(case.batch.lengths))
    whole, gradient = case.evaluate(upstream)
    together = 2 if loss_named(name).paired else 1
    values, slopes = [], []
    for first in range(0, len(upstream), together):
        one = alone(case, first, first + together)
        value, slope = one.evaluate(upstream[first : first + together])
        values.append(value)
        slopes.append(slope)
    assert whole.shape == upstream.shape
    # The vectorised exp may differ from the scalar one in the last bit.
    torch.testing.assert_close(torch.cat(values), whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.cat(slopes), gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", EVERY)
def test_documents_without_positions_have_no_loss(name: str, make: Any) -> None:
    case = make(name, (0, 0), targets=SOFT.get(name), given=given(name))
    losses, gradient = case.evaluate(torch.ones(2))
    # Of a pair about which nothing is said, the two answers are equally good.
    expected = [float(np.log(2)), 0] if name == "dpo" else [0, 0]
    assert losses.tolist() == pytest.approx(expected)
    assert len(gradient) == 0


@pytest.mark.parametrize("name", EVERY)
def test_a_position_without_weight_adds_nothing(name: str, make: Any) -> None:
    case = make(name, targets=SOFT.get(name), given=given(name))
    case.batch.weights[::2] = 0
    _, gradient = case.evaluate(torch.ones(len(case.batch.lengths)))
    assert not gradient[::2].any()
    assert gradient[1::2].any()


@pytest.mark.parametrize("name", EVERY)
def test_metrics_are_numbers_of_documents_without_a_graph(name: str, make: Any) -> None:
    case = make(name, targets=SOFT.get(name), given=given(name))
    for key, values in loss_named(name).metrics(case.batch).items():
        assert ":" not in key
        assert values.shape == case.batch.lengths.shape
        assert values.dtype == torch.float32
        assert not values.requires_grad


@pytest.mark.parametrize("name", EVERY)
def test_a_loss_names_inputs_and_keys_that_exist(name: str) -> None:
    loss = loss_named(name)
    assert loss.name == name
    assert {*loss.inputs, *loss.optional, *loss.per_target} <= INPUTS.keys()
    assert {*loss.reads_with.values()} <= {*loss.optional}
    assert config_of(loss, dict(loss.defaults)) == loss.defaults


def test_sums_are_taken_in_float64_and_have_a_gradient() -> None:
    """A float32 sum of a long document would stall where its terms are below its last bit."""
    count = 2**14
    values = torch.full((count + 3,), 1e-4)
    values[0] = 2.0**14
    values.requires_grad_()
    batch = batch_of(values, [count, 0, 3])
    sums = batch.per_document(values)
    assert sums[0].item() == pytest.approx(2.0**14 + (count - 1) * 1e-4, abs=2e-3)
    assert sums.dtype == torch.float32
    assert sums[1].item() == 0
    (gradient,) = torch.autograd.grad(sums @ torch.tensor([1.0, 5.0, 7.0]), values)
    assert gradient.tolist() == [1] * count + [7] * 3


def test_sums_of_soft_targets_take_all_of_them() -> None:
    values = torch.arange(12.0).reshape(4, 3).requires_grad_()
    sums = batch_of(values, [3, 1]).per_document(values)
    assert sums.tolist() == [36, 30]
    (gradient,) = torch.autograd.grad(sums.sum(), values)
    assert gradient.shape == (4, 3)
    assert bool((gradient == 1).all())


def test_a_document_s_value_is_spread_as_a_constant() -> None:
    values = torch.tensor([1.0, 2.0, 3.0]).requires_grad_()
    spread = batch_of(torch.zeros(5), [2, 0, 3]).spread(values)
    assert spread.tolist() == [1, 1, 3, 3, 3]
    assert not spread.requires_grad


def test_a_document_without_a_partner_is_refused(make: Any) -> None:
    case = make("dpo", (2, 3, 4))
    with pytest.raises(ValueError, match=r"even number of documents.*it was given 3"):
        case.evaluate(torch.ones(3))


def batch_of(logprobs: torch.Tensor, lengths: list[int]) -> LossBatch:
    return LossBatch(logprobs, torch.ones(len(logprobs)), {}, torch.tensor(lengths), {})


def test_an_unknown_loss_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match=r"loss 'importance_samplin'.*'importance_sampling'"):
        loss_named("importance_samplin")


def test_a_loss_of_one_s_own_is_added_in_ten_lines(
    registered: None, make: Any, agrees: Callable[..., None]
) -> None:
    """The README's block runs as it stands, and is the published formula."""
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(block, str(README), "exec"), {})
    case = make("ipo", (3, 2, 1, 0), given={"beta": 0.4})
    value, _ = case.evaluate(torch.ones(4))
    ratios = [
        sum(
            w * (lp - ref)
            for w, lp, ref in zip(d["w"], d["lp"], d["reference_logprobs"], strict=True)
        )
        for d in case.documents()
    ]
    expected = [(ratios[i] - ratios[i + 1] - 1 / (2 * 0.4)) ** 2 for i in (0, 2)]
    assert value.tolist() == pytest.approx([expected[0], 0, expected[1], 0], rel=1e-5)


def test_a_taken_name_is_refused_and_new_inputs_become_known(registered: None) -> None:
    def scaled(batch: LossBatch) -> torch.Tensor:
        return batch.per_document(-batch.logprobs * batch.inputs["scale"])

    with pytest.raises(ConfigError, match="'ppo' is taken"):
        register(Loss(name="ppo", function=scaled, inputs=("scale",)))
    assert "scale" not in INPUTS
    assert register(Loss(name="scaled", function=scaled, inputs=("scale",))) is LOSSES["scaled"]
    assert INPUTS["scale"] == losses.INPUTS["scale"] == "float32"


@pytest.mark.parametrize("convert", [np.array, torch.tensor])
def test_without_weights_every_position_is_learned(convert: Any) -> None:
    loss = Loss(name="scaled", function=lambda batch: batch.logprobs, inputs=("scale",))
    for scale in ([0.0, 1.0, 2.0], [[0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]):
        assert loss.learned({"scale": convert(scale)}, {}).tolist() == [True] * 3

"""What travels between a loop and the engine: the Tinker API's names, defaults and refusals."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from plait.errors import ConfigError, DataError, UnknownNameError
from plait.modalities import Image
from plait.types import (
    AdamParams,
    Datum,
    EncodedTextChunk,
    ImageChunk,
    ModelInput,
    SamplingParams,
    TensorData,
)


def test_adam_defaults_are_tinkers() -> None:
    params = AdamParams()
    assert params.learning_rate == 1e-4
    assert (params.beta1, params.beta2, params.eps) == (0.9, 0.95, 1e-12)
    assert params.weight_decay == 0.0
    assert params.grad_clip_norm == 0.0


@pytest.mark.parametrize(("name", "wrong"), [
    ("learning_rate", [math.nan, -1e-4, math.inf, "fast", None]),
    ("beta1", [1.0, -0.1, math.nan]),
    ("beta2", [1.0, -0.1, math.nan]),
    ("eps", [0.0, -1e-8, math.nan]),
    ("weight_decay", [-0.1, math.nan]),
    ("grad_clip_norm", [-1.0, math.nan]),
])  # fmt: skip
def test_adam_settings_have_ranges(name: str, wrong: list[Any]) -> None:
    for value in wrong:
        with pytest.raises(ConfigError, match=f"{name} must be a number"):
            AdamParams(**{name: value})
    with pytest.raises(ConfigError, match=r"part_learning_rates.*must be a number of at least 0"):
        AdamParams(part_learning_rates={"projector": math.nan})


def test_sampling_defaults_are_tinkers() -> None:
    params = SamplingParams()
    assert (params.max_tokens, params.seed, params.stop) == (None, None, None)
    assert (params.temperature, params.top_k, params.top_p) == (1, -1, 1)


def test_stops_are_texts_or_token_ids() -> None:
    assert SamplingParams(stop="\n").stop == ("\n",)
    assert SamplingParams(stop=["\n", "User:"]).stop == ("\n", "User:")
    assert SamplingParams(stop=[2, 5]).stop == (2, 5)
    assert SamplingParams(stop=np.array([2, 5])).stop == (2, 5)
    assert SamplingParams(stop=[]).stop == SamplingParams(stop=()).stop == ()
    for wrong in ("", [""], [2, "x"], [-1], [1.5], [True], b"ab", 7, [None]):
        with pytest.raises(ConfigError, match="stop must be a text, texts or token ids"):
            SamplingParams(stop=wrong)  # type: ignore[arg-type]  # that is refused


@pytest.mark.parametrize(("name", "wrong"), [
    ("max_tokens", [0, -1, 1.5, "10", True]),
    ("seed", [-1, 0.5, "x"]),
    ("temperature", [-1, math.nan, math.inf, None]),
    ("top_k", [0, -2, 1.5]),
    ("top_p", [0, 1.1, math.nan]),
])  # fmt: skip
def test_sampling_settings_have_ranges(name: str, wrong: list[Any]) -> None:
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"{name}.* must be a (whole )?number"):
            SamplingParams(**{name: value})


def test_tensor_data_keeps_type_and_shape() -> None:
    whole = TensorData.from_numpy(np.arange(3, dtype=np.int32))
    assert (whole.dtype, whole.shape, whole.tolist()) == ("int64", [3], [0, 1, 2])
    real = TensorData.from_torch(torch.tensor([0.5, 2.0], dtype=torch.bfloat16))
    assert (real.dtype, real.tolist()) == ("float32", [0.5, 2.0])
    again = real.to_torch()
    again += 1
    assert real.tolist() == [0.5, 2.0], "a tensor made from data must not share it"


def test_model_input_grows_by_copies() -> None:
    start = ModelInput.from_ints([1, 2])
    longer = start.append_int(3)
    assert (start.to_ints(), longer.to_ints(), longer.length) == ([1, 2], [1, 2, 3], 3)
    assert ModelInput.empty().length == 0


def test_a_pictures_length_is_the_models_to_say() -> None:
    picture = Image(np.zeros((4, 4, 3), dtype=np.uint8))
    with pytest.raises(ConfigError, match="set expected_tokens"):
        _ = ModelInput((ImageChunk(picture),)).length
    mixed = ModelInput((EncodedTextChunk((1,)), ImageChunk(picture, expected_tokens=4)))
    assert mixed.length == 5
    with pytest.raises(ConfigError, match="only token ids"):
        mixed.to_ints()


def test_a_datum_takes_lists_arrays_and_tensors() -> None:
    for values in ([1, 2], np.array([1, 2]), torch.tensor([1, 2]), TensorData.from_numpy(
        np.array([1, 2])
    )):  # fmt: skip
        datum = Datum(ModelInput.from_ints([0, 1]), {"target_tokens": values})
        assert datum.loss_fn_inputs["target_tokens"].tolist() == [1, 2]
        assert datum.loss_fn_inputs["target_tokens"].dtype == "int64"


def test_an_unknown_loss_input_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'target_tokens'"):
        Datum(ModelInput.from_ints([0]), {"target_token": [1]})


def test_loss_inputs_have_a_value_per_position_or_per_target() -> None:
    datum = Datum(ModelInput.from_ints([0]), {"target_tokens": [[1, 2]]})
    assert datum.loss_fn_inputs["target_tokens"].shape == [1, 2]
    with pytest.raises(DataError, match=r"or one per target of it; its shape is \[1, 1, 2\]"):
        Datum(ModelInput.from_ints([0]), {"target_tokens": [[[1, 2]]]})

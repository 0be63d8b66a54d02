"""What a call is given: what stands for what, and what is refused, by name and at once."""

import asyncio
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plait.cli import main as plait_command
from plait.client import TrainingClient
from plait.errors import CheckpointError, ConfigError, DataError, ModelError, UnknownNameError
from plait.modalities import Image, Text
from plait.stream import Message, Sample
from plait.trainer.engine import commands
from plait.trainer.losses import Loss
from plait.types import AdamParams, Datum, ImageChunk, ModelInput, SamplingParams, TensorData

TEXT = ModelInput.from_ints([5, 9, 12])


def datum(**inputs: Any) -> Datum:
    return Datum(TEXT, {"target_tokens": [9, 12, 6], **inputs})


def test_a_text_is_a_message_s_part(make: Any) -> None:
    assert Message("user", "hi") == Message("user", (Text("hi"),))  # type: ignore[arg-type]
    picture = Image(np.zeros((8, 8, 3), dtype=np.uint8))
    assert Message("user", [picture, "what?"]).parts == (picture, Text("what?"))  # type: ignore[arg-type, list-item]
    assert Message("user", picture).parts == (picture,)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"made of texts and media parts; 7 is neither"):
        Message("user", (7,))  # type: ignore[arg-type]
    client = make()
    spelt = client.datum(Sample((Message("user", "a shape"), Message("assistant", "a disc"))))
    whole = Sample((Message("user", (Text("a shape"),)), Message("assistant", (Text("a disc"),))))
    assert spelt.model_input == client.datum(whole).model_input


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (datum(), "a list of Datum; they were given as Datum"),
        ({"a": datum()}, "given as dict"),
        ("text", "given as str"),
        (None, "given as NoneType"),
        ([datum(), TEXT], "datum 1: data are a list of Datum, and this is a ModelInput"),
        ([datum(), Datum(TEXT)], "datum 1: it needs target_tokens"),
        ((), "at least one datum"),
    ],
)
def test_data_are_a_list_of_datum(make: Any, data: Any, match: str) -> None:
    client: TrainingClient = make()
    for call in (client.forward, client.forward_backward):
        with pytest.raises(DataError, match=match):
            call(data)
    with pytest.raises(DataError, match=match):
        client.forward_backward_custom(data, lambda _, lp: (lp[0].sum(), {}))


def test_what_is_wrong_with_one_datum_is_said_of_it(make: Any) -> None:
    client: TrainingClient = make(train=("projector", "language"))
    with pytest.raises(DataError, match="datum 1: weights needs one value per position"):
        client.forward_backward([datum(), datum(weights=[1.0])])
    picture = ImageChunk(Image(np.zeros((8, 8, 3), dtype=np.uint8)), expected_tokens=77)
    odd = Datum(ModelInput((picture,)).append_int(5), {"target_tokens": [0, 0, 0, 5, 9]})
    with pytest.raises(DataError, match="datum 2: "):
        client.forward_backward([datum(), datum(), odd])
    client.forward_backward(iter([datum(), datum()])).result()  # any iterable is a list


def test_how_to_step_and_sample_is_told_by_its_types(make: Any) -> None:
    client: TrainingClient = make()
    for wrong in (1e-4, None, {"learning_rate": 1e-4}):
        with pytest.raises(ConfigError, match=r"told by AdamParams or OptimizerParams; it was"):
            client.optim_step(wrong)  # type: ignore[arg-type]
    here, params = client.save_weights_and_get_sampling_client(), SamplingParams(max_tokens=1)
    for prompt in ("a text", [5, 6], None):
        with pytest.raises(ConfigError, match=r"a prompt is a ModelInput; it was given as"):
            here.sample(prompt, 1, params)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"a prompt is a ModelInput; it was given as"):
            here.compute_logprobs(prompt)  # type: ignore[arg-type]
    for odd in (None, AdamParams()):
        with pytest.raises(ConfigError, match=r"told by SamplingParams; it was given"):
            here.sample(TEXT, 1, odd)  # type: ignore[arg-type]


def test_a_custom_loss_returns_a_finite_loss_and_metrics(make: Any) -> None:
    client: TrainingClient = make()
    with pytest.raises(ConfigError, match=r"two things: a scalar tensor, and metrics, .* returned"):
        client.forward_backward_custom([datum()], lambda _, lp: lp[0].sum())  # type: ignore[arg-type, return-value]
    infinite = [datum(), datum()]
    with pytest.raises(ConfigError, match=r"finite derivatives; .* of datum 1 are not"):
        client.forward_backward_custom(
            infinite, lambda _, lp: (lp[0].sum() + (lp[1] * math.inf).sum(), {})
        )
    with pytest.raises(ModelError, match="optim_step needs gradients"):
        client.optim_step(AdamParams()).result()


def test_a_loss_without_settings_says_so(make: Any) -> None:
    plain = Loss(name="plain", function=lambda b: b.per_document(-b.logprobs), inputs=())
    with pytest.raises(UnknownNameError, match="unknown key of loss 'plain' 'beta'; there are no"):
        make().forward_backward([datum()], plain, {"beta": 1.0})


def test_the_names_with_async_give_what_the_tinker_api_gives(make: Any) -> None:
    """Training calls give a future, so that the next can be sent; sampling gives the result."""
    client: TrainingClient = make()
    here = client.save_weights_and_get_sampling_client()
    params = SamplingParams(max_tokens=3, temperature=0)

    async def main() -> None:
        done = await client.forward_backward_async([datum()])
        step = await client.optim_step_async(AdamParams())
        assert (await done).metrics["loss:sum"] > 0 and (await step).metrics
        response = await here.sample_async(TEXT, 2, sampling_params=params)
        assert len(response.sequences) == 2
        assert len(await here.compute_logprobs_async(TEXT)) == 3

    asyncio.run(main())


def test_a_prompt_as_long_as_the_context_is_scored(make: Any) -> None:
    client: TrainingClient = make(encoders={}, train=("language",))
    here = client.save_weights_and_get_sampling_client()
    context = client._built.model.backbone.context
    assert context is not None
    ids = np.random.default_rng(0).integers(1, 40, context).tolist()
    scores = here.compute_logprobs(ModelInput.from_ints(ids)).result()
    data = [Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:]})]
    expected = client.forward(data).result().loss_fn_outputs[0]["logprobs"].tolist()
    assert scores[0] is None and scores[1:] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(DataError, match=f"context of {context} tokens; this asks for"):
        here.compute_logprobs(ModelInput.from_ints([*ids, 1])).result()


def test_likeliest_tokens_that_were_asked_for_are_there(make: Any) -> None:
    """Also of a prompt that has none."""
    here = make().save_weights_and_get_sampling_client()
    one, params = ModelInput.from_ints([5]), SamplingParams(max_tokens=1)
    assert here.sample(one, 1, params, False, 2).result().topk_prompt_logprobs == [None]
    assert here.sample(one, 1, params, True).result().topk_prompt_logprobs is None


def test_weights_alone_say_what_they_are_for(make: Any) -> None:
    client: TrainingClient = make()
    path = client.save_weights_for_sampler("light").result().path
    with pytest.raises(CheckpointError, match="load_state, or create_training_client_from_state"):
        client.load_state_with_optimizer(path).result()


def test_info_reads_a_path_of_the_store(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make().save_state("kept").result().path
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "runs").symlink_to(tmp_path / "states")
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path / "home"))
    assert plait_command(["info", path]) == 0
    shown = capsys.readouterr().out
    assert path in shown and "state.json" in shown
    assert plait_command(["info", path + "x"]) == 2
    assert "is neither a checkpoint nor" in capsys.readouterr().err


def test_a_run_that_goes_takes_nothing_from_another(make: Any, recwarn: Any) -> None:
    """peft would make another adapter the active one, and freeze all others."""
    client: TrainingClient = make(encoders={}, train=("language",))
    engine, built = client._engine, client._built
    stays, gone = (engine.create_run(built.spec, seed, built.limits)[0] for seed in (1, 2))
    run = engine.executor.run(stays)
    for name in (client._run, gone):
        engine.submit(commands.DropRun(name)).result()
    assert all(parameter.requires_grad for *_, parameter in run.trainable)
    assert not [one for one in recwarn if "now deleted" in str(one.message)]


def test_numbers_of_any_kind_are_settings(make: Any) -> None:
    """What one asks for reaches no other: torch knows neither fractions nor endless numbers."""
    client = make()
    here = client.save_weights_and_get_sampling_client()
    prompt = client.prompt(Text("which: "))
    for odd in (
        SamplingParams(seed=1, max_tokens=3, temperature=Fraction(1, 2)),
        SamplingParams(seed=1, max_tokens=3, top_k=10**30, top_p=0.9),
        SamplingParams(seed=1, max_tokens=3, temperature=1e39, min_p=Fraction(1, 3)),
    ):
        assert len(here.sample(prompt, 1, odd).result().sequences[0].tokens) <= 3


def test_targets_are_whole_numbers() -> None:
    for wrong in ([6.5, 7, 8], ["6", "7", "8"], "abc"):
        with pytest.raises(DataError, match="loss input 'target_tokens' must be whole numbers"):
            Datum(ModelInput.from_ints([5, 6, 7]), {"target_tokens": wrong})
    with pytest.raises(DataError, match=r"must be whole numbers; it holds 1\.5"):
        Datum(ModelInput.from_ints([5]), {"target_tokens": TensorData(np.array([1.5]))})
    with pytest.raises(DataError, match=r"must be whole numbers; it holds 1\.5"):
        Datum(ModelInput.from_ints([5]), {"target_tokens": torch.tensor([1.5])})
    weights = Datum(TEXT, {"weights": TensorData(np.array([1, 0, 2]), "int64")}).loss_fn_inputs
    assert weights["weights"].dtype == "float32"
    with pytest.raises(DataError, match="loss input 'weights' must be numbers"):
        Datum(ModelInput.from_ints([5]), {"target_tokens": [6], "weights": ["1"]})


def test_a_loss_of_one_s_own_is_told_what_it_must_return(make: Any, samples: list[Sample]) -> None:
    client = make()
    data = [client.datum(sample) for sample in samples[:2]]
    for wrong in (lambda batch: batch.logprobs.sum(), lambda _: 3.0):
        with pytest.raises(ModelError, match=r"one number per document, shape \(2,\)"):
            client.forward(data, wrong).result()

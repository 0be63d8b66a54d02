"""QLoRA: a frozen language model in 4 bits, with bitsandbytes itself where it is installed."""

import io
import json
import shutil
import sys
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from plait.client import ServiceClient
from plait.errors import CheckpointError, ConfigError, UnknownNameError
from plait.modalities import Limits
from plait.stream import TokenStream, pack
from plait.trainer import checkpoint, export
from plait.trainer.build import Built, attach, build, load_base, parameter_counts
from plait.trainer.config import load_config
from plait.trainer.engine.controller import Engine
from plait.trainer.engine.runs import Run
from plait.trainer.manifest import read_manifest
from plait.trainer.optimiser import StepSettings
from plait.trainer.ranks.sharding import refuse_unsharded
from plait.trainer.run import train
from plait.trainer.source import Source
from plait.trainer.spec import LoraSpec, ModelSpec
from plait.trainer.store import Store
from plait.trainer.together import Part, computed
from plait.types import AdamParams, Datum, ModelInput

quantizes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install -c constraints.txt -e '.[qlora]'",
)


def four_bit(built: Built) -> dict[str, Any]:
    language = built.model.language
    return {n: m for n, m in language.named_modules() if type(m).__module__.startswith("bits")}


def plain_again(built: Built) -> None:
    """Put an ordinary linear layer of what 4 bits left in the place of each quantized one."""
    from bitsandbytes.functional import dequantize_4bit

    for name, layer in four_bit(built).items():
        weight = dequantize_4bit(layer.weight, layer.weight.quant_state)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
        plain.weight = nn.Parameter(weight.float(), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(built.model.language.get_submodule(parent), last, plain)


def frozen_bytes(built: Built) -> int:
    return sum(p.nbytes for p in built.base.backbone.language.parameters() if not p.requires_grad)


def test_what_cannot_be_quantized_is_refused(tiny_language: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"model\.quantize 'nf5'.*did you mean 'nf4'"):
        ModelSpec(language="x", quantize="nf5")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"4 bits cannot train: .*set model\.lora, leave"):
        ModelSpec(language="x", quantize="nf4", lora=None)
    ModelSpec(language="x", quantize="nf4", lora=None, train=("projector",))
    spec = ModelSpec(language=str(tiny_language), quantize="nf4")
    with pytest.raises(ConfigError, match=r"'nf4' needs whole weights.*use 'ddp'"):
        refuse_unsharded(spec)
    refuse_unsharded(replace(spec, quantize=None))
    shutil.copytree(tiny_language, tmp_path / "done")
    config = json.loads((tmp_path / "done" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "done" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"not quantized, and those of .*\(gptq\): name the orig"):
        load_base(replace(spec, language=str(tmp_path / "done")))


def test_without_bitsandbytes_the_remedy_is_told(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"not installed: pip install -c constraints.txt -e '.\[qlora\]'"
    ):
        lab.build(quantize="nf4")


def test_a_checkpoint_of_other_weights_is_refused(lab: Any, tmp_path: Path) -> None:
    built = lab.build()
    checkpoint.save(tmp_path / "one", built)
    here = replace(built, spec=replace(built.spec, quantize="nf4"))
    with pytest.raises(CheckpointError, match="of quantize None and this model has quantize nf4"):
        checkpoint.load(tmp_path / "one", here)


def test_a_recipe_says_it_by_name(tiny_recipe: Path) -> None:
    assert load_config(tiny_recipe, ["model.quantize=nf4"]).model.quantize == "nf4"
    assert load_config(tiny_recipe).model.quantize is None
    with pytest.raises(ConfigError, match="quantize"):
        load_config(tiny_recipe, ["model.quantize=int4"])


@quantizes
def test_only_linear_layers_are_in_4_bits_and_counts_are_the_same(lab: Any) -> None:
    built, whole = lab.build(quantize="nf4"), lab.build()
    assert len(four_bit(built)) == 2 * 7
    for layer in four_bit(built).values():
        state = layer.weight.quant_state
        assert (layer.weight.dtype, state.quant_type, state.nested) == (torch.uint8, "nf4", True)
    assert type(built.model.language.get_output_embeddings()) is nn.Linear
    assert parameter_counts(built.model) == parameter_counts(whole.model)
    tied = whole.base.backbone.output_weight.nbytes
    assert frozen_bytes(built) - tied < 0.15 * (frozen_bytes(whole) - tied)


@quantizes
@pytest.mark.parametrize("lora", [LoraSpec(rank=4), LoraSpec(rank=3, dora=True)])
def test_a_packed_row_equals_ordinary_layers_of_the_same_weights(lab: Any, lora: LoraSpec) -> None:
    """Losses and gradients; with a plain adapter the layers are grouped, so that nothing warns."""
    with warnings.catch_warnings():
        if not lora.dora:
            warnings.filterwarnings("error", "LoRA layers of kind")
        built = lab.build(quantize="nf4", lora=lora)
        stream = lab.stream(built, lab.samples)
        losses, gradient = lab.gradients(built, [stream])
    assert built.model.backbone.packs
    assert built.model.backbone.packing_difference < 1e-5
    built.model.backbone.shared.remove()
    built.model.backbone.shared = None
    plain_again(built)
    expected, true = lab.gradients(built, [stream])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    assert (gradient - true).norm() <= 1e-5 * true.norm()


@quantizes
def test_runs_of_one_row_are_as_if_they_were_alone(lab: Any) -> None:
    first = lab.build(quantize="nf4")
    spec = replace(first.spec, lora=LoraSpec(rank=2, targets=("q_proj", "down_proj")))
    second = attach(first.base, spec, 1, adapter="other")
    generator = torch.Generator().manual_seed(2)
    for _, name, parameter in second.model.trainable():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    pairs = [(first, lab.stream(first, lab.samples[:2])), (second, lab.stream(second, lab.samples))]

    def gradients(parts: list[tuple[Built, Any]]) -> list[Tensor]:
        for built, _ in parts:
            built.model.zero_grad(set_to_none=True)
        with computed([Part(built.model, stream) for built, stream in parts]) as sums:
            torch.stack([one.loss for one in sums]).sum().backward()  # type: ignore[no-untyped-call]
        return [
            torch.cat([p.grad.double().flatten() for *_, p in built.model.trainable()])
            for built, _ in parts
        ]

    alone = [gradients([pair])[0].clone() for pair in pairs]
    for mine, expected in zip(gradients(pairs), alone, strict=True):
        assert (mine - expected).norm() <= 1e-5 * expected.norm()


def losses_of(run: Run, stream: TokenStream) -> list[float]:
    """Of twenty steps."""
    losses = []
    for _ in range(20):
        run.train(True)
        run.begin()
        sums = run.model.compute(stream)
        sums.loss.backward()  # type: ignore[no-untyped-call]
        run.add(sums)
        run.finish()
        losses.append(float(sums.loss.detach()))
        run.step(StepSettings(learning_rate=1e-2), divide_by_weight=True)
    return losses


@quantizes
def test_it_learns_and_what_samples_is_what_trains(lab: Any) -> None:
    """As much as 32 bits do; and in evaluation, where some CPUs would multiply in bfloat16."""
    built, whole = (build(lab.spec(quantize=bits), seed=0) for bits in ("nf4", None))
    frozen = {name: layer.weight.clone() for name, layer in four_bit(built).items()}
    run, stream = Run("one", built), lab.stream(built, lab.samples)
    mine, theirs = losses_of(run, stream), losses_of(Run("two", whole), stream)
    assert mine[0] - mine[-1] > 0.8 * (theirs[0] - theirs[-1]) > 2
    assert all(torch.equal(four_bit(built)[name].weight, kept) for name, kept in frozen.items())
    training = built.model.compute(stream).logprobs.detach()
    run.train(False)
    with torch.inference_mode():
        evaluated = built.model.compute(stream).logprobs
    torch.testing.assert_close(evaluated, training, rtol=1e-5, atol=1e-5)


@quantizes
def test_weights_do_not_depend_on_what_the_run_computes_in(lab: Any) -> None:
    whole, half = lab.build(quantize="nf4"), lab.build(quantize="nf4", dtype="bfloat16")
    assert half.base.backbone.output_weight.dtype == torch.bfloat16
    for name, layer in four_bit(whole).items():
        other = four_bit(half)[name]
        assert torch.equal(layer.weight, other.weight)
        assert other.compute_dtype == other.weight.quant_state.dtype == torch.bfloat16
    document = lab.documents(half, lab.samples[2:3])[0]
    sums = half.model.compute(pack(document, [[]]))
    sums.loss.backward()
    assert {p.dtype for _, _, p in half.model.trainable()} == {torch.float32}


@quantizes
def test_runs_of_other_bits_do_not_share_a_language_model(lab: Any) -> None:
    engine = Engine()
    specs = [lab.spec(quantize="nf4"), lab.spec(), lab.spec(quantize="nf4")]
    four, plain, same = (engine.create_run(spec, 0, Limits())[1] for spec in specs)
    assert four.base is same.base and four.base is not plain.base
    assert four_bit(four) and not four_bit(plain)
    engine.close()


@quantizes
@pytest.mark.parametrize(("merge", "dtype"), [(False, None), (True, None), (True, "bfloat16")])
def test_an_export_has_the_weights_that_were_trained_on(
    lab: Any, tmp_path: Path, merge: bool, dtype: str | None
) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint.save(tmp_path / "one", lab.build(quantize="nf4", dtype="bfloat16"))
    manifest = read_manifest(tmp_path / "one")
    assert manifest["spec"]["quantize"] == "nf4" and "bitsandbytes" in manifest["versions"]
    source = Source(Store(tmp_path / "store"), str(tmp_path / "one"))
    done = export.export(source, tmp_path / "out", merge=merge, dtype=dtype)
    assert done.compared.mean_difference < 0.5 * done.compared.trained_change
    if merge:
        language = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert not hasattr(language.config, "quantization_config")
        assert language.dtype == torch.bfloat16
    else:
        assert done.compared.largest_difference < 1e-4 * done.compared.largest_logit


@quantizes
def test_a_client_saves_loads_and_samples_on_4_bits(tiny_language: Path, tmp_path: Path) -> None:
    service = ServiceClient(tmp_path)
    options: dict[str, Any] = {"rank": 4, "train": ("language",), "quantize": "nf4"}
    client = service.create_lora_training_client(str(tiny_language), **options)
    tokens = client.get_tokenizer()("a red disc and a blue bar").input_ids
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    data = [Datum(ModelInput.from_ints(tokens[:-1]), inputs)]
    client.forward_backward(data).result()
    client.optim_step(AdamParams(learning_rate=1e-2)).result()
    path = client.save_state("one").result().path
    trained = client.forward(data).result().loss_fn_outputs[0]["logprobs"].to_numpy()
    again = service.create_training_client_from_state(path)
    assert again._built.spec.quantize == "nf4"
    loaded = again.forward(data).result().loss_fn_outputs[0]["logprobs"].to_numpy()
    assert (trained == loaded).all()
    sampler = service.create_sampling_client(path)
    scores = sampler.compute_logprobs(ModelInput.from_ints(tokens)).result()
    assert scores[1:] == pytest.approx(trained.tolist(), abs=1e-4)
    plain = service.create_lora_training_client(str(tiny_language), rank=4, train=("language",))
    with pytest.raises(CheckpointError, match="of quantize nf4 and this model has quantize None"):
        plain.load_state(path).result()


@quantizes
def test_a_recipe_trains_on_4_bits(tiny_recipe: Path, tmp_path: Path) -> None:
    settings = ["model.quantize=nf4", "train.steps=3", "train.validate_every=3"]
    train(load_config(tiny_recipe, settings), Console(file=io.StringIO()))
    [kept] = (tmp_path / "run" / "checkpoints").glob("best-*")
    assert read_manifest(kept)["spec"]["quantize"] == "nf4"

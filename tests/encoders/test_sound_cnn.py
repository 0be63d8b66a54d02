"""The sound-effect network equals the published one, on Essentia's spectrogram, block by block."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from plait.encoders.registry import create
from plait.encoders.sound_cnn.encoder import SoundCnn
from plait.encoders.sound_cnn.model import (
    SoundNet,
    convert_reference_state_dict,
    frame_count,
    spectrogram,
)
from plait.encoders.weights.aisfx import read_weights
from plait.encoders.weights.packages import WEIGHTS_PACKAGES
from plait.errors import ConfigError, FetchError, MediaError
from plait.modalities import AudioHeader, AudioRequest

# Essentia 2.1 on `chirp`, every ninth bin from the fourth, through the package's own function.
ESSENTIA = [
    [5.4531, 7.598, 4.3632, 3.3035, 2.4913, 1.7912, 3.5829, 0.6619, 0.316, 0.1456, 0.0889],
    [0.6956, 8.0268, 0.0948, 0.0005, 0.0, 0.0, 5.0102, 0.0, 0.0, 0.0, 0.0],
    [1.3891, 8.0268, 0.7242, 0.2356, 0.0946, 0.0608, 5.5877, 0.0071, 0.0033, 0.002, 0.0015],
    [5.3757, 7.4993, 4.5366, 3.749, 3.2829, 3.0791, 5.4475, 2.1016, 1.7372, 1.5151, 1.3953],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    save_file(SoundNet().state_dict(), made / "model.safetensors")
    (made / "config.json").write_text(json.dumps({"architecture": "aisfx"}))
    return made


def sound(samples: int, seed: int = 0) -> NDArray[np.float32]:
    noise = np.random.default_rng(seed).standard_normal(samples)
    return (0.1 * noise * np.sin(np.arange(samples) / 9_000)).astype(np.float32)


def header(samples: int, rate: int = 44_100) -> AudioHeader:
    return AudioHeader(samples=samples, rate=rate, channels=1, format="array", bytes=4 * samples)


def test_the_spectrogram_is_essentias() -> None:
    time = np.arange(3_000) / 44_100
    chirp = 0.3 * np.sin(2 * np.pi * 440 * time) + np.sin(2 * np.pi * 5_000 * time) * time
    made = spectrogram(torch.from_numpy(chirp.astype(np.float32)))
    assert made.shape == (4, 96)
    expected = torch.tensor(ESSENTIA) / 9.457798957824707
    torch.testing.assert_close(made[:, 4::9], expected, rtol=0, atol=1e-5)
    assert torch.equal(spectrogram(torch.zeros(5_000)), torch.zeros(6, 96))


@pytest.mark.parametrize(
    ("samples", "frames"), [(1, 2), (1_024, 2), (1_025, 3), (2_048, 3), (10_000, 11), (44_100, 45)]
)
def test_frames_are_counted_as_essentia_does(samples: int, frames: int) -> None:
    assert frame_count(samples) == frames == len(spectrogram(torch.zeros(samples)))


def load_reference(folder: Path, name: str) -> ModuleType:
    """A module of the package by place: the package itself needs librosa."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, folder / "aisfx" / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.weights
@pytest.mark.parametrize("hop", [0.5, 1.0])
def test_features_equal_the_reference(real_weights: Any, spoken_prompts: Any, hop: float) -> None:
    from plait.datasets.fetch import Progress, pip_package

    encoder = SoundCnn(real_weights("pip:aisfx"), hop=hop).eval()
    package = WEIGHTS_PACKAGES["aisfx"].package
    source = pip_package(package.name, package.version, package.sha256, progress=Progress())
    network, steps = (load_reference(source, f) for f in ("models/cnn2d.py", "preprocessing.py"))
    reference = network.EmbeddingNet("max", 3, 1, 64).eval()
    state = read_weights(source / "aisfx" / "models" / "checkpoint.pth")
    prefix = "embedding_net."
    reference.load_state_dict(
        {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    )
    real = np.concatenate(list(spoken_prompts.values()))
    for item in (sound(9_000), sound(102_400, 1), sound(150_000, 2), real):
        raw = spectrogram(torch.from_numpy(item)).numpy() * 9.457798957824707
        blocks = steps.blocking(
            steps.spectrogram_normalize(raw), 100, round(100 * hop), drop_partial_block=False
        )
        with torch.no_grad():
            expected = reference(torch.Tensor(blocks))
            (made,) = encoder([encoder.process(item)])
        assert made.grid == encoder.plan(header(len(item))) == (len(expected), 1, 1)
        torch.testing.assert_close(made.embeddings, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_equals_one_by_one_and_plans_equal_features(folder: Path) -> None:
    encoder = SoundCnn(folder, hop=0.25).eval()
    lengths = [1, 30_000, 101_376, 101_377, 126_976, 126_977, 200_000]
    inputs = [encoder.process(sound(samples, samples)) for samples in lengths]
    with torch.no_grad():
        together = encoder(inputs)
        alone = [encoder([item])[0] for item in inputs]
    assert [item.grid[0] for item in together] == [1, 1, 1, 2, 2, 3, 5]
    for samples, made, single in zip(lengths, together, alone, strict=True):
        facts = header(samples)
        assert made.grid == encoder.plan(facts) == (len(made.embeddings), 1, 1)
        assert made.seconds == encoder.seconds(facts, made.grid)
        torch.testing.assert_close(made.embeddings, single.embeddings, rtol=1e-5, atol=1e-5)
    assert encoder.wanted(header(5)) == AudioRequest(44_100)
    assert encoder.plan(header(11_025 * 4, rate=11_025)) == encoder.plan(header(44_100 * 4))


def test_blocks_stand_where_they_begin_and_the_last_is_filled_up(folder: Path) -> None:
    encoder = SoundCnn(folder).eval()
    item = sound(150_000)
    assert encoder.seconds(header(150_000), (2, 1, 1)) == (0.0, 50 * 1024 / 44_100)
    frames = encoder.process(item)["frames"]
    assert frames.shape == (150, 96) and not bool(frames[frame_count(150_000) :].any())
    with torch.no_grad():
        (made,) = encoder([{"frames": frames}])
        (second,) = encoder([{"frames": frames[50:]}])
    torch.testing.assert_close(made.embeddings[1], second.embeddings[0], rtol=1e-5, atol=1e-5)


def test_an_empty_sound_is_refused(folder: Path) -> None:
    encoder = SoundCnn(folder)
    with pytest.raises(MediaError, match="is empty: leave it out"):
        encoder.plan(header(0))


def test_all_of_it_trains_but_its_statistics(folder: Path) -> None:
    encoder = create("sound_cnn", weights=folder)
    before = encoder.fingerprint()
    assert not any(p.requires_grad for p in encoder.parameters())
    encoder.set_trainable(True).train()
    encoder([encoder.process(sound(40_000))])[0].embeddings.square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    assert encoder.fingerprint() == before


def test_options_are_checked_and_change_the_fingerprint(folder: Path) -> None:
    assert SoundCnn(folder).fingerprint() != SoundCnn(folder, hop=1).fingerprint()
    wrong: Any
    for wrong in (0, 1.5, -1, "half", float("nan"), True):
        with pytest.raises(ConfigError, match=r"0\.01 to 1; got"):
            SoundCnn(folder, hop=wrong)


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
    with pytest.raises(ConfigError, match="sound_cnn"):
        SoundCnn(tmp_path)


class Evil:
    """What a pickle that runs code looks like."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_no_code_of_the_pickle_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    counted = {"library": (np.int64(0), 3)}  # as the published file holds it
    torch.save(({"fc.0.weight": torch.ones(2)}, counted), tmp_path / "good.pth")
    assert torch.equal(read_weights(tmp_path / "good.pth")["fc.0.weight"], torch.ones(2))
    torch.save(({"x": torch.ones(2)}, Evil()), tmp_path / "evil.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_conversion_refuses_other_weights() -> None:
    with pytest.raises(FetchError, match="those of aiSFX"):
        convert_reference_state_dict({"embedding_net.conv_block1.conv1.weight": torch.zeros(1)})

"""Log-mel patches: equal to transformers' frames, planned exactly, and enough to learn from."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import WhisperFeatureExtractor

from plait.encoders.media_encoder import MediaEncoder
from plait.encoders.mel.encoder import Mel
from plait.encoders.projectors import create_pool, create_projector
from plait.encoders.registry import create
from plait.errors import ConfigError, MediaError, UnknownNameError
from plait.modalities import AudioHeader, AudioRequest


def sound(samples: int, seed: int = 0) -> NDArray[np.float32]:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def header(samples: int, rate: int = 16_000) -> AudioHeader:
    return AudioHeader(samples=samples, rate=rate, channels=1, format="array", bytes=4 * samples)


def test_frames_equal_transformers_log_mel() -> None:
    """Away from the ends, which Whisper mirrors, and within its dynamic range of 8."""
    item = sound(16_000)
    extractor = WhisperFeatureExtractor(chunk_length=1)
    theirs = extractor(item, sampling_rate=16_000, return_tensors="pt")["input_features"][0].T
    made = Mel(patch=1, normalise="fixed").process(item)["patches"]
    assert made.shape == theirs.shape == (100, 80)
    torch.testing.assert_close(made[2:-2], theirs[2:-2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"patch": 1}, {"rate": 8_000, "hop": 0.0125, "bins": 40}])
def test_plans_equal_features_at_every_length(options: dict[str, Any]) -> None:
    encoder = Mel(**options)
    for samples in [1, 2, 159, 160, 161, 1_279, 1_280, 1_281, 20_000]:
        for rate in (16_000, 44_100):
            facts = header(samples, rate)
            decoded = facts.samples_at(encoder.wanted(facts).rate)
            grid = encoder.plan(facts)
            (made,) = encoder([encoder.process(sound(decoded))])
            assert made.grid == grid and made.embeddings.shape == (grid[0], encoder.width)
            assert made.seconds == encoder.seconds(facts, grid)
            assert made.embeddings.isfinite().all()
    assert encoder.plan(header(1)) == (1, 1, 1)
    assert encoder.wanted(header(1)) == AudioRequest(options.get("rate", 16_000))


def test_a_batch_equals_one_by_one() -> None:
    encoder = Mel()
    inputs = [encoder.process(sound(samples)) for samples in (9_000, 100, 4_321)]
    for made, item in zip(encoder(inputs), inputs, strict=True):
        assert torch.equal(made.embeddings, encoder([item])[0].embeddings)


def test_patches_are_frames_one_behind_another_and_begin_on_time() -> None:
    item = sound(16_000)
    frames = Mel(patch=1).process(item)["patches"]
    encoder = Mel(patch=8)
    patches = encoder.process(item)["patches"]
    assert patches.shape == (13, 640)
    assert [encoder.plan(header(n))[0] for n in (1, 1_280, 1_281)] == [1, 1, 2]
    assert torch.equal(patches.reshape(-1, 80)[:100], frames)
    assert not bool(patches.reshape(-1, 80)[100:].any())
    assert encoder.seconds(header(16_000), (13, 1, 1))[:3] == (0.0, 0.08, 0.16)


def test_normalisation_per_item_forgets_loudness_and_fixed_does_not() -> None:
    item = sound(16_000)
    for normalise, alike in (("item", True), ("fixed", False)):
        encoder = Mel(patch=1, normalise=normalise)
        loud, quiet = (encoder.process(item * scale)["patches"] for scale in (1, 0.25))
        assert torch.allclose(loud, quiet, atol=1e-3) == alike
    frames = Mel(patch=1).process(item)["patches"]
    assert abs(float(frames.mean())) < 1e-4 and abs(float(frames.std()) - 1) < 1e-3
    silence = np.zeros(5_000, np.float32)
    assert not bool(Mel().process(silence)["patches"].any())
    fixed = Mel(normalise="fixed").process(silence)["patches"]
    assert torch.allclose(fixed, torch.tensor(-1.5))


def test_an_empty_sound_and_wrong_options_are_refused() -> None:
    with pytest.raises(MediaError, match="is empty: leave it out"):
        Mel().plan(header(0))
    wrong: Any
    for wrong in ({"bins": 0}, {"bins": 2.5}, {"patch": 0}, {"patch": True}, {"rate": 10}):
        with pytest.raises(ConfigError, match="is a whole number"):
            Mel(**wrong)
    for wrong in ({"window": 0}, {"hop": -1}, {"hop": "x"}, {"window": float("nan")}, {"hop": 2}):
        with pytest.raises(ConfigError, match="is in seconds"):
            Mel(**wrong)
    with pytest.raises(UnknownNameError, match="did you mean 'fixed'"):
        Mel(normalise="fixd")
    with (
        pytest.warns(UserWarning, match="mel filterbank"),
        pytest.raises(ConfigError, match="cannot tell 128 mel bins apart"),
    ):
        Mel(bins=128, window=0.01)


def test_every_option_changes_the_fingerprint() -> None:
    changes: list[dict[str, Any]] = [{}, {"rate": 8_000}, {"bins": 40}, {"window": 0.02},
        {"hop": 0.02}, {"patch": 4}, {"normalise": "fixed"}]  # fmt: skip
    assert len({Mel(**change).fingerprint() for change in changes}) == len(changes)


def test_a_projector_alone_learns_to_tell_tones() -> None:
    """There is nothing to train but the projector, and that is enough."""
    generator = torch.Generator().manual_seed(0)
    tower = create("mel")
    projector = create_projector("mlp", tower.width, 8, embedding_std=0.1, generator=generator)
    encoder = MediaEncoder(tower, create_pool("keep"), projector)
    assert list(tower.parameters()) == []
    time = np.arange(3_200) / 16_000
    tones = [np.sin(2 * np.pi * hertz * time).astype(np.float32) for hertz in (300, 900, 2_700)]
    inputs = [tower.process(tone + sound(3_200, seed)) for seed, tone in enumerate(tones)]
    optimiser = torch.optim.Adam(projector.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        made = encoder.project(encoder.features(inputs))
        logits = torch.stack([item.embeddings.mean(0) for item in made])
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(3))
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in projector.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 < losses[0]

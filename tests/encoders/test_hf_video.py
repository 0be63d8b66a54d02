"""VideoMAE: equal to transformers', with nothing held that cannot learn, planned exactly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    VideoMAEModel,
)

from plait.encoders.hf_video.encoder import HfVideo
from plait.encoders.registry import create
from plait.errors import ConfigError, MediaError, UnknownNameError
from plait.modalities import Frames, FrameSampling, Video

MAKERS = {
    "base": (VideoMAEModel, {"use_mean_pooling": False}),
    "classifier": (VideoMAEForVideoClassification, {"use_mean_pooling": True}),
    "pretrained": (VideoMAEForPreTraining, {"use_mean_pooling": False}),
}


def save(folder: Path, kind: str = "base", crop: int = 32) -> Path:
    torch.manual_seed(0)
    maker, options = MAKERS[kind]
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
    config = VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=6, tubelet_size=2, intermediate_size=48,
        decoder_num_attention_heads=2, decoder_intermediate_size=24, **sizes, **decoder, **options,
    )  # fmt: skip
    model: Any = maker(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    size = {"height": crop, "width": crop}
    VideoMAEImageProcessor(size={"shortest_edge": 40}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("videomae"))


def film(frames: int, height: int = 48, width: int = 60, **options: Any) -> Video:
    noise = np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), np.uint8)
    return Video(list(noise), fps=4, **options)


def read(encoder: HfVideo, part: Video) -> Frames:
    made = part.decode(wanted=encoder.wanted(part.header()))
    assert isinstance(made, Frames)
    return made


@pytest.mark.parametrize("kind", MAKERS)
def test_features_equal_transformers_and_a_batch_equals_one_by_one(
    kind: str, tmp_path: Path
) -> None:
    folder = save(tmp_path, kind)
    encoder = HfVideo(folder).eval()
    processors: Any = VideoMAEImageProcessor
    processor = processors.from_pretrained(folder)
    reference = VideoMAEModel.from_pretrained(folder).eval()
    films = [read(encoder, part) for part in (film(12), film(3, 40, 90), film(30, 33, 32))]
    together = encoder([encoder.process(item) for item in films])
    for frames, made in zip(films, together, strict=True):
        pixels = processor([list(frames.pixels)], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = reference(pixel_values=pixels).last_hidden_state[0]
        assert made.grid == (3, 2, 2) and expected.shape == (12, 32)
        torch.testing.assert_close(made.embeddings, expected, rtol=1e-5, atol=1e-5)
        (alone,) = encoder([encoder.process(frames)])
        torch.testing.assert_close(made.embeddings, alone.embeddings, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0].embeddings, together[1].embeddings, atol=0.01)


@pytest.mark.parametrize("kind", MAKERS)
def test_only_the_tower_is_held_and_all_of_it_trains(kind: str, tmp_path: Path) -> None:
    encoder = create("hf_video", weights=save(tmp_path, kind)).set_trainable(True).train()
    names = [name for name, _ in encoder.named_parameters()]
    assert names and not any(part in name for name in names for part in ("decoder", "mask", "head"))
    assert isinstance(encoder, HfVideo)
    encoder([encoder.process(read(encoder, film(6)))])[0].embeddings.square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_plans_equal_features_and_time_rows_begin_with_their_first_frame(folder: Path) -> None:
    encoder = HfVideo(folder)
    for part in [film(1), film(6), film(31, 200, 34), film(20, start=1, end=2)]:
        header = part.header()
        grid = encoder.plan(header)
        (made,) = encoder([encoder.process(read(encoder, part))])
        assert made.grid == grid and made.embeddings.shape == (12, encoder.width)
        times = FrameSampling(count=6).times(header.seconds)
        assert encoder.seconds(header, grid) == times[::2] and len(made.seconds) == 3


def test_another_number_of_frames_is_refused_before_decoding(folder: Path) -> None:
    encoder = HfVideo(folder)
    with pytest.raises(MediaError, match=r"reads 6 frames.*asks for 4.*set its count to 6"):
        encoder.plan(film(9, sampling=FrameSampling(count=4)).header())
    assert encoder.plan(film(9, sampling=FrameSampling(count=6)).header()) == (3, 2, 2)
    with pytest.raises(MediaError, match="may differ at most"):
        encoder.plan(film(2, 1, 300).header())


def test_a_checkpoint_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reads pictures of one size"):
        HfVideo(save(tmp_path / "crop", crop=48))
    with pytest.raises(UnknownNameError, match="dtype"):
        HfVideo(folder, dtype="float8")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="encoder 'hf_video' needs a checkpoint"):
        HfVideo(tmp_path / "empty")
    other = save(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UnknownNameError, match="video tower"):
        HfVideo(other)
    (other / "config.json").write_text(json.dumps(config | {"tubelet_size": "two"}))
    with pytest.raises(ConfigError, match=r"needs a checkpoint with config\.json"):
        HfVideo(other)
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match="must hold every weight"):
        HfVideo(other)

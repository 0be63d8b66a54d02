"""A film's pixels as features: cubes in order, the last filled up, plans exact."""

from typing import Any

import numpy as np
import pytest
import torch

from plait.encoders.media_encoder import MediaEncoder
from plait.encoders.pixels import PLACES
from plait.encoders.projectors import create_pool, create_projector
from plait.encoders.registry import create
from plait.encoders.tubelets.encoder import Tubelets
from plait.errors import ConfigError, Origin
from plait.modalities import Frames, FrameSampling, Video


def film(frames: int, height: int = 4, width: int = 6, **options: Any) -> Video:
    noise = np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), np.uint8)
    return Video(list(noise), fps=2, **options)


def read(encoder: Tubelets, part: Video) -> Frames:
    made = part.decode(wanted=encoder.wanted(part.header()))
    assert isinstance(made, Frames)
    return made


def test_cubes_are_the_films_pixels_time_by_time() -> None:
    encoder = Tubelets(frames=2, patch=2, max_side=8)
    frames = read(encoder, film(5))
    (made,) = encoder([encoder.process(frames)])
    assert made.grid == (3, 2, 3) and made.embeddings.shape == (18, 24 + 3 * PLACES)
    assert encoder.width == 24 + 3 * PLACES and made.seconds == (0.0, 1.0, 2.0)
    pixels = torch.from_numpy(frames.pixels).float() / 127.5 - 1
    filled = torch.cat([pixels, pixels[-1:]])  # the last frame, again
    places = [(t, r, c) for t in (0, 2, 4) for r in (0, 2) for c in (0, 2, 4)]
    for number, (time, row, column) in enumerate(places):
        cube = filled[time : time + 2, row : row + 2, column : column + 2]
        torch.testing.assert_close(made.embeddings[number, :24], cube.flatten())


def test_every_place_and_time_can_be_told() -> None:
    encoder = Tubelets(frames=1, patch=1, max_side=8, max_frames=64)
    (made,) = encoder([encoder.process(read(encoder, film(40)))])
    assert made.grid == (40, 4, 6)
    assert len(torch.unique(made.embeddings[:, 3:], dim=0)) == 40 * 4 * 6


@pytest.mark.parametrize("options", [{}, {"frames": 3, "patch": 2, "max_side": 4}, {"count": 7}])
def test_plans_equal_features_at_every_length_and_size(options: dict[str, Any]) -> None:
    encoder = Tubelets(**options)
    for part in [film(1), film(2, 1, 1), film(7, 33, 200), film(90, 8, 8), film(9, start=1, end=3)]:
        header = part.header()
        grid = encoder.plan(header)
        (made,) = encoder([encoder.process(read(encoder, part))])
        assert made.grid == grid and made.embeddings.shape == (np.prod(grid), encoder.width)
        assert len(made.seconds) == len(encoder.seconds(header, grid)) == grid[0]
        times = encoder.wanted(header).times(header.seconds)
        assert encoder.seconds(header, grid) == times[:: encoder.frames]


def test_the_samples_own_sampling_comes_first() -> None:
    encoder = Tubelets(count=2)
    own = film(8, sampling=FrameSampling(count=5))
    assert encoder.wanted(own.header()) == FrameSampling(count=5)
    assert encoder.plan(own.header())[0] == encoder.process(read(encoder, own))["grid"][0] == 3
    assert encoder.plan(film(8).header())[0] == 1


def test_a_batch_equals_one_by_one_and_learns_through_its_projector() -> None:
    generator = torch.Generator().manual_seed(0)
    tower = create("tubelets", patch=2, max_side=8)
    projector = create_projector(
        "stack", tower.width, 8, embedding_std=0.1, generator=generator, frames=2
    )
    encoder = MediaEncoder(tower, create_pool("keep"), projector)
    assert isinstance(tower, Tubelets) and list(tower.parameters()) == []
    parts = [film(7), film(1, 8, 8), film(3, 2, 9)]
    inputs = [tower.process(read(tower, part)) for part in parts]
    made = encoder.project(encoder.features(inputs))
    for part, item, together in zip(parts, inputs, made, strict=True):
        (alone,) = encoder.project(encoder.features([item]))
        torch.testing.assert_close(together.embeddings, alone.embeddings, rtol=0, atol=1e-5)
        plan = encoder.plan(part, Origin("test"))
        assert (plan.grid, plan.length) == (together.grid, len(together.embeddings))
    sum(item.embeddings.sum() for item in made).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in projector.parameters())


def test_options_out_of_range_are_refused_and_decide_the_fingerprint() -> None:
    wrong: Any
    for wrong in ({"frames": 0}, {"frames": 65}, {"patch": -1}, {"max_side": 1.5}):
        with pytest.raises(ConfigError, match="must be a whole number"):
            Tubelets(**wrong)
    with pytest.raises(ConfigError, match="take 16"):
        Tubelets(max_side=8)
    with pytest.raises(ConfigError, match="must be above 0"):
        Tubelets(fps=0)
    changes: list[dict[str, Any]] = [{}, {"frames": 4}, {"patch": 8}, {"max_side": 224}]
    assert len({Tubelets(**change).fingerprint() for change in changes}) == len(changes)

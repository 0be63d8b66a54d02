"""Pixels as features: nothing is lost below the bound, plans are exact, a projector learns."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from plait.encoders.media_encoder import MediaEncoder
from plait.encoders.patches.encoder import Patches
from plait.encoders.pixels import PLACES
from plait.encoders.projectors import create_pool, create_projector
from plait.encoders.registry import create
from plait.errors import ConfigError
from plait.modalities import Image, ImageHeader


def header(height: int, width: int) -> ImageHeader:
    return ImageHeader(width, height, "PNG", "RGB", 100)


def test_patches_are_the_pictures_pixels_row_by_row(make_picture: Any) -> None:
    picture: NDArray[np.uint8] = make_picture(8, 12)
    encoder = Patches(patch=4, max_side=16)
    (made,) = encoder([encoder.process(picture)])
    assert made.grid == (1, 2, 3) and made.embeddings.shape == (6, 48 + 2 * PLACES)
    assert encoder.width == 48 + 2 * PLACES
    for number, (row, column) in enumerate([(r, c) for r in (0, 4) for c in (0, 4, 8)]):
        pixels = torch.from_numpy(picture[row : row + 4, column : column + 4]).float() / 127.5 - 1
        torch.testing.assert_close(made.embeddings[number, :48], pixels.flatten())


def test_every_place_can_be_told_and_is_the_same_in_every_picture(make_picture: Any) -> None:
    encoder = Patches(patch=2, max_side=64)
    (wide, small) = encoder(
        [encoder.process(make_picture(4, 64)), encoder.process(make_picture(4, 8))]
    )
    places = wide.embeddings[:, 12:]
    assert len(torch.unique(places, dim=0)) == 64
    assert torch.equal(small.embeddings[:4, 12:], places[:4])
    assert torch.equal(small.embeddings[4:, 12:], places[32:36])


@pytest.mark.parametrize("options", [{}, {"patch": 4, "max_side": 20}, {"patch": 1, "max_side": 7}])
def test_plans_equal_features_at_every_size(options: dict[str, Any], make_picture: Any) -> None:
    encoder = Patches(**options)
    for height, width in [(1, 1), (7, 300), (300, 7), (15, 17), (20, 20), (29, 211), (448, 224)]:
        grid = encoder.plan(header(height, width))
        (made,) = encoder([encoder.process(make_picture(height, width))])
        assert made.grid == grid and made.embeddings.shape == (np.prod(grid), encoder.width)
        assert made.embeddings.isfinite().all()
        assert max(grid) * encoder.patch <= encoder.max_side
    assert encoder.plan(header(10**9, 1))[1:] == (encoder.max_side // encoder.patch, 1)


def test_a_picture_is_made_smaller_but_never_larger(make_picture: Any) -> None:
    encoder = Patches(patch=8, max_side=64)
    assert encoder.plan(header(16, 24)) == (1, 2, 3)
    assert encoder.plan(header(1_600, 3_200)) == (1, 4, 8)
    assert encoder.plan(Image(make_picture(20, 12)).header()) == (1, 3, 2)


def test_a_batch_equals_one_by_one(make_picture: Any) -> None:
    encoder = Patches(patch=4, max_side=32)
    inputs = [encoder.process(make_picture(*size)) for size in ((8, 8), (32, 5), (90, 40))]
    for made, item in zip(encoder(inputs), inputs, strict=True):
        assert torch.equal(made.embeddings, encoder([item])[0].embeddings)


def test_options_out_of_range_are_refused_and_decide_the_fingerprint() -> None:
    wrong: Any
    for wrong in ({"patch": 0}, {"patch": 2.5}, {"patch": True}, {"max_side": 10**6}):
        with pytest.raises(ConfigError, match="must be a whole number"):
            Patches(**wrong)
    with pytest.raises(ConfigError, match="patches of 16 pixels; it is 100: take 96"):
        Patches(max_side=100)
    changes: list[dict[str, Any]] = [{}, {"patch": 8}, {"max_side": 448}]
    assert len({Patches(**change).fingerprint() for change in changes}) == len(changes)


def test_a_projector_alone_learns_where_a_square_is() -> None:
    """The same square in another place: only the places of patches can tell."""
    generator = torch.Generator().manual_seed(0)
    tower = create("patches", patch=4, max_side=16)
    projector = create_projector("mlp", tower.width, 8, embedding_std=0.1, generator=generator)
    encoder = MediaEncoder(tower, create_pool("keep"), projector)
    assert list(tower.parameters()) == []
    pictures = np.zeros((3, 16, 16, 3), np.uint8)
    for number, (row, column) in enumerate([(0, 0), (0, 12), (12, 0)]):
        pictures[number, row : row + 4, column : column + 4] = 255
    inputs = [tower.process(picture) for picture in pictures]
    optimiser = torch.optim.Adam(projector.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        made = encoder.project(encoder.features(inputs))
        logits = torch.stack([item.embeddings.mean(0) for item in made])
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(3))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]

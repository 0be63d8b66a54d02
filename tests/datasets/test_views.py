"""Views: fixed by (seed, digest, view), the picture's size, white corners, no mirror."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from plait.datasets.views import Views
from plait.errors import ConfigError

STILL = {"min_area": 1.0, "max_stretch": 1.0, "max_degrees": 0.0, "jitter": 0.0, "max_hue": 0.0}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def picture(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    coarse.flags.writeable = False
    return coarse


def test_view_0_is_the_picture_and_others_are_not() -> None:
    views, pixels = Views(count=4, seed=1), picture()
    assert views.apply(pixels, "d", 0) is pixels
    made = [views.apply(pixels, "d", view) for view in range(4)]
    for view, one in enumerate(made):
        assert (one.shape, one.dtype) == (pixels.shape, np.uint8)
        assert one.flags.c_contiguous
        assert all((one != other).any() for other in made[:view])


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3), (224, 224), (37, 301)])
def test_every_size_keeps_its_size(size: tuple[int, int]) -> None:
    for view in range(1, 6):
        varied = Views(count=6, min_area=0.1, max_stretch=3).apply(picture(*size), "d", view)
        assert varied.shape == (*size, 3)


def test_views_depend_on_seed_digest_and_number_alone() -> None:
    pixels = picture()
    one = Views(count=3, seed=5).apply(pixels, "d", 2)
    np.testing.assert_array_equal(Views(count=9, seed=5).apply(pixels, "d", 2), one)
    assert (Views(count=3, seed=6).apply(pixels, "d", 2) != one).any()
    assert (Views(count=3, seed=5).apply(pixels, "e", 2) != one).any()


def test_global_random_state_is_neither_read_nor_changed() -> None:
    pixels, views = picture(), Views(count=2)
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state()
    one = views.apply(pixels, "d", 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    np.testing.assert_array_equal(views.apply(pixels, "d", 1), one)


def test_threads_make_the_same_views() -> None:
    views = Views(count=9)
    pictures = [picture(seed=n) for n in range(4)]
    jobs = [(n, view) for n in range(4) for view in range(9)] * 2
    alone = [views.apply(pictures[n], str(n), view) for n, view in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = pool.map(lambda job: views.apply(pictures[job[0]], str(job[0]), job[1]), jobs)
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one, other)


def test_still_options_change_nothing() -> None:
    pixels = picture()
    varied = Views(count=2, **STILL).apply(pixels, "d", 1)  # type: ignore[arg-type]
    assert np.abs(varied.astype(int) - pixels).max() <= 1


def test_rotation_uncovers_white() -> None:
    black = np.zeros((60, 60, 3), np.uint8)
    views = Views(count=20, **{**STILL, "max_degrees": 45.0})  # type: ignore[arg-type]
    made = [views.apply(black, "d", view) for view in range(1, 20)]
    assert sum((one[0, 0] == 255).all() for one in made) >= 12
    assert all((one[25:35, 25:35] == 0).all() for one in made)


@pytest.mark.parametrize("size", [(40, 40), (20, 90), (90, 20)])
def test_rotation_leaves_no_seam_on_white(size: tuple[int, int]) -> None:
    white = np.full((*size, 3), 255, np.uint8)
    views = Views(count=12, **{**STILL, "max_degrees": 180.0})  # type: ignore[arg-type]
    assert all((views.apply(white, "d", view) == 255).all() for view in range(12))


def test_pictures_are_never_mirrored() -> None:
    half = np.full((64, 64, 3), 255, np.uint8)
    half[:, :32] = 0
    views = Views(count=60)
    for view in range(60):
        varied = views.apply(half, "d", view).astype(int)
        assert varied[:, :16].mean() < varied[:, 48:].mean()


def test_name_says_what_decides_the_pixels() -> None:
    assert Views(count=2).name == Views(count=5).name
    changes = [{"seed": 1}, {"min_area": 0.5}, {"max_stretch": 1.5}, {"max_degrees": 1.0}]
    changes += [{"jitter": 0.1}, {"max_hue": 0.1}]
    names = {Views(**change).name for change in changes} | {Views().name}  # type: ignore[arg-type]
    assert len(names) == 7


def test_bad_options_and_views_are_refused() -> None:
    for options in ({"count": 0}, {"min_area": 0}, {"max_hue": 0.6}, {"jitter": -0.1}):
        with pytest.raises(ConfigError, match=f"views.{next(iter(options))}"):
            Views(**options)  # type: ignore[arg-type]
    for view in (-1, 2):
        with pytest.raises(ConfigError, match="0 to 1"):
            Views(count=2).apply(picture(), "d", view)

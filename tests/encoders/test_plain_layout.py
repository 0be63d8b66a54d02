"""The layout of text-only language models."""

from typing import Any

import numpy as np
import pytest

from plait.encoders.layouts.plain import PlainLayout
from plait.errors import Origin, RenderError
from plait.modalities import Image
from plait.stream import Fill, ItemPlan, Layout


def test_pieces_and_positions(make_encoder: Any, make_picture: Any) -> None:
    layout = PlainLayout({"image": make_encoder()}, before="<img>", after="\n")
    assert isinstance(layout, Layout)
    ((_, plan),) = layout.plan(Image(make_picture(8, 12)), Origin())
    assert plan.grid == (1, 2, 3) and plan.encoder == "tiny"
    assert layout.pieces([plan]) == ["<img>", Fill(6), "\n"]
    assert PlainLayout({}).pieces([plan]) == [Fill(6)]
    positions = layout.positions(np.zeros(9, dtype=np.int64), [], [])
    assert positions.tolist() == list(range(9)) and layout.decode_position(positions) == 9
    assert layout.placeholder_id == -1 and not layout.banned_ids


def test_a_medium_without_an_encoder_is_refused(make_picture: Any) -> None:
    with pytest.raises(RenderError, match=r"no medium.*dataset d, row 4"):
        PlainLayout({}).plan(Image(make_picture(4, 4)), Origin("d", 4))


def plan_of(encoder: str, seconds: tuple[float, ...], each: int, interleaved: bool = False) -> Any:
    grid = (len(seconds), each, 1)
    return ItemPlan(encoder, len(seconds) * each, grid, seconds=seconds, interleaved=interleaved)


def test_the_times_of_a_film_stand_before_its_frames() -> None:
    film = plan_of("film", (0.25, 1.0, 2.5), 4)
    stamped = PlainLayout({}, timestamped=["film"])
    assert stamped.pieces([film]) == ["0.2s:", Fill(4), "1.0s:", Fill(4), "2.5s:", Fill(4)]
    assert PlainLayout({}, timestamped=["other"]).pieces([film]) == [Fill(12)]
    timeless = ItemPlan("film", 6, (2, 3, 1))
    assert stamped.pieces([timeless]) == [Fill(6)]


def test_the_sound_of_a_film_stands_after_it_or_second_by_second() -> None:
    film = plan_of("film", (0.0, 0.9, 1.5, 3.0), 2)
    sound = plan_of("sound", tuple(n / 2 for n in range(6)), 1)
    between = plan_of("sound", sound.seconds, 1, interleaved=True)
    layout = PlainLayout({}, "<", ">", timestamped=["film"])
    after = ["0.0s:", Fill(2), "0.9s:", Fill(2), "1.5s:", Fill(2), "3.0s:", Fill(2), Fill(6, 1)]
    assert layout.pieces([film, sound]) == ["<", *after, ">"]
    assert PlainLayout({}).pieces([film, sound]) == [Fill(8), Fill(6, 1)]
    # Second 0: two frames, then half seconds 0.0 and 0.5; second 2 has no frame, second 3 no sound.
    assert PlainLayout({}).pieces([film, between]) == [
        Fill(4), Fill(2, 1), Fill(2), Fill(4, 1), Fill(2),
    ]  # fmt: skip

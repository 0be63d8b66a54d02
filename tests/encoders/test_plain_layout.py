"""The layout of text-only language models."""

from typing import Any

import numpy as np
import pytest

from plait.encoders.layouts.plain import PlainLayout
from plait.errors import Origin, RenderError
from plait.modalities import Image
from plait.stream import Fill, Layout


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

"""Pages show what a sample holds: pictures, the shape of sounds, frames; and play it."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from plait.errors import MediaError
from plait.modalities import Audio, Frames, Image, Limits, Video
from plait.trainer.reports import showing
from plait.trainer.reports.showing import show, show_stretch

RATE = showing.RATE


def content(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])


def pixels(uri: str) -> NDArray[np.uint8]:
    return np.asarray(PIL.Image.open(BytesIO(content(uri))).convert("RGB"))


def tone(seconds: float, loud_from: float = 0.0) -> NDArray[np.float32]:
    time = np.arange(round(seconds * RATE)) / RATE
    wave = np.sin(2 * np.pi * 440 * time) * np.where(time < loud_from, 0.02, 0.8)
    return wave.astype(np.float32)


def dark(picture: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How much of each column is drawn."""
    shares: NDArray[np.float64] = (picture.mean(axis=2) < 200).mean(axis=0)
    return shares


def test_a_sound_is_drawn_by_its_loudness_and_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = show(Audio(tone(1.0, loud_from=0.5), rate=RATE), Limits())
    columns = dark(pixels(shown.picture))
    half = len(columns) // 2
    assert columns[: half - 2].max() < 0.2 < 0.8 < columns[half + 2 :].min()
    assert shown.kind == "audio" and shown.player.startswith("data:audio/mpeg;base64,")
    with av.open(BytesIO(content(shown.player))) as container:
        heard = sum(frame.samples for frame in container.decode(audio=0))
    assert heard == pytest.approx(RATE, abs=0.1 * RATE)
    monkeypatch.setattr(showing, "MOST_SECONDS", 0.5)
    shorter = show(Audio(tone(9.0), rate=RATE), Limits())
    assert len(content(shorter.player)) < len(content(shown.player))


def test_a_stretch_of_a_sound_is_drawn_beside_the_loudest_of_the_whole() -> None:
    samples = tone(1.0, loud_from=0.5)
    quiet = dark(pixels(show_stretch("audio", samples, 0.0, 0.45).picture))
    loud = dark(pixels(show_stretch("audio", samples, 0.55, 1.0).picture))
    assert quiet.max() < 0.2 < 0.8 < loud.min()


def test_frames_stand_side_by_side_and_a_stretch_shows_its_own() -> None:
    colours = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [90, 90, 0]], dtype=np.uint8)
    frames = Frames(np.broadcast_to(colours[:, None, None], (4, 40, 60, 3)), np.arange(4.0))
    whole = pixels(show_stretch("video", frames).picture)
    quarter = whole.shape[1] // 4
    for number, colour in enumerate(colours):
        seen = whole[5, number * quarter + quarter // 2].astype(int)
        assert abs(seen - colour.astype(int)).max() < 30
    third = pixels(show_stretch("video", frames, 0.5, 0.75).picture)
    assert abs(third[5, 5].astype(int) - colours[2].astype(int)).max() < 30


def write_film(path: Path, frames: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, width=64, height=48, pix_fmt="yuv420p")
        for number in range(frames):
            picture = np.full((48, 64, 3), 10 * number % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_a_small_film_is_in_the_page_whole_and_a_large_one_as_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_film(tmp_path / "a.mp4", 12)
    shown = show(Video(str(file)), Limits())
    assert shown.kind == "video" and content(shown.player) == file.read_bytes()
    monkeypatch.setattr(showing, "MOST_BYTES", 10)
    large = show(Video(str(file)), Limits())
    assert large.kind == "image" and large.player.startswith("data:image/webp")
    moving: Any = PIL.Image.open(BytesIO(content(large.player)))
    assert moving.n_frames > 3
    cut = show(Video(str(file), end=0.5), Limits())
    assert cut.kind == "image"


def test_a_picture_needs_no_player_and_a_broken_file_says_so(tmp_path: Path) -> None:
    shown = show(Image(np.zeros((20, 30, 3), dtype=np.uint8)), Limits())
    assert (shown.player, shown.kind) == ("", "") and pixels(shown.picture).shape == (20, 30, 3)
    broken = tmp_path / "a.mp4"
    broken.write_bytes(b"no film")
    with pytest.raises(MediaError, match=r"a\.mp4"):
        show(Video(str(broken)), Limits())

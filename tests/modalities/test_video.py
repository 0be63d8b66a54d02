"""Films: the frames found by seeking are those that are shown at their times."""

import io
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest

from plait.errors import ConfigError, MediaError
from plait.modalities import (
    Audio,
    AudioRequest,
    Frames,
    FrameSampling,
    Image,
    Limits,
    Video,
    containers,
    film,
)

LIMITS = Limits()


def all_frames(data: bytes) -> tuple[Any, Any]:
    """(seconds, pixels) of every frame, in the order in which they are shown."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        start = float((stream.start_time or 0) * stream.time_base)
        frames = list(container.decode(stream))
        times = [float((f.pts if f.pts is not None else f.dts) * f.time_base) for f in frames]
    return np.array(times) - start, [f.to_ndarray(format="rgb24") for f in frames]


def check_against_all(data: bytes, found: Frames, times: Any) -> None:
    seconds, pixels = all_frames(data)
    assert np.all(np.diff(seconds) > 0)
    for at, time in enumerate(times):
        shown = int(np.searchsorted(seconds, time + 1e-6, side="right")) - 1
        assert found.seconds[at] == pytest.approx(seconds[shown], abs=1e-6), time
        np.testing.assert_array_equal(found.pixels[at], pixels[shown], err_msg=f"at {time}")


@pytest.mark.parametrize(
    ("sampling", "seconds", "times"),
    [
        (FrameSampling(fps=2), 2.0, [0, 0.5, 1, 1.5]),
        (FrameSampling(fps=2), 2.01, [0, 0.5, 1, 1.5, 2]),
        (FrameSampling(fps=1), 0.2, [0]),
        (FrameSampling(fps=30, max_frames=None), 0.1, [0, 1 / 30, 2 / 30]),
        (FrameSampling(fps=10, max_frames=4), 8.0, [1, 3, 5, 7]),
        (FrameSampling(count=2), 8.0, [2, 6]),
        (FrameSampling(fps=None, count=1), 8.0, [4]),
    ],
)
def test_times_of_frames(sampling: FrameSampling, seconds: float, times: list[float]) -> None:
    np.testing.assert_allclose(sampling.times(seconds), times)
    assert sampling.frames(seconds) == len(times)


def test_a_sampling_needs_numbers() -> None:
    for wrong in ({"fps": 0}, {"count": -1}, {"max_frames": 0}, {"fps": None}):
        with pytest.raises(ConfigError, match="frames"):
            FrameSampling(**wrong)


def test_seeking_shows_what_decoding_everything_shows(maker: Any) -> None:
    for ending in maker.films:
        options = {"bf": "2"} if ending in ("mp4", "mkv") else {}
        data = maker.film(ending, maker.pictures(100), **options)
        header = Video(data).header()
        assert (header.width, header.height) == (64, 48)
        assert header.seconds == pytest.approx(100 / 24, abs=0.02), ending
        assert header.fps == pytest.approx(24, abs=0.01)
        samplings = [FrameSampling(count=7), FrameSampling(fps=9), FrameSampling(count=100)]
        for sampling in samplings:
            found = Video(data).decode(LIMITS, sampling)
            check_against_all(data, found, sampling.times(header.seconds))


def test_only_what_is_needed_is_decoded(maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most the frames between a keyframe and the wanted one, and the one after it."""
    readers: list[film.FrameReader] = []
    create = film.FrameReader.__init__

    def keep(self: film.FrameReader, *arguments: Any) -> None:
        create(self, *arguments)
        readers.append(self)

    monkeypatch.setattr(film.FrameReader, "__init__", keep)
    for ending in ("mp4", "mkv", "webm"):
        data = maker.film(ending, maker.pictures(480), keyframes=24)
        Video(data).decode(LIMITS, FrameSampling(count=5))
        assert readers[-1].decoded <= 5 * 26, ending
        Video(data).decode(LIMITS, FrameSampling(fps=24, max_frames=None))
        assert readers[-1].decoded <= 481, f"{ending}: frames in a row are decoded once"


def test_time_stamps_count_and_not_numbers(maker: Any) -> None:
    """A rate that varies: three frames in the first second, then a pause, then many."""
    times = [0, 40, 80, 1000, 1040, 3000, *range(3033, 3500, 33)]
    data = maker.film("mp4", maker.pictures(len(times)), times=times)
    video = Video(data)
    found = video.decode(LIMITS, FrameSampling(fps=2))
    check_against_all(data, found, np.arange(len(found.seconds)) / 2)
    shown = [0, 0.08, 1.0, 1.04, 1.04, 1.04, 3.0]
    np.testing.assert_allclose(found.seconds[:7], shown, atol=1e-3)


@pytest.mark.parametrize(("rotation", "corner"), [(0, 0), (90, 1), (180, 2), (-90, 3)])
def test_a_film_lies_as_it_is_meant_to_be_seen(maker: Any, rotation: int, corner: int) -> None:
    """Counter-clockwise; the bright quarter begins at the upper left."""
    video = Video(maker.film("mp4", maker.pictures(3), rotation=rotation))
    header, pixels = video.header(), video.decode().pixels[0]
    assert (header.height, header.width) == ((64, 48) if rotation in (90, -90) else (48, 64))
    assert pixels.shape == (header.height, header.width, 3)
    corners = [pixels[5, 5, 0], pixels[-5, 5, 0], pixels[-5, -5, 0], pixels[5, -5, 0]]
    assert [int(value) > 128 for value in corners] == [at == corner for at in range(4)]


def test_pixels_that_are_not_square_are_stretched(maker: Any) -> None:
    video = Video(maker.film("mp4", maker.pictures(3), aspect=Fraction(3, 2)))
    assert (video.header().width, video.header().height) == (96, 48)
    assert video.decode().pixels.shape == (1, 48, 96, 3)


def test_a_cut_reads_between_its_ends(maker: Any) -> None:
    data = maker.film("mp4", maker.pictures(100))
    video = Video(data, start=1.1, end=3.1, sampling=FrameSampling(count=4))
    assert video.header().seconds == pytest.approx(2)
    found = video.decode(LIMITS, FrameSampling(count=9))  # the sample's own wish comes first
    check_against_all(data, found, [1.35, 1.85, 2.35, 2.85])
    assert Video(data, end=99.0).header().seconds == Video(data).header().seconds
    with pytest.raises(MediaError, match=r"is read from 5 s"):
        Video(data, start=5.0).header()


def test_a_soundtrack_is_the_films_own_over_the_same_cut(maker: Any) -> None:
    for ending in ("mp4", "webm", "mkv", "ts"):
        data = maker.film(ending, maker.pictures(96), track=maker.tone(4, 48_000))
        video = Video(data, start=1.0, end=3.0, sound="interleaved")
        header = video.header()
        assert header.audio is not None and header.audio.seconds == pytest.approx(2, abs=1e-3)
        track, interleaved = video.soundtrack(header)
        assert track == Audio(data, start=1.0, end=3.0) and interleaved
        assert track is not None and track.header() == header.audio
        assert len(track.decode(wanted=AudioRequest(16_000))) == 32_000
        assert Video(data, sound="after").soundtrack(header)[1] is False
        assert Video(data).soundtrack(Video(data).header()) == (None, False)
    silent = maker.film("mp4", maker.pictures(9))
    asked = Video(silent, sound="after")
    assert asked.soundtrack(asked.header()) == (None, False)


def test_sound_and_frames_share_a_clock(maker: Any) -> None:
    """A click at second 2 is heard where frame 48 is seen."""
    clicks = np.zeros(4 * 48_000, np.float32)
    clicks[96_000:96_480] = 0.8
    for ending in ("mp4", "mkv"):
        data = maker.film(ending, maker.pictures(96), track=clicks)
        heard = Audio(data).decode()
        first = int(np.nonzero(np.abs(heard) > 0.3)[0][0])
        assert abs(first - 96_000) < 0.03 * 48_000, ending


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animated_pictures_are_films(maker: Any, form: str) -> None:
    pauses = [40 + 20 * number for number in range(10)]
    pictures = maker.pictures(10)
    video = Video(maker.animation(form, pictures, pauses))
    header = video.header()
    assert (header.width, header.height, header.format) == (64, 48, form)
    assert header.seconds == pytest.approx(sum(pauses) / 1000)
    found = video.decode(LIMITS, FrameSampling(count=13))
    begins = np.concatenate([[0], np.cumsum(pauses)[:-1]]) / 1000
    for at, time in enumerate(FrameSampling(count=13).times(header.seconds)):
        shown = int(np.searchsorted(begins, time, side="right")) - 1
        assert found.seconds[at] == pytest.approx(begins[shown])
        np.testing.assert_array_equal(found.pixels[at], pictures[shown])


def test_the_structure_tells_what_pillow_finds_by_decoding(maker: Any) -> None:
    for form in ("GIF", "WEBP", "PNG"):
        data = maker.animation(form, maker.pictures(6), [30, 70, 110, 20, 250, 60])
        with PIL.Image.open(io.BytesIO(data)) as picture:
            total = 0.0
            for number in range(picture.n_frames):
                picture.seek(number)
                picture.load()
                total += picture.info["duration"]
        assert Video(data).header().seconds == pytest.approx(total / 1000), form


def test_a_hasty_animation_runs_as_browsers_show_it(maker: Any) -> None:
    assert Video(maker.animation("WEBP", maker.pictures(4), [0, 10, 10, 20])).header().seconds == (
        pytest.approx(0.32)
    )
    held = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(held, "WEBP")
    assert Video(held.getvalue()).header().seconds == pytest.approx(0.1)


def test_a_list_of_pictures_is_a_film(maker: Any, tmp_path: Path) -> None:
    pictures = maker.pictures(6)
    path = tmp_path / "0.png"
    PIL.Image.fromarray(pictures[0]).save(path)
    mixed = [path, PIL.Image.fromarray(pictures[1]), Image(pictures[2]), *pictures[3:]]
    video = Video(mixed, fps=2)
    header = video.header()
    assert (header.seconds, header.fps, header.width, header.height) == (3, 2, 64, 48)
    found = video.decode(LIMITS, FrameSampling(fps=2))
    np.testing.assert_array_equal(found.pixels, np.stack(pictures))
    np.testing.assert_allclose(found.seconds, np.arange(6) / 2)
    assert Video(pictures).header().seconds == 6
    with pytest.raises(MediaError, match=r"one size; picture 1 is 32 x 48"):
        Video([pictures[0], pictures[1][:, :32]]).decode()


def bad_films(folder: Path, maker: Any) -> dict[str, tuple[Any, str]]:
    """Case: (what stands for a film, what the message must say)."""
    pictures = maker.pictures(100)
    mp4, webp = maker.film("mp4", pictures), maker.animation("WEBP", pictures[:9], [100] * 9)
    front = maker.film("mkv", pictures)
    plain = maker.film("mp4", pictures, container_options={"movflags": "empty_moov+frag_keyframe"})
    secret = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "01" * 16,
              "encryption_kid": "02" * 16}  # fmt: skip
    contents = {
        "locked.mp4": (maker.film("mp4", pictures, container_options=secret), "must be"),
        "frameless.mp4": (plain[: plain.index(b"moof") - 4], "has none"),
        "empty.mp4": (b"", "empty"),
        "text.mp4": (b"no film at all " * 99, "must be"),
        "cut.mp4": (mp4[: len(mp4) // 2], "must be"),
        "cut.mkv": (front[: len(front) // 2], "cut off"),
        "cut.webp": (webp[: len(webp) // 2], "must be"),
        "header.gif": (b"GIF89a" + bytes(7), "must"),
        "sound.mp4": (maker.sound("m4a", maker.tone(1, 44_100)), "moving pictures"),
        "list.m3u8": (b"#EXTM3U\n#EXTINF:3,\nfilm.ts\n#EXT-X-ENDLIST\n", "must be"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    cases: dict[str, tuple[Any, str]] = {n: (folder / n, rule) for n, (_, rule) in contents.items()}
    return cases | {"missing": (folder / "no.mp4", "no such"), "folder": (folder, "a directory")}


def test_every_bad_film_is_refused_by_name(maker: Any, tmp_path: Path) -> None:
    for case, (file, rule) in bad_films(tmp_path, maker).items():
        with pytest.raises(MediaError, match=rule) as caught:
            Video(file, sampling=FrameSampling(count=8)).decode()
            pytest.fail(f"{case} was read")
        assert caught.value.origin.file == str(file), case
        assert str(file) in str(caught.value) and "\n" not in str(caught.value), case


def test_limits_are_checked_before_frames_are_read(
    maker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = maker.film("mp4", maker.pictures(48))
    monkeypatch.setattr(film.FrameReader, "at", lambda *_: pytest.fail("a frame was read"))
    for limits, rule in [
        (Limits(max_video_seconds=1.9), "max_video_seconds"),
        (Limits(max_video_frames=15), "max_video_frames"),
        (Limits(max_video_memory=16 * 64 * 48 * 3 - 1), "max_video_memory"),
        (Limits(max_video_bytes=1000), "max_video_bytes"),
        (Limits(max_video_pixels=64 * 48 - 1), "must"),
    ]:
        with pytest.raises(MediaError, match=rule):
            Video(data, sampling=FrameSampling(count=16)).load(limits)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"source": 12}, "int"),
        ({"source": []}, "list is empty"),
        ({"source": "a.mp4", "fps": 2.0}, "leave out fps"),
        ({"source": ["a.png"], "fps": 0.0}, "above 0"),
        ({"source": ["a.png"], "sound": "after"}, "no sound"),
        ({"source": "a.mp4", "sound": "before"}, "interleaved"),
        ({"source": "a.mp4", "start": 3.0, "end": 1.0}, "end after it"),
    ],
)
def test_what_cannot_be_a_film_is_refused(arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(MediaError, match=rule):
        Video(**arguments)


def test_parts_compare_hash_and_pickle(maker: Any) -> None:
    assert Video("a.mp4") == Video("a.mp4") != Video("a.mp4", end=1.0)
    assert Video("a.mp4") != Video("a.mp4", sampling=FrameSampling(count=3))
    assert Video(["a.png"]) == Video(["a.png"]) != Video(["b.png"])
    assert len({Video("a.mp4"), Video("a.mp4"), Video(["a.mp4"])}) == 2
    pictures = maker.pictures(2)
    copy = pickle.loads(pickle.dumps(Video(pictures)))
    np.testing.assert_array_equal(copy.decode().pixels, np.stack(pictures))
    assert Video(pictures).digest() == copy.digest() != Video(pictures[:1]).digest()
    cuts = [Video("a", end=1.0), Video("a", sampling=FrameSampling(count=3)), Video(["a"], fps=2)]
    assert len({part.cut for part in cuts} | {Video("a").cut}) == 4


def test_files_that_name_other_files_are_no_format(maker: Any) -> None:
    """Each name is a demuxer of this FFmpeg, or the list would promise what is not there."""
    there = {name for names in av.formats_available for name in names.split(",")}
    assert set(containers.FORMATS) <= there
    assert not {"hls", "dash", "concat", "image2", "lavfi"} & set(containers.FORMATS)

"""Sounds and films made for the tests, by the encoders that PyAV brings."""

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

SOUNDS = {
    "wav": ("wav", "pcm_s16le", 22_050),
    "float.wav": ("wav", "pcm_f32le", 16_000),
    "aiff": ("aiff", "pcm_s16be", 22_050),
    "au": ("au", "pcm_s16be", 8_000),
    "flac": ("flac", "flac", 44_100),
    "mka": ("matroska", "flac", 16_000),
    "mp3": ("mp3", "libmp3lame", 44_100),
    "opus.ogg": ("ogg", "libopus", 48_000),
    "m4a": ("ipod", "aac", 44_100),
    "aac": ("adts", "aac", 44_100),
    "g722": ("g722", "g722", 16_000),
    "weba": ("webm", "libopus", 48_000),
}
"""Ending: FFmpeg's names of container and coder, and the rate in Hz."""

LOSSLESS = ("wav", "float.wav", "aiff", "au", "flac", "mka")

FILMS = {
    "mp4": ("mp4", "libx264"),
    "mkv": ("matroska", "libx264"),
    "ts": ("mpegts", "libx264"),
    "webm": ("webm", "libvpx"),
    "avi": ("avi", "mpeg4"),
}

RATE = 24
TRACK_RATE = 48_000


class Maker:
    """Makes files, as bytes."""

    sounds, lossless, films = SOUNDS, LOSSLESS, FILMS

    def tone(self, seconds: float, rate: int) -> NDArray[np.float32]:
        """A rising tone, so that every moment of it differs from every other."""
        time = np.arange(round(seconds * rate)) / rate
        wave = 0.4 * np.sin(2 * np.pi * (200 + 50 * time) * time)
        return (wave + 0.1 * np.sin(2 * np.pi * 1234 * time)).astype(np.float32)

    def sound(
        self, ending: str, samples: NDArray[np.float32], rate: int = 0, **options: str
    ) -> bytes:
        """Mono, or (2, samples) in stereo."""
        form, coder, usual = SOUNDS[ending]
        return self.encoded(form, coder, samples, rate or usual, options)

    def encoded(
        self,
        form: str,
        coder: str,
        samples: NDArray[np.float32],
        rate: int,
        options: dict[str, str] | None = None,
    ) -> bytes:
        rows = np.atleast_2d(samples)
        layout = "stereo" if len(rows) == 2 else "mono"
        held = io.BytesIO()
        with av.open(held, "w", format=form, options=options or {}) as container:
            stream = container.add_stream(coder, rate=rate, layout=layout)
            self._feed(container, stream, rows, layout)
        return held.getvalue()

    def _feed(self, container: Any, stream: Any, rows: Any, layout: str) -> None:
        rate = stream.codec_context.sample_rate
        whole = av.AudioFrame.from_ndarray(np.ascontiguousarray(rows), "fltp", layout)
        whole.sample_rate, whole.pts = rate, 0
        form = stream.codec_context.format.name
        resampler = av.AudioResampler(format=form, layout=layout, rate=rate)
        queue, done = av.AudioFifo(), 0
        for frame in resampler.resample(whole):
            queue.write(frame)
        stream.codec_context.open(strict=False)
        size = stream.codec_context.frame_size or 1024
        while queue.samples:
            frame = queue.read(min(size, queue.samples))
            frame.pts, frame.time_base = done, Fraction(1, rate)
            done += frame.samples
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

    def pictures(self, count: int, width: int = 64, height: int = 48) -> list[NDArray[np.uint8]]:
        """Each of its own grey, the upper left quarter inverted."""
        made = []
        for number in range(count):
            made.append(np.full((height, width, 3), 20 + number * 7 % 200, np.uint8))
            made[-1][: height // 2, : width // 2] = 255 - made[-1][-1, -1]
        return made

    def film(
        self,
        ending: str,
        pictures: Sequence[NDArray[np.uint8]],
        times: Sequence[int] | None = None,
        rotation: int | None = None,
        aspect: Fraction | None = None,
        track: NDArray[np.float32] | None = None,
        track_after: float = 0.0,
        keyframes: int = 12,
        container_options: dict[str, str] | None = None,
        **options: str,
    ) -> bytes:
        """At 24 frames a second, or at times in milliseconds; the sound's track at 48 kHz."""
        form, coder = FILMS[ending]
        held = io.BytesIO()
        with av.open(held, "w", format=form, options=container_options or {}) as container:
            more = {"preset": "ultrafast"} if coder == "libx264" else {}
            more |= {"g": str(keyframes), **options}
            stream = container.add_stream(coder, rate=RATE, options=more)
            stream.height, stream.width = pictures[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            if rotation is not None:
                stream.set_display_rotation(rotation)
            if aspect is not None:
                stream.codec_context.sample_aspect_ratio = aspect
            if times is not None:
                stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
            sound = None
            if track is not None:
                sound = container.add_stream(
                    "libopus" if form == "webm" else "aac", rate=TRACK_RATE, layout="mono"
                )
            for number, picture in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(picture)
                frame.pts = number if times is None else times[number]
                frame.time_base = Fraction(1, RATE if times is None else 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            if sound is not None:
                self._track(container, sound, track, round(track_after * TRACK_RATE))
        return held.getvalue()

    def _track(self, container: Any, stream: Any, samples: Any, begin: int) -> None:
        stream.codec_context.open(strict=False)
        size, form = stream.codec_context.frame_size, stream.codec_context.format.name
        for at in range(0, len(samples) - size + 1, size):
            block = np.ascontiguousarray(samples[None, at : at + size])
            block = (32_767 * block).astype(np.int16) if form == "s16" else block
            frame = av.AudioFrame.from_ndarray(block, form, "mono")
            frame.sample_rate, frame.pts = TRACK_RATE, begin + at
            frame.time_base = Fraction(1, TRACK_RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

    def animation(
        self, form: str, pictures: Sequence[NDArray[np.uint8]], pauses: Sequence[int]
    ) -> bytes:
        """An animated GIF, WEBP or PNG whose pictures are shown for so many milliseconds."""
        frames = [PIL.Image.fromarray(picture) for picture in pictures]
        held = io.BytesIO()
        options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
        frames[0].save(
            held, form, save_all=True, append_images=frames[1:], duration=list(pauses), loop=0,
            **options,
        )  # fmt: skip
        return held.getvalue()


@pytest.fixture(scope="session")
def maker() -> Maker:
    return Maker()

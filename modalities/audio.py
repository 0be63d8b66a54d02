"""Sounds: paths, bytes and arrays, all read to mono float32 at the rate that an encoder asks.

`plait.modalities.sound` does the samples' work; this file finds the sound, checks it and turns
every failure into a `MediaError` that names the file.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from plait.errors import MediaError, Origin
from plait.modalities import containers
from plait.modalities.limits import Limits
from plait.modalities.part import MediaHeader, MediaPart
from plait.modalities.sound import RATES, Samples, read_samples, resample, to_mono
from plait.modalities.sources import (
    STORED,
    Stored,
    check_cut,
    cut_name,
    digest_of,
    name_of,
    reading,
    size_of,
)

AudioSource = Stored | NDArray[Any]

_MOST_CHANNELS = 64
"""An array with more rows is one whose axes are the wrong way round."""


@dataclass(frozen=True, slots=True)
class AudioHeader(MediaHeader):
    """`samples` at `rate` Hz in one channel, after the cut that the part asks for.

    `decode` gives exactly these many samples, resampled: `ceil(samples * wanted.rate / rate)`.
    """

    samples: int
    rate: int
    channels: int
    format: str
    bytes: int

    @property
    def seconds(self) -> float:
        return self.samples / self.rate

    def samples_at(self, rate: int) -> int:
        """How many samples decoding at `rate` Hz gives."""
        return -(-self.samples * rate // self.rate)


@dataclass(frozen=True, slots=True)
class AudioRequest:
    """The sampling rate, in Hz, that an encoder reads."""

    rate: int


class Sound(NamedTuple):
    """What `Audio.load` brings: mono float32 `samples` at the file's own `rate`."""

    samples: Samples
    rate: int


@dataclass(frozen=True, slots=True)
class _Found:
    """A stream's header, where its cut begins, and what its length may be held to."""

    header: AudioHeader
    first: int
    origin: float
    whole: bool
    """Whether the stream must really give these samples; a film's sound may begin late or end
    early, and is silent there."""


@dataclass(frozen=True, slots=True, eq=False)
class Audio(MediaPart):
    """A sound.

    Args:
        source: A path, a file's bytes, or an array (samples,) or (channels, samples); arrays are
            not copied: do not write to them afterwards. Of a film, its sound is read.
        rate: Of an array, in Hz; files say their own.
        start, end: Seconds; only what lies between is decoded. None is the file's own end.

    Raises:
        MediaError: the source is none of these, or the cut has no length.
    """

    source: AudioSource
    rate: int | None = None
    start: float = 0.0
    end: float | None = None

    medium: ClassVar[str] = "audio"

    def __post_init__(self) -> None:
        if isinstance(self.source, np.ndarray):
            self._check_array(self.source)
        elif not isinstance(self.source, STORED):
            raise self._error(
                f"a sound must be a path, bytes or an array; it is {type(self.source).__name__}"
            )
        elif self.rate is not None:
            raise self._error("a sound's file says its own rate; leave out rate")
        check_cut(self.file, "sound", self.start, self.end)

    def __eq__(self, other: object) -> bool:
        """Paths and bytes compare by value, with their cut; arrays only with themselves."""
        if not isinstance(other, Audio):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        where = id(self.source) if isinstance(self.source, np.ndarray) else self.source
        return type(self.source), where, self.rate, self.start, self.end

    @property
    def file(self) -> str:
        if isinstance(self.source, np.ndarray):
            return f"<array {self.source.shape}>"
        return name_of(self.source) if isinstance(self.source, STORED) else ""

    @property
    def cut(self) -> str:
        return cut_name(self.start, self.end)

    @property
    def in_memory(self) -> bool:
        return isinstance(self.source, np.ndarray)

    def header(self, limits: Limits = Limits()) -> AudioHeader:  # noqa: B008  (frozen)
        """Length, rate and channels, without decoding.

        Formats that only estimate their length (MP3, raw G.722, streams) are counted by packet.

        Raises:
            MediaError: the file is missing, empty, over a limit or holds no sound.
        """
        if isinstance(self.source, np.ndarray):
            return self._of_array(self.source, limits).header
        size = self._size(limits)
        with containers.opened(self.source, "sound", limits) as container:
            return self._describe(container, size, limits).header

    def load(self, limits: Limits, wanted: AudioRequest | None = None) -> Sound:  # noqa: ARG002
        """The sound at its own rate, with exactly the header's samples.

        Where decoding gives slightly fewer, as coders that fill whole frames do, silence follows.

        Raises:
            MediaError: as for `header`, or the file is cut off, or cannot be decoded.
        """
        if isinstance(self.source, np.ndarray):
            found = self._of_array(self.source, limits)
            rows = np.atleast_2d(self.source)
            rows = rows[:, found.first : found.first + found.header.samples]
            with reading(self.file, "sound", "read"):
                return Sound(to_mono(rows), found.header.rate)
        size = self._size(limits)
        with containers.opened(self.source, "sound", limits) as container:
            found = self._describe(container, size, limits)
        with containers.opened(self.source, "sound", limits) as container:
            header, stream = found.header, containers.sound_stream(container)
            samples, given = read_samples(
                container, stream, found.first, header.samples, header.rate, found.origin
            )
            if found.whole:
                self._check_given(header, given)
            return Sound(samples, header.rate)

    def finish(self, loaded: Sound, wanted: AudioRequest | None = None) -> Samples:
        """Float32 (samples,) at the wanted rate, or at the file's own."""
        rate = loaded.rate if wanted is None else wanted.rate
        return resample(loaded.samples, loaded.rate, rate)

    def digest(self) -> str:
        """SHA-256, in hex, of the file's bytes, or of the array, its shape and rate."""
        if not isinstance(self.source, np.ndarray):
            return digest_of(self.source, "sound")
        facts = f"plait samples {self.source.shape} {self.source.dtype.str} {self.rate}"
        digest = hashlib.sha256(facts.encode())
        digest.update(np.ascontiguousarray(self.source).data)
        return digest.hexdigest()

    def _size(self, limits: Limits) -> int:
        assert not isinstance(self.source, np.ndarray)
        return size_of(self.source, "sound", limits.max_audio_bytes, "max_audio_bytes")

    def _check_array(self, array: NDArray[Any]) -> None:
        channels = array.shape[0] if array.ndim == 2 else 1
        if array.ndim not in (1, 2) or channels > _MOST_CHANNELS:
            raise self._error(
                "a sound array must be (samples,) or (channels, samples); it is "
                f"{array.shape}; transpose or reshape it"
            )
        if array.size == 0:
            raise self._error(f"a sound must have samples; this array is {array.shape}")
        if array.dtype.kind not in "iuf":
            raise self._error(
                f"a sound array must hold integers or floats; it is {array.dtype}; convert it"
            )
        if self.rate is None:
            raise self._error("an array of samples needs its rate, in Hz; give rate")

    def _of_array(self, array: NDArray[Any], limits: Limits) -> _Found:
        rows = np.atleast_2d(array)
        assert self.rate is not None
        facts = (self.rate, rows.shape[0], "array", array.nbytes)
        return self._cut(rows.shape[1], facts, 0.0, True, limits)

    def _describe(self, container: Any, size: int, limits: Limits) -> _Found:
        """What the streams' headers say, checked against the limits and the file's size."""
        stream = containers.sound_stream(container)
        if stream is None:
            raise self._error("it must hold sound; this file has none; mend the row")
        context, film = stream.codec_context, containers.film_stream(container)
        rate, channels = int(context.sample_rate or 0), int(context.layout.nb_channels)
        if rate not in RATES or channels < 1:
            raise self._error(
                f"a sound must have a channel and {RATES.start:,} to {RATES.stop - 1:,} Hz; this "
                f"one has {channels} channels at {rate:,} Hz; convert it"
            )
        begin = stream if film is None else film
        origin = float((begin.start_time or 0) * begin.time_base)
        most = self.start + limits.max_audio_seconds if self.end is None else self.end
        seconds = containers.sound_seconds(container, stream, film, most)
        form = containers.format_of(container)
        if form == "wav" and not isinstance(self.source, np.ndarray):
            containers.check_wav(self.source, size)
        facts = (rate, channels, form, size)
        return self._cut(round(seconds * rate), facts, origin, film is None, limits)

    def _cut(
        self,
        total: int,
        facts: tuple[int, int, str, int],
        origin: float,
        whole: bool,
        limits: Limits,
    ) -> _Found:
        rate = facts[0]
        if rate not in RATES:
            raise self._error(
                f"a sound must have {RATES.start:,} to {RATES.stop - 1:,} Hz; it has {rate:,}"
            )
        first = round(self.start * rate)
        last = total if self.end is None else min(total, round(self.end * rate))
        if last <= first:
            raise self._error(
                f"a sound must have samples between its start and end; this one is {total / rate:g}"
                f" s long, and is read from {self.start:g} s; mend the row"
            )
        header = AudioHeader(last - first, *facts)
        if header.seconds > limits.max_audio_seconds:
            raise self._error(
                f"a sound must have at most {limits.max_audio_seconds:g} s; this one has "
                f"{header.seconds:g} s; cut it by start and end, or raise max_audio_seconds"
            )
        if header.samples > limits.max_audio_samples:
            raise self._error(
                f"a sound must have at most {limits.max_audio_samples:,} samples; this one has "
                f"{header.samples:,}; cut it by start and end, or raise max_audio_samples"
            )
        return _Found(header, first, origin, whole)

    def _check_given(self, header: AudioHeader, given: int) -> None:
        missing = header.samples - given
        if missing > 0.05 * header.samples and missing > min(
            0.5 * header.rate, 0.5 * header.samples
        ):
            raise self._error(
                f"a sound must be as long as its header says, {header.seconds:g} s; this one gives "
                f"{given / header.rate:g} s; it is cut off: replace the file"
            )

    def _error(self, message: str) -> MediaError:
        return MediaError(message, Origin(file=self.file))

"""Sounds: paths, bytes and arrays, all read to mono float32 at the rate that an encoder asks.

PyAV reads whatever FFmpeg does, the sound of a film too. Shape letters: C channels, S samples.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from plait.errors import MediaError, Origin
from plait.modalities.containers import describe, opened, reading, size_of
from plait.modalities.limits import Limits
from plait.modalities.part import MediaHeader, MediaPart

AudioSource = str | Path | bytes | NDArray[Any]

_EXACT = ("wav", "w64", "flac", "ogg", "mov,mp4", "matroska", "aiff", "au", "caf", "g722")
"""Containers whose header gives the length, and that are sought in exactly; the packets of others
are counted."""

_PREROLL_SECONDS = 0.5
"""Decoded before a cut: overlapping transforms (AAC, Vorbis, Opus) need what came before."""

_LEAST_BITS_A_SECOND = 300
"""No codec for speech needs fewer: a header that claims a longer sound lies."""

_SLACK_SECONDS, _SLACK_SHARE = 0.5, 0.05
"""How far the decoded length may be from the header's; the decoder's delay is a few hundredths."""


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
    """Mono float32 (S,) and its rate in Hz."""

    samples: NDArray[np.float32]
    rate: int


@dataclass(frozen=True, slots=True, eq=False)
class Audio(MediaPart):
    """A sound.

    Args:
        source: A path, a file's bytes, or an array (S,) or (C, S), floats of -1 to 1 or integers.
        rate: Of an array, in Hz; files say their own.
        start, end: Seconds; only what lies between is decoded. None is the file's own end.

    Raises:
        MediaError: the source is none of these. What a path leads to is only read later.
    """

    source: AudioSource
    rate: int | None = None
    start: float = 0.0
    end: float | None = None

    medium: ClassVar[str] = "audio"

    def __post_init__(self) -> None:
        if isinstance(self.source, np.ndarray):
            self._check_array(self.source)
        elif not isinstance(self.source, str | Path | bytes):
            raise self._error(
                f"a sound must be a path, bytes or an array; it is {type(self.source).__name__}"
            )
        elif self.rate is not None:
            raise self._error("a sound's file says its own rate; leave rate out")
        if not (self.start >= 0 and (self.end is None or self.start < self.end)):
            raise self._error(
                f"a cut must go from a start of 0 or more to a later end; it goes from "
                f"{self.start} to {self.end}"
            )

    def __eq__(self, other: object) -> bool:
        """Paths and bytes compare by value; sounds in memory only with themselves."""
        if not isinstance(other, Audio):
            return NotImplemented
        return self._facts() == other._facts()

    def __hash__(self) -> int:
        return hash(self._facts())

    def _facts(self) -> tuple[Any, ...]:
        held = id(self.source) if isinstance(self.source, np.ndarray) else self.source
        return type(self.source), held, self.rate, self.start, self.end

    @property
    def file(self) -> str:
        return describe(self.source)

    @property
    def cut(self) -> str:
        return "" if (self.start, self.end) == (0.0, None) else f"{self.start}:{self.end}"

    def header(self, limits: Limits = Limits()) -> AudioHeader:  # noqa: B008  (frozen)
        """Length, rate and channels, without decoding.

        Where the file gives no length that can be believed, its packets are counted.

        Raises:
            MediaError: the file is missing, empty, over a limit or holds no sound.
        """
        if isinstance(self.source, np.ndarray):
            channels = 1 if self.source.ndim == 1 else self.source.shape[0]
            rate = int(self.rate or 0)
            whole = AudioHeader(self.source.shape[-1], rate, channels, "array", self.source.nbytes)
        else:
            size = size_of(self.source, "audio", limits.max_audio_bytes)
            with opened(self.source, "audio") as container:
                whole = sound_header(container, size, limits)
        return self._cut(whole, limits)

    def load(self, limits: Limits, wanted: AudioRequest | None = None) -> Sound:
        """Mono float32 (S,) at the file's own rate; S is the header's samples.

        Raises:
            MediaError: as for `header`, or the sound cannot be decoded.
        """
        del wanted  # resampling is `finish`'s
        header = self.header(limits)
        first = round(self.start * header.rate)
        if isinstance(self.source, np.ndarray):
            held = np.atleast_2d(self.source[..., first : first + header.samples])
            return Sound(mono(held), header.rate)
        with opened(self.source, "audio") as container:
            samples = _decoded(container, header, first, cut_off=self.end is not None)
        return Sound(samples, header.rate)

    def finish(self, loaded: Sound, wanted: AudioRequest | None = None) -> NDArray[np.float32]:
        """Resampled to the rate wanted, by torchaudio's windowed sinc."""
        if wanted is None or wanted.rate == loaded.rate:
            return loaded.samples
        import torch
        from torchaudio.functional import resample

        held = torch.from_numpy(loaded.samples)
        made: NDArray[np.float32] = resample(held, loaded.rate, wanted.rate).numpy()
        return made

    def digest(self) -> str:
        """SHA-256, in hex, of the file's bytes, or of the array with its shape and rate."""
        if isinstance(self.source, np.ndarray):
            facts = f"plait sound {self.source.shape} {self.source.dtype} {self.rate}"
            digest = hashlib.sha256(facts.encode())
            digest.update(np.ascontiguousarray(self.source).data)
            return digest.hexdigest()
        return file_digest(self.source, "audio")

    def _cut(self, whole: AudioHeader, limits: Limits) -> AudioHeader:
        first = round(self.start * whole.rate)
        last = whole.samples if self.end is None else round(self.end * whole.rate)
        samples = min(last, whole.samples) - first
        if samples < 1:
            raise self._error(
                f"a sound must have samples; this one has {whole.seconds:.2f} s and is read from "
                f"{self.start} s; mend its start or replace it"
            )
        if samples / whole.rate > limits.max_audio_seconds:
            raise self._error(
                f"a sound must have at most {limits.max_audio_seconds:g} s; this one has "
                f"{samples / whole.rate:.0f}; cut it with start and end, or raise "
                "max_audio_seconds"
            )
        return AudioHeader(samples, whole.rate, whole.channels, whole.format, whole.bytes)

    def _check_array(self, array: NDArray[Any]) -> None:
        if array.ndim not in (1, 2) or array.dtype.kind not in "fiu":
            raise self._error(
                "a sound array must hold numbers, (samples,) or (channels, samples); it is "
                f"{array.dtype} {array.shape}"
            )
        if array.size == 0:
            raise self._error(f"a sound must have samples; this array is {array.shape}")
        if self.rate is None or self.rate < 1:
            raise self._error(f"a sound array needs its rate in Hz; rate is {self.rate}")

    def _error(self, message: str) -> MediaError:
        return MediaError(message, Origin(file=self.file))


def file_digest(source: str | Path | bytes, medium: str) -> str:
    """SHA-256, in hex, of a file's bytes."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with reading(medium, describe(source)), Path(source).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sound_header(container: Any, size: int, limits: Limits) -> AudioHeader:
    """The header of a container's first sound.

    Raises:
        MediaError: there is none, or it has no samples.
    """
    stream = next(iter(container.streams.audio), None)
    if stream is None:
        raise MediaError("a sound must be in the file; this one has none; take another file")
    rate, channels = int(stream.rate or 0), int(stream.channels or 0)
    if rate < 1 or channels < 1:
        raise MediaError(
            f"a sound must have a rate and channels; this one has {rate} Hz and {channels} "
            "channels; replace it"
        )
    samples = _claimed(container, stream, rate, size)
    if samples is None:
        samples = _counted(container, stream, rate, limits)
    if samples < 1:
        raise MediaError("a sound must have samples; this one has none; replace it")
    return AudioHeader(samples, rate, channels, container.format.name, size)


def is_exact(container: Any) -> bool:
    """Whether the container's times can be relied on."""
    return str(container.format.name).startswith(_EXACT)


def _claimed(container: Any, stream: Any, rate: int, size: int) -> int | None:
    """The samples that the header gives; None where it gives none that can be believed."""
    if not is_exact(container) or not stream.duration or stream.duration < 0:
        return None
    seconds = float(stream.duration * stream.time_base)
    if seconds * _LEAST_BITS_A_SECOND > 8 * size:
        return None
    return round(seconds * rate)


def _counted(container: Any, stream: Any, rate: int, limits: Limits) -> int:
    """The samples up to the end of the last packet; stops where the limit is passed."""
    first: float | None = None
    end = 0.0
    for packet in container.demux(stream):
        if packet.pts is None or packet.time_base is None:
            continue
        at = float(packet.pts * packet.time_base)
        first = at if first is None else first
        end = max(end, at + float((packet.duration or 0) * packet.time_base) - first)
        if end > 2 * limits.max_audio_seconds:
            break
    return round(end * rate)


def mono(samples: NDArray[Any]) -> NDArray[np.float32]:
    """(C, S) floats of -1 to 1, or integers of their type's range -> (S,)."""
    if samples.dtype.kind in "iu":
        facts = np.iinfo(samples.dtype)
        middle = 0 if samples.dtype.kind == "i" else (int(facts.max) + 1) // 2
        scaled = (samples.astype(np.float32) - middle) / (int(facts.max) - middle + 1)
    else:
        scaled = samples.astype(np.float32)
    mixed: NDArray[np.float32] = scaled.mean(axis=0, dtype=np.float32)
    return mixed


def _decoded(container: Any, header: AudioHeader, first: int, cut_off: bool) -> NDArray[np.float32]:
    """Samples [first, first + header.samples) of the container's first sound.

    Raises:
        MediaError: far fewer or, without an end, far more are there than the header said.
    """
    stream = container.streams.audio[0]
    origin = max(0, round(float((stream.start_time or 0) * stream.time_base) * header.rate))
    made = np.zeros(header.samples, dtype=np.float32)
    reached = 0
    if first and is_exact(container):
        before = max(0.0, (first + origin) / header.rate - _PREROLL_SECONDS)
        container.seek(int(before / float(stream.time_base)), stream=stream)
    for at, samples in _frames(container, stream, header, origin):
        place = at - first
        reached = max(reached, place + len(samples))
        inside = samples[max(0, -place) : max(0, len(made) - place)]
        if len(inside):
            made[max(0, place) : max(0, place) + len(inside)] = inside
        if reached >= len(made) and (cut_off or reached > 2 * len(made) + header.rate):
            break
    off = abs(min(reached, len(made)) - len(made)) if cut_off else abs(reached - len(made))
    if off > max(_SLACK_SECONDS * header.rate, _SLACK_SHARE * len(made)):
        raise MediaError(
            f"a sound must be as long as its header says, {len(made) / header.rate:.2f} s; it "
            f"decodes to {max(0, reached) / header.rate:.2f} s; save it again or remove the row"
        )
    return made


def _frames(
    container: Any, stream: Any, header: AudioHeader, origin: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(place of the first sample in the sound, mono samples) of each decoded frame."""
    place = 0
    for frame in container.decode(stream):
        if frame.sample_rate != header.rate:
            raise MediaError(
                f"a sound must keep its rate; this one goes from {header.rate} to "
                f"{frame.sample_rate} Hz; save it again"
            )
        if frame.pts is not None and frame.time_base is not None:
            place = round(float(frame.pts * frame.time_base) * header.rate) - origin
        held = frame.to_ndarray()
        if not frame.format.is_planar:
            held = held.reshape(-1, len(frame.layout.channels)).T
        yield place, mono(held)
        place += frame.samples

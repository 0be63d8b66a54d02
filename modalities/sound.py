"""From the packets of a sound to mono float32, and from one sampling rate to another."""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.errors import MediaError

Samples = NDArray[np.float32]

RATES = range(1_000, 768_001)
"""Sampling rates, in Hz, that are read."""

_PREROLL = 1.0
"""Seconds decoded before a cut: decoders that look back (MP3, AAC, Opus) have settled by then."""

_GAP = 0.2
"""Seconds that time stamps may jump ahead before the jump is taken for silence."""

_LARGEST_KERNEL = 4_000_000
"""Weights of the resampling filter; rates without a common factor would ask for billions."""


def to_mono(array: NDArray[Any]) -> Samples:
    """The mean over the channels of (channels, samples), integers scaled to -1 to 1.

    Raises:
        MediaError: a value is not finite, or the type holds no samples.
    """
    if array.dtype.kind not in "iuf":
        raise MediaError(f"samples must be integers or floats; they are {array.dtype}; convert it")
    mixed = array.mean(axis=0, dtype=np.float64) if len(array) > 1 else array[0].astype(np.float64)
    if array.dtype.kind == "i":
        mixed /= float(-int(np.iinfo(array.dtype).min))
    elif array.dtype.kind == "u":
        middle = float(1 << (8 * array.dtype.itemsize - 1))
        mixed = (mixed - middle) / middle
    mono: Samples = mixed.astype(np.float32)
    if not np.isfinite(mono).all():
        raise MediaError("samples must be finite numbers; this sound holds others; mend the file")
    return mono


def read_samples(
    container: Any, stream: Any, first: int, count: int, rate: int, origin: float
) -> tuple[Samples, int]:
    """Samples `first` to `first + count` of a stream, and how many of them it really gave.

    Args:
        origin: The second, on the container's clock, of sample 0.

    The rest is silence. Where `first` lies far in, the stream is sought and not read from 0.
    """
    sought = first > 2 * _PREROLL * rate and _seek(container, stream, first / rate + origin)
    found = _fill(_blocks(container, stream, sought), first, count, rate, origin, sought)
    if found is None:  # the seek gave no time, or one that is too late
        container.seek(0, backward=True)
        found = _fill(_blocks(container, stream, False), first, count, rate, origin, False)
    assert found is not None
    return found


def _seek(container: Any, stream: Any, second: float) -> bool:
    import av

    try:
        container.seek(
            math.floor((second - _PREROLL) / stream.time_base), stream=stream, backward=True
        )
    except (av.FFmpegError, OSError, OverflowError):
        return False
    return True


def _blocks(container: Any, stream: Any, sought: bool) -> Iterator[tuple[float | None, Any]]:
    """(second on the container's clock, frame) in order.

    Right after a seek a decoder may miss what came before; its errors count from its first frame.
    """
    import av

    settled = not sought
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except (av.error.InvalidDataError, av.error.EOFError):
            if settled:
                raise
            continue
        for frame in frames:
            settled = True
            yield (None if frame.pts is None else float(frame.pts * frame.time_base)), frame


def _fill(
    blocks: Iterator[tuple[float | None, Any]],
    first: int,
    count: int,
    rate: int,
    origin: float,
    sought: bool,
) -> tuple[Samples, int] | None:
    """None where a seek did not land at or before `first`, so that nothing can be placed."""
    out = np.zeros(count, np.float32)
    at: int | None = None
    for second, frame in blocks:
        if frame.sample_rate != rate:
            raise MediaError(
                f"a sound must keep one sampling rate; this one changes from {rate} Hz to "
                f"{frame.sample_rate} Hz; convert it"
            )
        placed = None if second is None else round((second - origin) * rate)
        if at is None:
            if sought and (placed is None or placed > first):
                return None
            at = placed or 0
        elif placed is not None and placed - at > _GAP * rate:
            at = placed
        if at >= first + count:
            break
        mono = to_mono(_by_channel(frame))
        low, high = max(at, first), min(at + len(mono), first + count)
        if low < high:
            out[low - first : high - first] = mono[low - at : high - at]
        at += len(mono)
    return out, max(0, min((at or 0) - first, count))


def _by_channel(frame: Any) -> NDArray[Any]:
    """(channels, samples), of planar and of interleaved formats."""
    array = frame.to_ndarray()
    channels = int(frame.layout.nb_channels)
    if channels < 1:
        raise MediaError("a sound must have a channel; this one has none; replace the file")
    return np.asarray(array if frame.format.is_planar else array.reshape(-1, channels).T)


def resample(samples: Samples, rate: int, wanted: int) -> Samples:
    """The same sound at another rate, by torchaudio's windowed sinc.

    ceil(len * wanted / rate) samples. Rates that share no factor are taken as the nearest ratio
    whose filter fits in memory; over an hour that moves the sound by a millisecond.
    """
    if rate == wanted:
        return samples
    import torch
    import torchaudio

    ratio = Fraction(rate, wanted)
    if ratio.numerator * ratio.denominator > _LARGEST_KERNEL:
        ratio = ratio.limit_denominator(max(1, math.isqrt(int(_LARGEST_KERNEL / ratio))))
    made = torchaudio.functional.resample(
        torch.from_numpy(samples), ratio.numerator, ratio.denominator
    ).numpy()
    return _exactly(made, -(-len(samples) * wanted // rate))


def _exactly(samples: Samples, count: int) -> Samples:
    if len(samples) >= count:
        return np.ascontiguousarray(samples[:count])
    return np.pad(samples, (0, count - len(samples)))

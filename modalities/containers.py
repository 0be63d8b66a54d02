"""Opening files for FFmpeg, with only the formats that hold one sound or film themselves."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from plait.errors import MediaError
from plait.modalities.limits import Limits
from plait.modalities.sources import Stored, open_stored, reading

FORMATS = (
    "wav", "w64", "aiff", "au", "caf", "flac", "mp3", "ogg", "g722", "aac", "ac3", "eac3", "amr",
    "ape", "tta", "wv", "mpc", "mpc8", "matroska", "webm", "mov", "mp4", "avi", "flv", "asf",
    "mpegts", "mpeg", "ivf", "nut", "mxf", "rm", "voc", "dv",
)  # fmt: skip
"""FFmpeg's demuxers that are let in. Play lists (hls, dash, concat) and numbered pictures read
other files, whose names the opened one chooses; devices and generators never end."""

_HEAD = 65_536
"""Bytes at the beginning of a WAV file in which its samples begin, or are not looked for."""

_LEAST_BYTES_A_SECOND = 25
"""No coder of sound gets below; silence in FLAC or Opus comes near."""

EXACT = frozenset({"wav", "w64", "aiff", "au", "caf", "flac", "ogg", "mov"})
"""Formats whose own length is that of their samples; the others only estimate it."""


@contextmanager
def opened(source: Stored, noun: str, limits: Limits) -> Iterator[Any]:
    """An `av.container.InputContainer` with its streams' headers read.

    Raises:
        MediaError: it cannot be opened, and whatever a block inside raises about a broken file.
    """
    # Importing costs time that a run without sound and film need not spend.
    import av

    options = {
        "format_whitelist": ",".join(FORMATS),
        "protocol_whitelist": "file",
        "max_pixels": str(limits.max_video_pixels),
        "max_samples": str(limits.max_audio_samples),
        # One file is one task: decoders' own threads would multiply the workers.
        "threads": "1",
    }
    with reading(source, noun, "read"), ExitStack() as stack:
        file = _openable(source)
        if not isinstance(file, str):
            stack.enter_context(closing(file))
        container = av.open(file, options=options, metadata_errors="replace")
        yield stack.enter_context(closing(container))


def format_of(container: Any) -> str:
    """The first of the names that FFmpeg gives the format ("mov" for "mov,mp4,m4a,...")."""
    return str(container.format.name).split(",")[0]


def film_stream(container: Any) -> Any | None:
    """The stream of moving pictures: not a cover, which sounds may carry."""
    found = container.streams.best("video")
    cover = found is not None and "attached_pic" in str(found.disposition)
    return None if found is None or cover or found.codec_context is None else found


def sound_stream(container: Any) -> Any | None:
    """The stream that FFmpeg would play."""
    found = container.streams.best("audio")
    return None if found is None or found.codec_context is None else found


def seconds_of(container: Any, stream: Any) -> float | None:
    """Of the stream, or else of the container; None where neither says it."""
    if stream.duration and stream.duration > 0:
        return float(stream.duration * stream.time_base)
    if container.duration and container.duration > 0:
        return float(container.duration) / 1_000_000
    return None


def counted_seconds(container: Any, stream: Any, most: float) -> float:
    """The length by its packets, of which none is decoded; the count ends a second after `most`.

    Raises:
        MediaError: it has no packet with a length.
    """
    ticks, first = 0, None
    for packet in container.demux(stream):
        if not packet.size:
            continue
        first = packet.pts if first is None else first
        ticks += max(packet.duration or 0, 0)
        if ticks * stream.time_base > most + 1:
            break
    # What decoders drop at the start (an MP3's delay) is no sample.
    dropped = max((stream.start_time or 0) - (first or 0), 0) if first is not None else 0
    if ticks <= dropped:
        raise MediaError("it must hold packets of some length; it has none; replace the file")
    return float((ticks - dropped) * stream.time_base)


def _openable(source: Stored) -> Any:
    if not isinstance(source, str | Path):
        return open_stored(source)
    path = str(Path(source).absolute())
    try:
        path.encode()
    except UnicodeEncodeError:  # FFmpeg takes UTF-8; other names are read through Python
        return open_stored(source)
    return f"file:{path}"


def sound_seconds(container: Any, stream: Any, film: Any | None, most: float) -> float:
    """The length of a sound, from its header where that can be believed, else by counting.

    Raises:
        MediaError: its header promises more uncompressed samples than the file has bytes.
    """
    if film is not None:
        # The rest of a film's clock is silence, so an estimate will do.
        known = seconds_of(container, stream) or seconds_of(container, film)
        if known is not None:
            return known
    said = float(stream.duration * stream.time_base) if (stream.duration or 0) > 0 else None
    alone = len(container.streams) == 1 and format_of(container) == "matroska"
    if said is None and alone:
        said = seconds_of(container, stream)
    if said is None or not (alone or format_of(container) in EXACT):
        return counted_seconds(container, stream, most)
    context, size = stream.codec_context, container.size
    pcm = context.name.startswith("pcm_") and context.format is not None
    if pcm and said * int(context.sample_rate) * _bits(context) / 8 > 1.05 * size + 4096:
        raise MediaError(
            f"its header must tell the truth: it promises {said:g} s, which {size:,} bytes cannot "
            "hold; the file is cut off or its header is wrong: replace the file"
        )
    if said > size / _LEAST_BYTES_A_SECOND:
        return counted_seconds(container, stream, most)
    return said


def check_wav(source: Stored, size: int) -> None:
    """FFmpeg takes a WAV file that is cut off for a shorter one; its header knows better.

    Raises:
        MediaError: the file ends before its samples do.
    """
    with open_stored(source) as file:
        head = file.read(_HEAD)
    at = 12
    while at + 8 <= len(head):
        length = int.from_bytes(head[at + 4 : at + 8], "little")
        if head[at : at + 4] == b"data":
            # Writers to a pipe cannot know the length and put one of these.
            streamed = length == 0 or length & 0x7FFF_FF00 == 0x7FFF_FF00
            if not streamed and at + 8 + length > size:
                raise MediaError(
                    f"a sound must be as long as its header says, {length:,} bytes; the file has "
                    f"{size - at - 8:,}; it is cut off: replace the file"
                )
            return
        at += 8 + length + length % 2


def _bits(context: Any) -> int:
    """Of one sample in all channels, as the file holds it: never less than a byte a channel."""
    digits = "".join(c for c in context.name.removeprefix("pcm_") if c.isdigit())
    return int(digits or 8) * max(1, int(context.layout.nb_channels))

"""From a sample to the files of a shard: a row as JSON, and its media beside it."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from plait.datasets.records.dialects.base import MEDIA_KEYS
from plait.datasets.records.media import medium_of
from plait.errors import DataError
from plait.modalities import Image, Limits, MediaHeader, MediaPart, Part, Text
from plait.modalities.sources import STORED, FileSlice, Stored, read_stored, reading
from plait.stream import Message, Sample

_KEY_OF = {medium: key for key, medium in MEDIA_KEYS.items()}
_USUAL_ENDING = {"image": ".png", "audio": ".wav", "video": ".mp4"}


ReadHeader = Callable[[MediaPart, Limits], MediaHeader]


@dataclass(slots=True)
class Files:
    """The files of one sample, by suffix; the same bytes are kept once."""

    limits: Limits
    header: ReadHeader
    held: dict[str, bytes] = field(default_factory=dict)
    _known: dict[Any, str] = field(default_factory=dict)

    def add(self, part: MediaPart, source: Stored) -> str:
        """The suffix under which a part's file stands.

        Raises:
            MediaError: its header cannot be read.
        """
        header = self.header(part, self.limits)
        known = self._known.get(source)
        if known is None:
            with reading(source, "file", "read"):
                content = read_stored(source)
            known = self._known[source] = self.put(content, _ending(source, part.medium, header))
        return known

    def put(self, content: bytes, ending: str) -> str:
        """The suffix of new bytes."""
        suffix = f"{len(self.held)}{ending}"
        self.held[suffix] = content
        return suffix


def files_of(
    documents: Sequence[Sample], limits: Limits, header: ReadHeader, *, captioned: bool = False
) -> dict[str, bytes]:
    """The files of one row, by suffix.

    Args:
        documents: One sample; of a preference row the chosen and the rejected one.
        header: Reads the header of a medium that lies in a file, which proves it readable.
        captioned: Write a medium and its caption as such, so that how captions become samples can
            still be chosen when the shard is read.

    Raises:
        DataError: a medium cannot be read, or the row says what no row of a shard can.
    """
    files = Files(limits, header)
    if len(documents) > 1:
        row = _pair(documents, files)
    elif captioned:
        row = _caption(documents[0], files)
    else:
        row = _single(documents[0], files)
    return {"json": json.dumps(row, ensure_ascii=False).encode("utf-8"), **files.held}


def _single(sample: Sample, files: Files) -> dict[str, Any]:
    lists: dict[str, list[Any]] = {}
    row: dict[str, Any] = {"id": sample.id}
    if sample.label:
        row["label"] = sample.label
    if sample.messages:
        row["messages"] = [_turn(message, lists, files) for message in sample.messages]
    else:
        row["text"] = _content(sample.parts, lists, files)
    return row | lists


def _caption(sample: Sample, files: Files) -> dict[str, Any]:
    """A caption's row; the sample is what default options make of one."""
    (part,) = sample.media()
    text = "".join(p.text for p in sample.messages[-1].parts if isinstance(p, Text))
    return {"id": sample.id, "file": _named(part, files), "text": text, "class": sample.label}


def _pair(documents: Sequence[Sample], files: Files) -> dict[str, Any]:
    chosen, rejected = documents
    lists: dict[str, list[Any]] = {}
    row: dict[str, Any] = {"id": chosen.id.removesuffix("-chosen")}
    if chosen.label:
        row["label"] = chosen.label
    row["chosen"] = [_turn(message, lists, files) for message in chosen.messages]
    again: dict[str, list[Any]] = {}
    row["rejected"] = [_turn(message, again, files) for message in rejected.messages]
    if again != lists:
        raise DataError(
            "the two answers of a row must follow the same media; those of this row differ; write "
            "them as rows of their own"
        )
    return row | lists


def _turn(message: Message, lists: dict[str, list[Any]], files: Files) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role}
    turn["content"] = _content(message.parts, lists, files)
    if message.weight != 1.0:
        turn["weight"] = message.weight
    if message.tool_calls:
        turn["tool_calls"] = list(message.tool_calls)
    return turn


def _content(parts: Iterable[Part], lists: dict[str, list[Any]], files: Files) -> list[Any]:
    """Typed parts; each medium takes the next file of its list."""
    content: list[Any] = []
    for part in parts:
        if isinstance(part, Text):
            content.append({"type": "text", "text": part.text})
            continue
        lists.setdefault(_KEY_OF[part.medium], []).append(_named(part, files))
        content.append({"type": part.medium})
    return content


def _named(part: MediaPart, files: Files) -> Any:
    """What a row's list says of a medium: a file's suffix, or an object with a cut or a wish."""
    found = _WRITERS[part.medium](part, files)
    own = {key: value for key, value in found.items() if value is not None}
    return own["path"] if set(own) == {"path"} else own


def _picture(part: Any, files: Files) -> dict[str, Any]:
    if isinstance(part.source, STORED):
        return {"path": files.add(part, part.source)}
    return {"path": files.put(_png(part.load(files.limits)), ".png")}


def _sound(part: Any, files: Files) -> dict[str, Any]:
    if isinstance(part.source, STORED):
        cut = {"start": part.start or None, "end": part.end}
        return {"path": files.add(part, part.source), **cut}
    sound = part.load(files.limits)
    return {"path": files.put(_wav(sound.samples, sound.rate), ".wav")}


def _film(part: Any, files: Files) -> dict[str, Any]:
    found: dict[str, Any] = {"start": part.start or None, "end": part.end, "sound": part.sound}
    if part.sampling is not None:
        wish = part.sampling
        found |= {"fps": wish.fps, "max_frames": wish.max_frames, "count": wish.count}
    if isinstance(part.source, STORED):
        return {"path": files.add(part, part.source), **found}
    pictures = [one if isinstance(one, Image) else Image(one) for one in part.source]
    frames = [_picture(picture, files)["path"] for picture in pictures]
    return {"frames": frames, **found, "fps": part.fps}


_WRITERS = {"image": _picture, "audio": _sound, "video": _film}


def _ending(source: Stored, medium: str, header: MediaHeader) -> str:
    """What the file's own name ends in, or else its format, where that is an ending of media."""
    name = source.name if isinstance(source, FileSlice) else source
    own = "" if isinstance(name, bytes) else Path(name).suffix.lower()
    known = (ending for ending in (own, f".{header.format.lower()}") if medium_of(f"x{ending}"))
    return next(known, _USUAL_ENDING[medium])


def _png(pixels: Any) -> bytes:
    held = BytesIO()
    PIL.Image.fromarray(pixels).save(held, "PNG")
    return held.getvalue()


def _wav(samples: Any, rate: int) -> bytes:
    """Mono float32 as it is."""
    import av

    held = BytesIO()
    with av.open(held, "w", format="wav") as container:
        stream: Any = container.add_stream("pcm_f32le", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples)[None], format="flt", layout="mono"
        )
        frame.sample_rate = rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return held.getvalue()

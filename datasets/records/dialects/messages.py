"""Messages with roles, as OpenAI's API and most trainers write them.

    {"messages": [{"role": "user", "content": "<image>What is this?"},
                  {"role": "assistant", "content": "A frog."}],
     "images": ["frog.png"]}

Each `<image>`, `<audio>` or `<video>`, in the order of reading, is the next file of `images`,
`audios` or `videos`. A content may also be a list of typed parts, which hold their own media. A
message's `weight` scales the loss of an assistant's turn.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from plait.datasets.records.dialects.base import COMMON, Dealer, Dialect, Draft
from plait.datasets.records.media import MediaFinder
from plait.datasets.records.values import (
    listed,
    refuse_misspelt,
    refuse_unknown,
    text_of,
    type_name,
    weight_of,
)
from plait.errors import DataError
from plait.modalities import Part, Text
from plait.stream import Message

MESSAGE_KEYS = ("role", "content", "weight", "loss_weight", "tool_calls", "tool_call_id", "name")
ROLES = ("system", "developer", "user", "assistant", "tool")


class Messages(Dialect):
    """One conversation a row."""

    name: ClassVar[str] = "messages"
    keys: ClassVar[tuple[str, ...]] = ("messages", *COMMON)

    def fits(self, keys: frozenset[str]) -> bool:
        return "messages" in keys and not keys & {"chosen", "rejected"}

    def draft(
        self,
        row: Mapping[str, Any],
        side: str,  # noqa: ARG002  (a row is one document)
        finder: MediaFinder,
    ) -> Draft:
        turns = listed(row, "messages")
        if not turns:
            raise DataError("a row must have messages; its list is empty; add one or remove it")
        dealer = Dealer.of_row(row, finder)
        messages = tuple(message(turn, dealer, finder) for turn in turns)
        dealer.check()
        return Draft(messages)


def message(turn: Any, dealer: Dealer, finder: MediaFinder) -> Message:
    """A turn of a row."""
    if not isinstance(turn, dict):
        raise DataError(
            f"a message must be an object with role and content; it is {type_name(turn)}; "
            'write {"role": ..., "content": ...}'
        )
    given = {key: value for key, value in turn.items() if value is not None}
    refuse_misspelt("message key", given, MESSAGE_KEYS)
    refuse_unknown("message key", list(given), MESSAGE_KEYS)
    calls = tuple(_call(call) for call in listed(given, "tool_calls"))
    content = given.get("content", "" if calls else None)
    role = given.get("role")
    if not isinstance(role, str):
        said = type_name(role) if "role" in given else "missing"
        raise DataError(f"a message's role must be a string; it is {said}; write it as one")
    refuse_unknown("role", [role], ROLES)
    if isinstance(content, list):
        parts = content_parts(content, dealer, finder)
    elif isinstance(content, str):
        parts = dealer.parts(content)
    else:
        said = type_name(content) if "content" in turn else "missing"
        raise DataError(
            f"a message's content must be a string or a list of parts; it is {said}; write it as "
            "one"
        )
    weight = weight_of(given, "weight" if "weight" in given else "loss_weight")
    return Message(role, parts, weight, calls)


def _call(call: Any) -> Mapping[str, Any]:
    """A tool call with its arguments as an object, which chat templates expect."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(
            'a tool call must be {"function": {"name": ..., "arguments": ...}}; it is '
            f"{json.dumps(call, default=str)[:80]}"
        )
    return {"type": "function", "function": {**function, "arguments": _arguments(function)}}


def _arguments(function: Mapping[str, Any]) -> Any:
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
    return arguments


def content_parts(content: list[Any], dealer: Dealer, finder: MediaFinder) -> tuple[Part, ...]:
    """What a content that is a list says."""
    return tuple(part for item in content for part in _part(item, dealer, finder))


def _part(item: Any, dealer: Dealer, finder: MediaFinder) -> tuple[Part, ...]:
    """A part of a content list; a text's own marks are read too."""
    if isinstance(item, str):
        return dealer.parts(item)
    kind = item.get("type") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(kind, str):
        raise DataError(
            f"a part of a content must be an object with a type; it is {type_name(item)}"
        )
    refuse_unknown("type of a content part", [kind], PART_TYPES)
    return PART_TYPES[kind]({k: v for k, v in item.items() if v is not None}, dealer, finder)


_Read = Callable[[Mapping[str, Any], Dealer, MediaFinder], tuple[Part, ...]]


def _text(item: Mapping[str, Any], dealer: Dealer, finder: MediaFinder) -> tuple[Part, ...]:  # noqa: ARG001  (one signature for all)
    key = "value" if "text" not in item and "value" in item else "text"
    if key not in item:
        raise DataError("a content part of type text must have a text; it is missing")
    said = text_of(item, key)
    return (Text(said),) if said else ()


def _media(medium: str, *keys: str) -> _Read:
    """A reader of parts that hold their file under one of `keys`, or take the next of the row."""

    def read(item: Mapping[str, Any], dealer: Dealer, finder: MediaFinder) -> tuple[Part, ...]:
        for key in keys:
            if key in item:
                refuse_unknown("key of a content part", list(item), ("type", "detail", key))
                return (finder.part(medium, _unwrapped(item[key])),)
        if medium in dealer.held:
            return dealer.parts(f"<{medium}>")
        raise DataError(
            f"a content part of type {item['type']!r} must hold its file under {keys[0]!r}, or the "
            f"row a list {medium}s; neither is there"
        )

    return read


def _unwrapped(value: Any) -> Any:
    """What OpenAI's API wraps: {"url": ...}, {"data": base64, "format": "wav"}."""
    if not isinstance(value, dict):
        return value
    bare = {key: held for key, held in value.items() if key not in ("detail", "format")}
    if set(bare) == {"data"}:
        return {"base64": bare["data"]}
    return bare["url"] if set(bare) == {"url"} else bare


_URLS = ("url", "path", "value")
PART_TYPES: dict[str, _Read] = {
    "text": _text,
    "image": _media("image", "image", "image_url", *_URLS),
    "image_url": _media("image", "image_url", *_URLS),
    "input_image": _media("image", "image_url", *_URLS),
    "audio": _media("audio", "audio", "audio_url", *_URLS),
    "audio_url": _media("audio", "audio_url", *_URLS),
    "input_audio": _media("audio", "input_audio", *_URLS),
    "video": _media("video", "video", "video_url", *_URLS),
    "video_url": _media("video", "video_url", *_URLS),
}
"""By the part's type; each reads it."""

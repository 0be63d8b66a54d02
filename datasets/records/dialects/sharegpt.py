"""ShareGPT and LLaVA: `conversations` of `from` and `value`.

{"conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                   {"from": "gpt", "value": "A frog."}],
 "image": "frog.png"}
"""

import json
from collections.abc import Mapping
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
from plait.stream import Message

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "system": "system",
    "developer": "developer",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Of the roles that `from` may name, what Plait calls them."""

CALLS = frozenset({"function_call", "tool_call"})
TURN_KEYS = ("from", "value", "role", "content", "weight", "loss_weight")
SINGLE = {"image": "image", "audio": "audio", "video": "video"}


class ShareGpt(Dialect):
    """One conversation a row, with media under `image` (one or a list) or `images`, and so on.

    Media of a row that marks no place stand before the first human turn's text.
    """

    name: ClassVar[str] = "sharegpt"
    keys: ClassVar[tuple[str, ...]] = ("conversations", "system", *SINGLE, *COMMON)

    def fits(self, keys: frozenset[str]) -> bool:
        return "conversations" in keys and not keys & {"chosen", "rejected", "messages"}

    def draft(
        self,
        row: Mapping[str, Any],
        side: str,  # noqa: ARG002  (a row is one document)
        finder: MediaFinder,
    ) -> Draft:
        dealer = Dealer.of_row(row, finder, **SINGLE)
        messages = conversation(row, dealer)
        first = next((n for n, turn in enumerate(messages) if turn.role == "user"), None)
        loose = dealer.unmarked() if first is not None else ()
        if first is not None and loose:
            turn = messages[first]
            messages[first] = Message(turn.role, (*loose, *turn.parts), turn.weight)
        dealer.check()
        return Draft(tuple(messages))


def conversation(row: Mapping[str, Any], dealer: Dealer) -> list[Message]:
    """The row's turns, its own `system` text first."""
    turns = listed(row, "conversations")
    if not turns:
        raise DataError("a row must have conversations; its list is empty; add one or remove it")
    system = text_of(row, "system")
    messages = [Message("system", dealer.parts(system))] if system else []
    return messages + [said(turn, dealer) for turn in turns]


def said(turn: Any, dealer: Dealer) -> Message:
    """One turn."""
    if not isinstance(turn, dict):
        raise DataError(
            f"a turn must be an object with from and value; it is {type_name(turn)}; "
            'write {"from": ..., "value": ...}'
        )
    given = {key: value for key, value in turn.items() if value is not None}
    refuse_misspelt("key of a turn", given, TURN_KEYS)
    refuse_unknown("key of a turn", list(given), TURN_KEYS)
    who, what = given.get("from", given.get("role")), given.get("value", given.get("content"))
    for key, value in (("from", who), ("value", what)):
        if not isinstance(value, str):
            raise DataError(f"a turn's {key} must be a string; it is {type_name(value)}")
    assert isinstance(who, str)
    assert isinstance(what, str)
    refuse_unknown("from", [who], ROLES)
    weight = weight_of(given, "weight" if "weight" in given else "loss_weight")
    if who in CALLS:
        return Message("assistant", (), weight, _calls(what))
    return Message(ROLES[who], dealer.parts(what), weight)


def _calls(text: str) -> tuple[Mapping[str, Any], ...]:
    """The calls that a turn's JSON holds, one or a list."""
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"a function_call must hold JSON; {error}; mend or remove it") from error
    calls = held if isinstance(held, list) else [held]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise DataError(
                f'a function_call must be {{"name": ..., "arguments": ...}}; it is {text[:80]!r}'
            )
    return tuple({"type": "function", "function": call} for call in calls)

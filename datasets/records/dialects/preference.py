"""Two answers to one prompt, the chosen and the rejected one: a group of two documents.

{"conversations": [{"from": "human", "value": "Hi"}],
 "chosen": {"from": "gpt", "value": "Hello!"}, "rejected": {"from": "gpt", "value": "What?"}}
{"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}
{"chosen": [... whole conversation], "rejected": [... whole conversation]}
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from plait.datasets.records.dialects.base import COMMON, Dealer, Dialect, Draft
from plait.datasets.records.dialects.messages import message
from plait.datasets.records.dialects.sharegpt import SINGLE, said
from plait.datasets.records.media import MediaFinder
from plait.datasets.records.values import listed, text_of, type_name
from plait.errors import DataError
from plait.modalities import Text
from plait.stream import Message

PROMPTS = ("conversations", "messages", "prompt", "question", "instruction")
_LONG = {"chosen": "chosen_messages", "rejected": "rejected_messages"}


class Preference(Dialect):
    """Of each side's conversation only the answer carries loss; the prompt is shown."""

    name: ClassVar[str] = "preference"
    keys: ClassVar[tuple[str, ...]] = (
        "chosen", "rejected", *_LONG.values(), *PROMPTS, "input", "system", *SINGLE, *COMMON,
    )  # fmt: skip
    sides: ClassVar[tuple[str, ...]] = ("chosen", "rejected")

    def fits(self, keys: frozenset[str]) -> bool:
        return {"chosen", "rejected"} <= keys or set(_LONG.values()) <= keys

    def draft(self, row: Mapping[str, Any], side: str, finder: MediaFinder) -> Draft:
        key = side if side in row else _LONG[side]
        if row.get(key) is None:
            raise DataError(f"a preference row must have {side}; it is missing; add or remove it")
        dealer = Dealer.of_row(row, finder, **SINGLE)
        prompt, answer = _prompt(row, dealer, finder), row[key]
        if isinstance(answer, list) and _whole(row, answer):
            prompt = [turn for turn in prompt if turn.role == "system" and text_of(row, "system")]
            dealer.used = dict.fromkeys(dealer.used, 0)
        if isinstance(answer, str):
            turns = [Message("assistant", dealer.parts(answer))]
        else:
            held = answer if isinstance(answer, list) else [answer]
            turns = [_turn(turn, dealer, finder) for turn in held]
        if not turns or turns[-1].role != "assistant":
            raise DataError(f"{side} must end with an assistant's turn; it does not; mend it")
        before = [replace(turn, weight=0.0) for turn in (*prompt, *turns[:-1])]
        messages = [*before, turns[-1]]
        first = next((n for n, turn in enumerate(messages) if turn.role == "user"), None)
        if first is not None and (loose := dealer.unmarked()):
            messages[first] = replace(messages[first], parts=(*loose, *messages[first].parts))
        dealer.check()
        return Draft(tuple(messages), side=side)


def _prompt(row: Mapping[str, Any], dealer: Dealer, finder: MediaFinder) -> list[Message]:
    system = text_of(row, "system")
    turns = [Message("system", (Text(system),))] if system else []
    key = next((key for key in PROMPTS if row.get(key) is not None), None)
    if key is None:
        return turns
    if isinstance(row[key], str) and not row[key].lstrip().startswith("["):
        asked = "\n".join(t for t in (text_of(row, key), text_of(row, "input")) if t)
        return [*turns, Message("user", dealer.parts(asked))]
    return turns + [_turn(turn, dealer, finder) for turn in listed(row, key)]


def _whole(row: Mapping[str, Any], answer: list[Any]) -> bool:
    """Whether a side repeats the prompt: then it is the whole conversation."""
    key = next((key for key in PROMPTS if row.get(key) is not None), None)
    if key is None or len(answer) < 2:
        return False
    prompt = row[key]
    if isinstance(prompt, list):
        return len(answer) > len(prompt) and answer[: len(prompt)] == prompt
    first = answer[0]
    return isinstance(first, dict) and prompt in (first.get("content"), first.get("value"))


def _turn(turn: Any, dealer: Dealer, finder: MediaFinder) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"a turn must be an object; it is {type_name(turn)}")
    return said(turn, dealer) if "from" in turn else message(turn, dealer, finder)

"""Reading what a row's keys hold, and saying plainly what is wrong with it."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from plait.errors import DataError, UnknownNameError
from plait.modalities import Text


def type_name(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else "a number")


def refuse_unknown(kind: str, keys: Sequence[str], known: Collection[str]) -> None:
    """Raise `DataError` for the first key that is not known, offering the nearest one."""
    for key in keys:
        if key not in known:
            raise DataError(str(UnknownNameError(kind, key, known)))


def refuse_misspelt(kind: str, keys: Collection[str], known: Collection[str]) -> None:
    """Raise `DataError` for a key that is one slip away from a known one, and offer that."""
    for key in keys:
        if key in known:
            continue
        meant = next((name for name in known if _one_slip(_plain(key), _plain(name))), None)
        if meant is not None:
            raise DataError(
                f"unknown {kind} {key!r}; did you mean {meant!r}? Rename it, or give what it holds "
                "another name"
            )


def _plain(key: str) -> str:
    """A key without capitals and plural."""
    return key.strip().lower().rstrip("s")


def _one_slip(key: str, name: str) -> bool:
    """Whether they are equal, have two neighbours swapped, or, where long, differ in one sign."""
    if key == name:
        return True
    begin = 0
    while begin < min(len(key), len(name)) and key[begin] == name[begin]:
        begin += 1
    one, other = key[begin:], name[begin:]
    if one[:2] == other[1::-1] and len(one) > 1 and one[2:] == other[2:]:
        return True
    rests = ((one[1:], other), (one, other[1:]), (one[1:], other[1:]))
    return min(len(key), len(name)) >= 4 and any(a == b for a, b in rests)


def listed(fields: Mapping[str, Any], key: str) -> list[Any]:
    """The list under a key, empty where it is absent; a cell of a table may hold it as JSON."""
    value = fields.get(key)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{key} must be a list; its text is no JSON: {error}") from error
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise DataError(f"{key} must be a list; it is {type_name(value)}; write it in brackets")
    return value


def text_of(fields: Mapping[str, Any], key: str) -> str:
    """The string under a key, "" where it is absent; a whole number is taken as its digits."""
    value = fields.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{key} must be a string; it is {type_name(value)}; write it in quotes")
    try:
        return Text(str(value)).text
    except DataError as error:
        raise DataError(f"{key}: {error.message}") from None


def weight_of(turn: Mapping[str, Any], key: str = "weight") -> float:
    """A message's weight in the loss, 1 where it has none."""
    weight = turn.get(key)
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise DataError(f"a message's weight must be a number; it is {type_name(weight)}")
    try:
        usable = math.isfinite(weight) and weight >= 0
    except OverflowError:  # JSON holds integers that no float does
        usable = False
    if not usable:
        said = f"{weight}"[:20]
        raise DataError(f"a message's weight must be 0 or more; it is {said}; use 0 to 1")
    return float(weight)

"""Plain nested values to dataclasses: an unknown key is refused, and the nearest one offered.

jsonargparse checks the values' types and builds the same objects that Python code would.
"""

import re
import types
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from plait.errors import ConfigError, UnknownNameError
from plait.trainer.spec import ModelSpec

Kind = TypeVar("Kind")


def strictly(kind: type[Kind], values: Mapping[str, Any], where: str = "") -> Kind:
    """An object of a dataclass, from what YAML or JSON hold.

    Args:
        where: The section that these values stand in, for messages.

    Raises:
        ConfigError: a key is unknown, or a value does not fit.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    _refuse_unknown(kind, values, where)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--run", type=kind)
    try:
        made: Kind = parser.instantiate(parser.parse_object({"run": deepcopy(dict(values))})).run
    except (ArgumentError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        told = _readable(error)
        place = f"{where}." if where else ""
        raise ConfigError(f"a value of the recipe does not fit: {place}{told}") from error
    assert isinstance(made, kind)
    return made


def spec_from(values: Mapping[str, Any]) -> ModelSpec:
    """A model specification from plain values, as a checkpoint's manifest holds it."""
    return strictly(ModelSpec, values, "model")


def _refuse_unknown(kind: type[Any], values: Any, where: str) -> None:
    if values is None:
        return
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a section with keys; it is {values!r}")
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    for key, value in values.items():
        if key not in known:
            raise UnknownNameError(f"key in {where or 'the recipe'}", str(key), known)
        path = f"{where}.{key}" if where else key
        if value is None and not _takes_null(hints[key]):
            raise ConfigError(f"{path} must have a value; it is empty")
        _descend(hints[key], value, path)


def _takes_null(hint: Any) -> bool:
    return hint is Any or type(None) in get_args(hint)


def _descend(hint: Any, value: Any, where: str) -> None:
    """Check the keys inside a field that is a dataclass, an optional one, or a mapping of them."""
    arguments = get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        _refuse_unknown(hint, value, where)
    elif get_origin(hint) in (Union, types.UnionType):
        for option in arguments:
            _descend(option, value, where)
    elif get_origin(hint) is list and isinstance(value, list):
        for number, inner in enumerate(value):
            _descend(arguments[0], inner, f"{where}.{number}")
    elif len(arguments) == 2 and is_dataclass(arguments[1]) and isinstance(value, Mapping):
        for key, inner in value.items():
            _descend(arguments[1], inner, f"{where}.{key}")


_NOISE = ("Does not validate", "Subtypes:", "Errors:", "Problem with given", "Given value",
          "Expected a <class 'NoneType'>")  # fmt: skip


def _readable(error: Exception) -> str:
    """`train.steps: Expected a <class 'int'>. Got value: ten`, of jsonargparse's nested message."""
    keys: list[str] = []
    rest: list[str] = []
    for line in str(error).splitlines():
        key = re.match(r'[\s-]*Parser key "([^"]+)":(.*)', line)
        keys += [key[1].removeprefix("run.")] if key else []
        text = (key[2] if key else line).strip(" -")
        rest += [text] if text and not text.startswith(_NOISE) else []
    return ": ".join(part for part in (".".join(keys), " ".join(rest)) if part)

"""Encoders by name: those built in, and those that installed packages bring.

A package adds one under the entry-point group `plait.encoders`; see README.md. Nothing is
imported before it is asked for.
"""

import importlib
import inspect
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from plait.encoders.base import Encoder
from plait.errors import ConfigError, UnknownNameError

GROUP = "plait.encoders"

_NAME = re.compile(r"[\w-]+")

BUILT_IN = {
    "efficientnet_lite": "plait.encoders.efficientnet_lite.encoder:EfficientNetLite",
    "hf_audio": "plait.encoders.hf_audio.encoder:HfAudio",
    "hf_video": "plait.encoders.hf_video.encoder:HfVideo",
    "hf_vision": "plait.encoders.hf_vision.encoder:HfVision",
    "mel": "plait.encoders.mel.encoder:Mel",
    "patches": "plait.encoders.patches.encoder:Patches",
    "sound_cnn": "plait.encoders.sound_cnn.encoder:SoundCnn",
    "tubelets": "plait.encoders.tubelets.encoder:Tubelets",
    "video": "plait.encoders.video.encoder:VideoFrames",
}


def names() -> list[str]:
    """Every name that `create` accepts."""
    return sorted(BUILT_IN.keys() | _installed().keys())


def create(name: str, /, **options: Any) -> Encoder:
    """The encoder registered as `name`, made with its options and frozen, in eval mode.

    Raises:
        UnknownNameError: nobody registered the name, or it takes no such option.
        ConfigError: two packages claim the name, or it cannot be made.

    The name is positional only, because an encoder has an option of that name: what it is called
    in a model that holds several.
    """
    make = _load(name)
    parameters = inspect.signature(make).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for option in options:
        if option not in parameters and not takes_any:
            raise UnknownNameError(f"option of encoder {name!r}", option, parameters)
    missing = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in options
    ]
    if missing:
        raise ConfigError(f"encoder {name!r} needs {' and '.join(missing)}; add it to its options")
    encoder = make(**options)
    if not isinstance(encoder, Encoder):
        raise ConfigError(
            f"encoder {name!r} must be a plait.encoders.base.Encoder; its package returned "
            f"{type(encoder).__name__}"
        )
    if not isinstance(encoder.name, str) or not _NAME.fullmatch(encoder.name):
        raise ConfigError(
            "what an encoder is called must be letters, digits, _ and -; the option 'name' of "
            f"{name!r} is {encoder.name!r}"
        )
    return encoder.set_trainable(False)


def _load(name: str) -> Callable[..., Any]:
    installed = _installed()
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        make: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        return make
    if name not in installed:
        raise UnknownNameError("encoder", name, names())
    entry = installed[name]
    try:
        loaded: Callable[..., Any] = entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"encoder {name!r} of an installed package cannot be imported from {entry.value!r}: "
            f"{error}; repair or remove that package"
        ) from error
    return loaded


def _installed() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        taken = BUILT_IN.get(entry.name) or (entry.name in found and found[entry.name].value)
        if taken and taken != entry.value:
            raise ConfigError(
                f"encoder names must be unique: {entry.name!r} is both {taken!r} and "
                f"{entry.value!r}; remove one package or rename its entry point"
            )
        found[entry.name] = entry
    return found

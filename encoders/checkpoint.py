"""Reading transformers checkpoints: nothing is downloaded, nothing of theirs runs or prints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from plait.encoders.quiet import without_loading_bars
from plait.errors import ConfigError

SAFE = {"local_files_only": True, "trust_remote_code": False}
"""For every `from_pretrained`. Weights are read with `use_safetensors=True` besides."""


@contextmanager
def reading_checkpoint(encoder: str, folder: Path) -> Iterator[None]:
    """Quiet loading, whose failures say what the encoder needs of a checkpoint folder.

    Raises:
        ConfigError: transformers could not read the folder.
    """
    try:
        with _without_load_report(), without_loading_bars():
            yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError, StrictDataclassError) as error:
        raise ConfigError(
            f"encoder {encoder!r} needs a checkpoint with config.json, preprocessor_config.json "
            f"and safetensors weights; {str(folder)!r} is not one: {str(error).splitlines()[0]}"
        ) from error


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Silence the list of weights of other towers and heads, which are not taken."""
    verbosity: Any = transformers_logging
    before = verbosity.get_verbosity()
    verbosity.set_verbosity_error()
    try:
        yield
    finally:
        verbosity.set_verbosity(before)

"""Weights from the model hub: safetensors, settings and tokenizer files, nothing that runs."""

import os
from pathlib import Path

from plait.datasets.fetch.progress import Progress
from plait.errors import ConfigError, FetchError

_SAFE_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


def from_hub(name: str, progress: Progress) -> Path:
    """The folder of a hub model's files in the hub's own cache, downloaded if they are not there.

    Raises:
        ConfigError: the hub has no such model, or HF_HUB_OFFLINE is set and it is not here.
        FetchError: the hub cannot be reached.
    """
    from huggingface_hub import constants, snapshot_download  # a second to import
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") == "1":
        return _local(name)
    progress.say(f"{name}: from the model hub")
    try:
        return Path(snapshot_download(name, allow_patterns=_SAFE_FILES))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"the hub has no model {name!r} that you may read; check its name, or log in with "
            "`hf auth login`"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise FetchError(
            f"cannot download {name!r} from the model hub: {_first_line(error)}; check the "
            "connection, or name a folder or a pip: package instead"
        ) from error


def _local(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_SAFE_FILES, local_files_only=True))
    except HFValidationError as error:
        raise ConfigError(
            f"a hub id must be one that the hub allows; {name!r} is not: {_first_line(error)}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"HF_HUB_OFFLINE is set and the model {name!r} is not on this machine; unset it, or "
            "name a folder or a pip: package"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

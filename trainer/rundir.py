"""A run's folder: whose it is, and how it is emptied."""

import json
import shutil
from pathlib import Path
from typing import Any

from plait.errors import CheckpointError, ConfigError
from plait.trainer.config import RunConfig, plain
from plait.trainer.files import write_json

_ANY = ("devices", "strategy")
"""Settings with which a run may go on whatever they were."""


def read_json(file: Path) -> Any:
    """The content of a JSON file that a run wrote.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}; start the run anew with --fresh"
        ) from error


def claim(folder: Path, config: RunConfig) -> None:
    """Make the folder this run's, or go on with it if it already is.

    Raises:
        ConfigError: it holds a run with another recipe.
    """
    file = folder / "run.json"
    if not file.is_file():
        write_json(file, plain(config))
        return
    saved, mine = decisive(read_json(file)), decisive(plain(config))
    if saved != mine:
        raise ConfigError(
            f"{folder} holds a run with another recipe ({_difference(saved, mine)}); choose "
            "another run_dir, or add --fresh to delete it"
        )


def decisive(recipe: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe decides the result: on how many devices it is computed does not."""
    return {key: value for key, value in recipe.items() if key not in _ANY}


def _difference(saved: Any, mine: Any, where: str = "") -> str:
    """The first setting that differs, as `train.steps: 200 there, 300 here`."""
    if isinstance(saved, dict) and isinstance(mine, dict):
        for key in sorted(set(saved) | set(mine)):
            if saved.get(key) != mine.get(key):
                inner = f"{where}.{key}" if where else key
                return _difference(saved.get(key), mine.get(key), inner)
    return f"{where}: {saved!r} there, {mine!r} here"


def empty(folder: Path) -> None:
    """Delete a run's folder, for --fresh.

    Raises:
        ConfigError: it is not a run's folder, so it is left alone.
    """
    if not folder.exists():
        return
    if any(folder.iterdir()) and not (folder / "run.json").is_file():
        raise ConfigError(f"{folder} is not a run's folder (it has no run.json); it is left alone")
    shutil.rmtree(folder)

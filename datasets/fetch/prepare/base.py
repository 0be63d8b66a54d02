"""What a preparing function returns, and how it becomes `rows.jsonl`."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.errors import FetchError

ROWS = "rows.jsonl"
"""The table that a prepared source holds."""

Folders = Mapping[str, Path]
"""By the name of the package, the folder of its data."""

Row = dict[str, Any]


@dataclass(slots=True)
class Prepared:
    """Rows made of fetched files.

    Media are named relative to the table. `links` are the names of links beside it and the
    folders they lead to, so that a row's paths are short and are those of every machine.
    """

    links: dict[str, Path]
    rows: list[Row] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """How many files or texts became no row, by reason."""


def row(name: str, prompt: str, answer: str, *, label: str = "", **media: Sequence[str]) -> Row:
    """One question and its answer.

    Args:
        name: The row's id, unique in its source: splits are a function of it.
        prompt: The user's turn, with marks where media stand.
        media: `images`, `audios`, `videos`: paths relative to the table.
    """
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    named = {"label": label} if label else {}
    return {"id": name, **named, "messages": turns, **{k: list(v) for k, v in media.items()}}


def write(prepared: Prepared, folder: Path, target: Path) -> None:
    """Write the table and its links into `folder`, which will be renamed to `target`.

    Raises:
        FetchError: there are no rows: the packages hold something else than this version knows.
    """
    if not prepared.rows:
        raise FetchError(
            f"{target.name} must have rows and its packages gave none; they differ from the ones "
            "that Plait knows: use a folder of your own"
        )
    for name, leads_to in prepared.links.items():
        (folder / name).symlink_to(os.path.relpath(leads_to, target), target_is_directory=True)
    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in prepared.rows)
    with (folder / ROWS).open("w", encoding="utf-8") as file:
        file.writelines(lines)


def first_line(file: Path) -> str:
    """A text file's first line; empty where it cannot be read as UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError):
        return ""

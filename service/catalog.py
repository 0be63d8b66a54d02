"""The models that a server offers, by the names that clients say."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from plait.errors import CheckpointError, ConfigError, UnknownNameError
from plait.ranges import check_number
from plait.service.errors import ServiceError
from plait.trainer.manifest import read_manifest
from plait.trainer.source import is_trained, weights_folder
from plait.trainer.spec import LoraSpec, ModelSpec, lora_targets
from plait.trainer.strict import spec_from

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LORA = {"rank", "seed", "train_unembed", "train_mlp", "train_attn"}
_MORE = {"alpha", "dropout", "train"}
"""What Plait's own client may say besides."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A model that the server has."""

    spec: ModelSpec
    weights: Path | None = None
    """The folder of a checkpoint that it begins with; None as its base models are."""


def offer_of_argument(argument: str) -> tuple[str, Offer]:
    """What `--model` names: `[NAME=]WHAT`, a recipe's file, what `plait train` made of one, the
    folder of a model, a hub id or a pip package.

    Raises:
        ConfigError: it is no model.
    """
    name, equals, what = argument.rpartition("=")
    if (equals and not name) or not what or any(one.isspace() for one in name):
        raise ConfigError(f"--model is [NAME=]WHAT, and a name has no spaces; got {argument!r}")
    path = Path(what)
    if what.endswith((".yaml", ".yml")):
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{path} is no recipe that can be read: {reason}") from error
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            raise ConfigError(f"{path} is no recipe: it has no section model")
        return name or path.stem, Offer(spec_from(values["model"]))
    short = path.absolute().name if path.exists() else what
    if is_trained(path):
        return name or short, _trained(path)
    _check_what(what)
    return name or short, Offer(ModelSpec(language=what, train=("language", "projector")))


def _trained(path: Path) -> Offer:
    """Which weights it is, is settled here, so that a run that trains on changes nothing."""
    folder = weights_folder(path).resolve()
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    return Offer(spec_from(manifest["spec"]), folder)


def _check_what(what: str) -> None:
    """As far as can be told at once, and by this process, which has no torch.

    Raises:
        ConfigError: it is no model.
    """
    folder = Path(what).expanduser()
    there = folder.is_dir() and any(folder.glob("*.safetensors"))
    elsewhere = what.startswith("pip:") or (_HUB_NAME.fullmatch(what) and not folder.exists())
    if not there and not elsewhere:
        raise ConfigError(
            "a model is a recipe (.yaml), a run of plait train, a folder with safetensors, a hub "
            f"id owner/model or pip:PACKAGE; {what!r} is none of them"
        )


def offered(models: Mapping[str, Offer], name: str) -> Offer:
    """
    Raises:
        ServiceError: this server has no such model.
    """
    if name not in models:
        raise ServiceError(str(UnknownNameError("model of this server", name, models)), 404)
    return models[name]


def training_spec(offer: Offer, lora: Any, run: str = "") -> tuple[ModelSpec, int]:
    """The model that a `lora_config` asks for, and its seed; where it says none, one of the run's
    own, which is the same when the request is sent again.

    Raises:
        ServiceError: something of it is unknown, or cannot be.
    """
    spec, seed = _asked_spec(offer.spec, lora, run)
    if offer.weights is not None:
        _check_begins(spec, offer.spec)
    return spec, seed


def _check_begins(asked: ModelSpec, trained: ModelSpec) -> None:
    """
    Raises:
        ServiceError: weights of the one cannot be those of the other.
    """
    if asked.train != trained.train:
        raise ServiceError(
            f"this model was trained with train={list(trained.train)}, and a run that begins with "
            f"its weights trains the same; got {list(asked.train)}", 422,
        )  # fmt: skip
    if trained.lora is None or asked.lora is None:
        if trained.lora is not asked.lora:
            kinds = ("without an adapter", "with one")
            was, other = kinds if trained.lora is None else reversed(kinds)
            raise ServiceError(
                f"this model was trained {was}, and a run that begins with its weights trains so, "
                f"too; this asks for a run {other}", 422,
            )  # fmt: skip
        return
    theirs, mine = asdict(trained.lora), asdict(asked.lora)
    for name in sorted(theirs.keys() - {"dropout"}):
        if theirs[name] != mine[name]:
            raise ServiceError(
                f"this model was trained with lora.{name} {theirs[name]}, and a run that begins "
                f"with its weights has the same; got {mine[name]}", 422,
            )  # fmt: skip


def _asked_spec(base: ModelSpec, lora: Any, run: str) -> tuple[ModelSpec, int]:
    if lora is None:
        return replace(base, lora=None), 0
    if not isinstance(lora, dict):
        raise ServiceError("lora_config is an object", 422)
    unknown = sorted(set(lora) - _LORA - _MORE)
    if unknown:
        raise ServiceError(f"lora_config has no {unknown[0]!r}", 422)
    try:
        check_number("lora_config.rank", lora.get("rank", 32), "[1, 1024]", whole=True)
        seed = lora.get("seed")
        if seed is not None:
            check_number("lora_config.seed", seed, "[0, 9223372036854775808)", whole=True)
        spec = replace(  # whether it is DoRA or rsLoRA is the recipe's to say
            base.lora or LoraSpec(),
            rank=lora.get("rank", 32),
            alpha=lora.get("alpha", 32.0),
            dropout=lora.get("dropout", 0.0),
            targets=lora_targets(
                lora.get("train_attn", True),
                lora.get("train_mlp", True),
                lora.get("train_unembed", True),
            ),
        )
        train = tuple(lora.get("train") or base.train)
        return replace(base, lora=spec, train=train), _seed_of(run) if seed is None else seed
    except (ConfigError, TypeError) as error:
        raise ServiceError(f"lora_config: {error}", 422) from error


def _seed_of(run: str) -> int:
    return int.from_bytes(hashlib.sha256(run.encode()).digest()[:6], "little")


def spec_values(spec: ModelSpec) -> dict[str, Any]:
    """As JSON, which `spec_from` reads."""
    return asdict(spec)


def sampled(offer: Offer) -> dict[str, Any]:
    """What the engine is told of it when it only samples."""
    if offer.weights is not None:
        return {"weights": str(offer.weights)}
    return {"spec": spec_values(replace(offer.spec, lora=None, train=("projector",)))}

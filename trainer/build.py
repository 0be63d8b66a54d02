"""From a `ModelSpec` to a model, its tokenizer and its layout."""

import hashlib
import json
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from plait.encoders import attention, checkpointing, projectors, registry, weights
from plait.encoders.base import Encoder
from plait.encoders.layouts.plain import PlainLayout
from plait.encoders.media_encoder import MediaEncoder
from plait.encoders.quiet import without_loading_bars
from plait.errors import ConfigError, ModelError, UnknownNameError
from plait.kernels.interval_attention import ROUTES
from plait.modalities import Limits
from plait.stream import Layout
from plait.trainer import checks, quantization
from plait.trainer.backbone import Backbone
from plait.trainer.base import Base
from plait.trainer.identity import hashes_of, text_hash
from plait.trainer.lora import add_lora
from plait.trainer.model import PlaitModel
from plait.trainer.spec import TOWER_PARTS, EncoderSpec, ModelSpec


@dataclass(slots=True)
class Built:
    """A model ready to train, with what renders its samples."""

    spec: ModelSpec
    model: PlaitModel
    tokenizer: Any
    layout: Layout
    lora: Any
    """The adapter's peft configuration, or None."""

    hashes: dict[str, str]
    """What a checkpoint must find again; see `plait.trainer.identity`."""

    seed: int
    """What adapters and projectors were drawn from."""

    limits: Limits
    """How large a media file may be."""

    base: Base
    """What it shares with other runs."""

    @property
    def trains_language(self) -> bool:
        """Whether the language model itself trains, which nobody else can then use."""
        return trains_language(self.spec)


def trains_language(spec: ModelSpec) -> bool:
    """Whether a run of `spec` needs a language model of its own."""
    return spec.trains("language") and spec.lora is None


def build(
    spec: ModelSpec,
    seed: int,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    *,
    trains: bool = True,
) -> Built:
    """Load every part of `spec`, for one run alone; see `attach`."""
    return attach(load_base(spec), spec, seed, limits, trains=trains)


def load_base(spec: ModelSpec, device: torch.device | None = None) -> Base:
    """The language model of `spec`, all of it frozen.

    Args:
        device: Where it computes; the CPU by default.

    Raises:
        ConfigError, FetchError: a name that leads to nothing usable.
        UnknownNameError: an attention route that does not exist.
        ModelError: a language model whose logits are of a kind that is not computed here.
    """
    if spec.attention not in ("auto", *ROUTES):
        raise UnknownNameError("model.attention", spec.attention, ("auto", *ROUTES))
    folder = weights.resolve(spec.language)
    tokenizer = load_tokenizer(folder)
    language = load_language(folder, spec.dtype, spec.quantize, device)
    language.requires_grad_(False)
    if trains_language(spec):
        language.float()
    language.to(device or "cpu")
    return Base(folder, Backbone(language), tokenizer, file_hash(folder))


def attach(
    base: Base,
    spec: ModelSpec,
    seed: int,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    *,
    trains: bool = True,
    adapter: str = "default",
) -> Built:
    """A run of `spec` on a language model; adapters and projectors are drawn from `seed`.

    The first run's language model is checked: what it computes here must be what transformers
    computes, and where packing would change its gradients, `Backbone.packs` is switched off.

    Args:
        trains: False freezes every part, for sampling alone; `spec` may then train nothing.
        adapter: What peft's layers call this run's adapter.

    Raises:
        ConfigError, FetchError: a name that leads to nothing usable.
        ModelError: a language model that is computed otherwise here than in transformers.
    """
    language = base.backbone.language
    tokenizer = copy(base.tokenizer)
    if spec.template is not None:
        tokenizer.chat_template = spec.template
    lora = None
    if trains_language(spec):
        language.requires_grad_(trains)
    elif spec.lora is not None and spec.trains("language"):
        base.backbone.share()
        lora = add_lora(language, language.get_output_embeddings(), spec.lora, seed, adapter)
        base.backbone.adapters_changed()
    generator = torch.Generator().manual_seed(seed)
    media = {
        medium: _media_encoder(base, medium, spec, generator, limits)
        for medium, encoder in spec.encoders.items()
    }
    _check_media(media)
    encoders = {encoder.name: encoder for encoder in media.values()}
    model = PlaitModel(base.backbone, encoders, adapter if lora is not None else None)
    model.to(base.backbone.device)
    _narrow(model, spec)
    _checkpoint(model, spec)
    if trains and not any(True for _ in model.trainable()):
        raise ConfigError(
            f"model.train names {', '.join(spec.train)}, but this model has no such part; nothing "
            "would train"
        )
    if not trains:
        for _, _, parameter in model.trainable():
            parameter.requires_grad_(False)
    stamped = [media[medium].name for medium, e in spec.encoders.items() if e.timestamps]
    layout = PlainLayout(media, timestamped=stamped)
    hashes = hashes_of(base.hash, tokenizer, layout, encoders)
    built = Built(spec, model, tokenizer, layout, lora, hashes, seed, limits, base)
    checks.check(built)
    base.backbone.attention_route = spec.attention  # only now: it may need the device it trains on
    return built


def _narrow(model: PlaitModel, spec: ModelSpec) -> None:
    """Freeze what a regular expression in `model.train` leaves out.

    Raises:
        ConfigError: it leaves nothing of its part.
    """
    left: dict[str, int] = {}
    for part, name, parameter in list(model.trainable()):
        inner = name.split(".", 1 if name.startswith("language.") else 2)[-1]
        chosen = spec.chooses(part, inner)
        parameter.requires_grad_(chosen)
        left[part] = left.get(part, 0) + chosen
        if not chosen:
            last = inner
    empty = [part for part, count in left.items() if not count]
    if empty:
        raise ConfigError(
            f"model.train chooses no parameter of {empty[0]}: {', '.join(spec.train)}; names are "
            f"like {last}"
        )


def _checkpoint(model: PlaitModel, spec: ModelSpec) -> None:
    """Switch activation checkpointing on where the spec wants it.

    Raises:
        ConfigError: a part's layers cannot be checkpointed.
    """
    towers = {TOWER_PARTS[model.media_encoder(name).encoder.medium]: model.media_encoder(name)
              for name in model.encoders}  # fmt: skip
    for part in spec.checkpointing:
        module = model.language if part == "language" else towers.get(part)
        if module is None or not checkpointing.switch_on(module):
            raise ConfigError(
                f"model.checkpointing names {part}, which this model "
                + ("lacks" if module is None else "cannot compute again layer by layer")
            )


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no tokenizer that loads: {error}") from error
    return tokenizer


def load_language(
    folder: Path, dtype: str, quantize: str | None = None, device: torch.device | None = None
) -> Any:
    """A causal language model whose attention is ours; safetensors only, and no code from disk.

    Args:
        quantize: "nf4" for linear layers in 4 bits, which are put on `device` at once.
    """
    from transformers import AutoModelForCausalLM

    attention.register()
    more = {} if quantize is None else quantization.options(folder, dtype, device)
    try:
        with without_loading_bars():
            language, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype) if quantize is None else torch.float32,
                attn_implementation=attention.NAME,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **more,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"{folder} holds no language model that loads from safetensors: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except KeyError as error:
        if error.args != (attention.NAME,):
            raise
        raise ModelError(
            f"a language model's attention must be replaceable, and that of {folder} is not; "
            "choose another family"
        ) from error
    if report["missing_keys"]:  # transformers would draw them at random
        raise ConfigError(
            f"a language model must have all of its weights; {folder} lacks "
            f"{len(report['missing_keys'])} of them, {min(report['missing_keys'])} among them; "
            "fetch it again"
        )
    dropout = getattr(language.config.get_text_config(), "attention_dropout", 0.0)
    if dropout:
        raise ModelError(
            f"attention dropout must be 0; {folder} sets {dropout}: edit its config.json"
        )
    if quantize is not None:
        quantization.settle(language, dtype)
    return language


def _media_encoder(
    base: Base, medium: str, model: ModelSpec, generator: torch.Generator, limits: Limits
) -> MediaEncoder:
    spec = model.encoders[medium]
    trains = model.trains(TOWER_PARTS.get(medium, ""))
    encoder = _tower(base, spec, trains)
    embedding = base.backbone.language.get_input_embeddings().weight
    pool = projectors.pool_of(spec.grid, spec.pool_frames)
    projector = projectors.create_projector(
        spec.projector,
        pool.width(encoder.width),
        embedding.shape[1],
        embedding_std=float(embedding.detach().float().std()),
        generator=generator,
        **spec.projector_options,
    )
    projector.requires_grad_(model.trains("projector"))
    return MediaEncoder(encoder, pool, projector, trains, limits)


def _tower(base: Base, spec: EncoderSpec, trains: bool) -> Encoder:
    """One that trains is the run's own; a frozen one serves all runs of the base."""
    options = dict(spec.options)
    if spec.weights is not None:
        options["weights"] = str(weights.resolve(spec.weights))

    def load() -> Encoder:
        return registry.create(spec.name, **options)

    key = json.dumps([spec.name, options], sort_keys=True, default=repr)
    return load() if trains else base.tower(key, load)


def _check_media(media: dict[str, MediaEncoder]) -> None:
    for medium, encoder in media.items():
        if encoder.encoder.medium != medium:
            raise ConfigError(
                f"model.encoders.{medium} names encoder {encoder.name!r}, which reads "
                f"{encoder.encoder.medium}; put it under {encoder.encoder.medium!r}"
            )


def parameter_counts(model: PlaitModel) -> dict[str, dict[str, int]]:
    """Trainable and frozen parameters of each part; adapters of other runs are not this one's."""
    counts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name and f".{model.adapter}." not in name:
            continue
        part = counts.setdefault(model.part_of(name), {"trainable": 0, "frozen": 0})
        kind = "trainable" if parameter.requires_grad else "frozen"
        part[kind] += quantization.elements(parameter)
    return counts


def file_hash(folder: Path) -> str:
    """SHA-256 over the names, and contents, of a model folder's weights and configuration."""
    manifest = folder / "manifest.json"
    if manifest.is_file():  # a converted package, whose source was checked when it was fetched
        facts = json.loads(manifest.read_text())
        facts.pop("libraries", None)  # of the conversion, which does not depend on them
        return text_hash(json.dumps(facts, sort_keys=True))
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

"""From a `ModelSpec` to a model, its tokenizer and its layout."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from plait.encoders import attention, projectors, registry, weights
from plait.encoders.layouts.plain import PlainLayout
from plait.encoders.media_encoder import MediaEncoder
from plait.encoders.quiet import without_loading_bars
from plait.errors import ConfigError, ModelError, UnknownNameError
from plait.kernels.interval_attention import ROUTES
from plait.modalities import Limits
from plait.stream import Layout
from plait.trainer import checks
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
    """What a checkpoint must find again: base model, encoders, template."""

    seed: int
    """What adapters and projectors were drawn from."""

    limits: Limits
    """How large a media file may be."""

    packing_difference: float = 0.0
    """How far packing changes this model's gradients, relatively; see `checks`."""

    packing_refusal: str | None = None
    """What this model says where it refuses a packed row."""


def build(
    spec: ModelSpec,
    seed: int,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    *,
    trains: bool = True,
) -> Built:
    """Load every part of `spec`; adapters and projectors are drawn from `seed`.

    The language model is checked: what it computes here must be what transformers computes, and
    where packing would change its gradients, `PlaitModel.packs` is switched off.

    Args:
        trains: False freezes every part: for sampling alone.

    Raises:
        ConfigError, FetchError: a name that leads to nothing usable.
        UnknownNameError: an attention route that does not exist.
        ModelError: a language model that is computed otherwise here than in transformers.
    """
    if spec.attention not in ("auto", *ROUTES):
        raise UnknownNameError("model.attention", spec.attention, ("auto", *ROUTES))
    folder = weights.resolve(spec.language)
    tokenizer = load_tokenizer(folder, spec.template)
    language = load_language(folder, spec.dtype)
    language.requires_grad_(False)
    lora = None
    if "language" in spec.train:
        if spec.lora is None:
            language.requires_grad_(True).float()
        else:
            lora = add_lora(language, language.get_output_embeddings(), spec.lora, seed)
    generator = torch.Generator().manual_seed(seed)
    media = {
        medium: _media_encoder(encoder, language, spec, generator, limits)
        for medium, encoder in spec.encoders.items()
    }
    _check_media(media)
    model = PlaitModel(language, {encoder.name: encoder for encoder in media.values()})
    if not any(True for _ in model.trainable()):
        raise ConfigError(
            f"model.train names {', '.join(spec.train)}, but this model has no such part; nothing "
            "would train"
        )
    if not trains:
        model.requires_grad_(False)
    hashes = {"language": file_hash(folder), "template": text_hash(tokenizer.chat_template or "")}
    for encoder in media.values():
        hashes[f"encoder:{encoder.name}"] = encoder.fingerprint()
    stamped = [media[medium].name for medium, e in spec.encoders.items() if e.timestamps]
    layout = PlainLayout(media, timestamped=stamped)
    built = Built(spec, model, tokenizer, layout, lora, hashes, seed, limits)
    checks.check_language(built)
    checks.check_packing(built)
    model.attention_route = spec.attention  # only now: a route may need the device it trains on
    return built


def load_tokenizer(folder: Path, template: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no tokenizer that loads: {error}") from error
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def load_language(folder: Path, dtype: str) -> Any:
    """A causal language model whose attention is ours; safetensors only, and no code from disk."""
    from transformers import AutoModelForCausalLM

    attention.register()
    try:
        with without_loading_bars():
            language, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                attn_implementation=attention.NAME,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
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
    return language


def _media_encoder(
    spec: EncoderSpec,
    language: Any,
    model: ModelSpec,
    generator: torch.Generator,
    limits: Limits,
) -> MediaEncoder:
    options = dict(spec.options)
    if spec.weights is not None:
        options["weights"] = str(weights.resolve(spec.weights))
    encoder = registry.create(spec.name, **options)
    embedding = language.get_input_embeddings().weight
    pool = projectors.pool_of(spec.grid, spec.pool_frames)
    projector = projectors.create_projector(
        spec.projector,
        pool.width(encoder.width),
        embedding.shape[1],
        embedding_std=float(embedding.detach().float().std()),
        generator=generator,
        **spec.projector_options,
    )
    projector.requires_grad_("projector" in model.train)
    trains = TOWER_PARTS[encoder.medium] in model.train
    return MediaEncoder(encoder, pool, projector, trains, limits)


def _check_media(media: dict[str, MediaEncoder]) -> None:
    for medium, encoder in media.items():
        if encoder.encoder.medium != medium:
            raise ConfigError(
                f"model.encoders.{medium} names encoder {encoder.name!r}, which reads "
                f"{encoder.encoder.medium}; put it under {encoder.encoder.medium!r}"
            )


def parameter_counts(model: PlaitModel) -> dict[str, dict[str, int]]:
    """Trainable and frozen parameters of each part."""
    counts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        part = counts.setdefault(model.part_of(name), {"trainable": 0, "frozen": 0})
        part["trainable" if parameter.requires_grad else "frozen"] += parameter.numel()
    return counts


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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

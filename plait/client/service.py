"""The client that makes clients."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from plait.client.paths import weights_folder
from plait.client.sampling import SamplingClient
from plait.client.training import TrainingClient
from plait.datasets.fetch import home
from plait.errors import ConfigError
from plait.modalities import Limits
from plait.trainer import checkpoint
from plait.trainer.build import Built, build
from plait.trainer.checks import packing_warning
from plait.trainer.config import spec_from
from plait.trainer.engine.controller import Engine, EngineSettings
from plait.trainer.spec import EncoderSpec, LoraSpec, ModelSpec

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class ServiceClient:
    """Creates training and sampling clients in this process.

    Args:
        folder: Where `save_state` puts its files; `$PLAIT_HOME/runs` by default.
        limits: How large a media file may be before it is refused.

    Raises:
        ConfigError: an address instead of a folder.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
    ) -> None:
        if isinstance(folder, str) and "://" in folder:
            raise ConfigError(
                "this version works in its own process and ServiceClient takes a folder; "
                f"{folder} is an address, which a later release will take: leave it out"
            )
        self.folder = Path(folder) if folder is not None else home() / "runs"
        self.limits = limits

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = False,
        user_metadata: Mapping[str, str] | None = None,
        *,
        alpha: float = 32.0,
        dropout: float = 0.0,
        encoders: Mapping[str, EncoderSpec] | None = None,
        template: str | None = None,
        train: Sequence[str] = ("language", "projector"),
        dtype: str = "float32",
        engine: EngineSettings | None = None,
    ) -> TrainingClient:
        """A training client with a LoRA adapter on the language model.

        Args:
            base_model: A folder, a hub id, or `pip:<distribution>`.
            seed: Draws the initial weights; 0 by default.
            user_metadata: Texts by name that the manifest of everything saved will hold.
            train_mlp, train_attn: Which linear layers get an adapter.
            train_unembed: An adapter on the output layer, which is refused here.
            encoders: An encoder per medium: `{"image": EncoderSpec(name=..., weights=...)}`.
            template: A chat template of one's own.
            train: The parts that train: "language", "projector", "vision".

        Raises:
            ConfigError: an option that is not supported, or a model that cannot be loaded.
        """
        if train_unembed:
            raise ConfigError("train_unembed is not supported: the output layer gets no adapter")
        targets = _targets(train_attn, train_mlp)
        spec = ModelSpec(
            language=base_model,
            encoders=dict(encoders or {}),
            template=template,
            lora=LoraSpec(rank=rank, alpha=alpha, dropout=dropout, targets=targets),
            train=tuple(train),
            dtype=dtype,  # type: ignore[arg-type]  # checked by ModelSpec
        )
        return self.create_training_client(spec, seed=seed, user_metadata=user_metadata,
                                           engine=engine)  # fmt: skip

    def create_training_client(
        self,
        spec: ModelSpec,
        *,
        seed: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
        engine: EngineSettings | None = None,
    ) -> TrainingClient:
        """A training client for a whole `ModelSpec`; full fine-tuning with `lora=None`."""
        metadata = dict(user_metadata or {})
        if not all(isinstance(word, str) for pair in metadata.items() for word in pair):
            raise ConfigError(f"user_metadata must be texts by name; it is {metadata}")
        built = self._build(spec, seed or 0)
        return TrainingClient(Engine(built, engine), self.folder, metadata)

    def create_sampling_client(
        self, model_path: str | Path | None = None, base_model: str | None = None
    ) -> SamplingClient:
        """A client that samples from saved weights, or from a base model.

        Args:
            model_path: A `tinker://` path that `save_state` returned, a checkpoint's folder, or
                the folder of a `plait train` run, whose best weights are used.
        """
        if (model_path is None) == (base_model is None):
            raise ConfigError("give either model_path or base_model")
        if model_path is None:
            spec = ModelSpec(language=str(base_model), train=("language",), lora=None)
            return SamplingClient(Engine(self._build(spec, 0, trains=False)), None)
        folder = weights_folder(str(model_path), self.folder)
        spec = spec_from(checkpoint.verify(folder)["spec"])
        built = self._build(spec, 0, trains=False)
        checkpoint.load(folder, built, with_state=False)
        return SamplingClient(Engine(built), None)

    def _build(self, spec: ModelSpec, seed: int, trains: bool = True) -> Built:
        built = build(spec, seed, self.limits, trains=trains)
        if warning := packing_warning(built):
            warnings.warn(warning, stacklevel=4)
        return built


def _targets(attention: bool, mlp: bool) -> tuple[str, ...]:
    if attention and mlp:
        return ("all-linear",)
    if not attention and not mlp:
        raise ConfigError("an adapter needs layers; set train_attn or train_mlp")
    return ATTENTION if attention else MLP

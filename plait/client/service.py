"""The client that makes clients."""

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from plait.client.futures import AsyncNames
from plait.client.sampling import SamplingClient
from plait.client.training import TrainingClient
from plait.errors import ConfigError
from plait.home import home
from plait.modalities import Limits
from plait.trainer.build import Built
from plait.trainer.checks import packing_warning
from plait.trainer.engine.controller import Engine, EngineSettings
from plait.trainer.manifest import verify
from plait.trainer.places import Place
from plait.trainer.source import Source
from plait.trainer.spec import EncoderSpec, LoraSpec, ModelSpec, lora_targets
from plait.trainer.store import Entry, Store
from plait.trainer.strict import spec_from
from plait.types import Checkpoint


class ServiceClient(AsyncNames):
    """Creates training and sampling clients in this process.

    Clients of one language model share its frozen weights; what they send is packed together.

    Args:
        folder: Where `save_state` keeps checkpoints; `$PLAIT_HOME/runs` by default. What killed
            processes left there is cleared away, and what expired. Or the address of a server
            (`plait serve`), whose runs these are then; see `plait.client.remote`.
        key: Of the caller, for a server; `$PLAIT_API_KEY` by default.
        limits: How large a media file may be before it is refused.
        devices: Ranks that train together, one on each GPU, or as so many processes on a CPU. They
            are started here; nothing else is to be run. As `engine` says where it is not given.
        strategy: How they share a model: "ddp", each has all of it, or "fsdp", the layers of the
            language model are cut into shards.
        engine: How much is computed and kept at once.
        clock: Seconds since the epoch, by which checkpoints expire.

    Raises:
        ConfigError: several devices where this process uses torch.distributed already, or
            settings with an address, where they are the server's.
    """

    def __new__(
        cls, folder: str | Path | None = None, key: str | None = None, **options: Any
    ) -> Any:
        """A client of a server, where an address is given."""
        if not (isinstance(folder, str) and "://" in folder):
            return super().__new__(cls)
        from plait.client.remote.service import RemoteServiceClient

        if not folder.startswith(("http://", "https://")):
            raise ConfigError(f"a server's address begins with http:// or https://; got {folder}")
        if options:
            raise ConfigError(f"{next(iter(options))} is the server's to choose: leave it out")
        return RemoteServiceClient(folder, key or os.environ.get("PLAIT_API_KEY"))

    def __init__(
        self,
        folder: str | Path | None = None,
        key: str | None = None,
        *,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
        devices: int | None = None,
        strategy: str | None = None,
        engine: EngineSettings | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if key is not None:
            raise ConfigError("a key is for a server; this client works in its own process")
        self.folder = Path(folder) if folder is not None else home() / "runs"
        self.limits = limits
        self._store = Store(self.folder, clock)
        self._store.open()
        settings = engine or EngineSettings()
        self._engine = Engine(
            replace(
                settings,
                devices=settings.devices if devices is None else devices,
                strategy=strategy or settings.strategy,
            )
        )

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
        quantize: str | None = None,
    ) -> TrainingClient:
        """A training client with a LoRA adapter on the language model.

        Args:
            base_model: A folder, a hub id, or `pip:<distribution>`.
            seed: Draws the initial weights; 0 by default.
            user_metadata: Texts by name that the manifest of everything saved will hold.
            train_mlp, train_attn: Which linear layers get an adapter.
            train_unembed: An adapter on the output layer too.
            encoders: An encoder per medium: `{"image": EncoderSpec(name=..., weights=...)}`.
            template: A chat template of one's own.
            train: The parts that train: "language", "projector", "vision".
            quantize: "nf4" keeps the language model's linear layers in 4 bits (QLoRA).

        Raises:
            ConfigError: an option that is not supported, or a model that cannot be loaded.
        """
        targets = lora_targets(train_attn, train_mlp, train_unembed)
        spec = ModelSpec(
            language=base_model,
            encoders=dict(encoders or {}),
            template=template,
            lora=LoraSpec(rank=rank, alpha=alpha, dropout=dropout, targets=targets),
            train=tuple(train),
            dtype=dtype,  # type: ignore[arg-type]  # checked by ModelSpec
            quantize=quantize,  # type: ignore[arg-type]
        )
        return self.create_training_client(spec, seed=seed, user_metadata=user_metadata)

    def create_training_client(
        self,
        spec: ModelSpec,
        *,
        seed: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> TrainingClient:
        """A training client for a whole `ModelSpec`; full fine-tuning with `lora=None`."""
        metadata = dict(user_metadata or {})
        if not all(isinstance(word, str) for pair in metadata.items() for word in pair):
            raise ConfigError(f"user_metadata must be texts by name; it is {metadata}")
        run, built = self._engine.create_run(spec, seed or 0, self.limits)
        _warn(built)
        return TrainingClient(self._engine, built, run, self._store, metadata)

    def create_training_client_from_state(
        self, path: str, *, user_metadata: Mapping[str, str] | None = None
    ) -> TrainingClient:
        """A training client that begins with saved weights, and a new optimiser."""
        return self._from_state(path, user_metadata, with_optimizer=False)

    def create_training_client_from_state_with_optimizer(
        self, path: str, *, user_metadata: Mapping[str, str] | None = None
    ) -> TrainingClient:
        """A training client that goes on exactly where the saved one was."""
        return self._from_state(path, user_metadata, with_optimizer=True)

    def _from_state(
        self, path: str, user_metadata: Mapping[str, str] | None, with_optimizer: bool
    ) -> TrainingClient:
        with Source(self._store, path).reading() as folder:
            manifest = verify(folder)
        metadata = manifest["user_metadata"] if user_metadata is None else user_metadata
        spec = spec_from(manifest["spec"])
        client = self.create_training_client(spec, user_metadata=metadata)
        load = client.load_state_with_optimizer if with_optimizer else client.load_state
        try:
            client.restored = load(path).result()
        except BaseException:
            client.close()
            raise
        return client

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
        source = None
        if model_path is None:
            spec = ModelSpec(language=str(base_model), train=("projector",), lora=None)
        else:
            source = Source(self._store, str(model_path))
            with source.reading() as folder:
                spec = spec_from(verify(folder)["spec"])
        view, built = self._engine.create_view(spec, source, self.limits)
        _warn(built)
        return SamplingClient(self._engine, built, view)

    def list_checkpoints(self) -> list[Checkpoint]:
        """All checkpoints in this client's folder, the oldest first."""
        return [_checkpoint(entry) for entry in self._store.entries()]

    def delete_checkpoint(self, path: str) -> None:
        """Remove a checkpoint; files that no other one shares go with it.

        Sampling clients that were made from it before hold its weights, and go on.

        Raises:
            ConfigError: there is none at this `tinker://` path.
        """
        self._store.delete(Place.of(path))

    def set_checkpoint_ttl(self, path: str, ttl_seconds: float | None) -> None:
        """Let a checkpoint expire so many seconds from now; None keeps it.

        Raises:
            ConfigError: there is none at this `tinker://` path, or the number is not above 0.
        """
        self._store.set_ttl(Place.of(path), ttl_seconds)

    def close(self) -> None:
        """Finish what is queued and stop; clients that were made here stop with it.

        Without it, the engine ends when nobody holds this client nor any that it made.
        """
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


def _warn(built: Built) -> None:
    if warning := packing_warning(built):
        warnings.warn(warning, stacklevel=3)


def _checkpoint(entry: Entry) -> Checkpoint:
    manifest = entry.manifest
    return Checkpoint(
        path=entry.place.path,
        saved_at=entry.lifetime.saved_at,
        expires_at=entry.lifetime.expires_at,
        size_bytes=entry.size,
        digest=entry.digest,
        base_model=manifest["spec"]["language"] if manifest else "",
        step=manifest.get("step"),
        user_metadata=manifest.get("user_metadata", {}),
        problem=entry.problem,
    )

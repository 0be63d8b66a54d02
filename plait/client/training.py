"""The client that trains."""

import json
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from plait.client.base import Client
from plait.client.custom import CustomLosses
from plait.client.futures import APIFuture
from plait.client.sampling import SamplingClient
from plait.errors import ConfigError, ModelError
from plait.primitives.documents import documents_of
from plait.primitives.inputs import check_plain, input_from
from plait.primitives.objectives import objective_of
from plait.primitives.training import forward_backward_output
from plait.stream import Sample, render
from plait.trainer.build import Built, parameter_counts
from plait.trainer.engine import commands
from plait.trainer.engine.controller import Engine
from plait.trainer.lifetime import check_ttl
from plait.trainer.losses import Loss, LossBatch
from plait.trainer.model import Objective
from plait.trainer.optimiser import StepSettings
from plait.trainer.places import Place
from plait.trainer.source import Source
from plait.trainer.store import Store
from plait.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    LoadWeightsResponse,
    ModelInfo,
    OptimizerParams,
    OptimStepResponse,
    SaveWeightsResponse,
)

LossFn = str | Loss | Callable[[LossBatch], Any]
"""A loss by name, one of one's own, or just its function."""


class TrainingClient(CustomLosses, Client):
    """Trains one model through primitives. Losses are SUMS over tokens and datums.

    Args:
        run: The engine's name for what trains, which goes when the client is closed or dropped.
        store: Where `save_state` keeps checkpoints.
        metadata: Stands in the manifest of everything saved, and in `get_info`.
    """

    def __init__(
        self, engine: Engine, built: Built, run: str, store: Store, metadata: dict[str, str]
    ) -> None:
        super().__init__(engine, built)
        self.run_id = uuid.uuid4().hex
        self.user_metadata = metadata
        self.restored: LoadWeightsResponse | None = None
        """What a client that was made from a saved state began with."""

        self._run, self._store = run, store
        self._release = weakref.finalize(self, engine.discard, commands.DropRun(run))
        self._release.atexit = False

    def datum(self, sample: Sample) -> Datum:
        """Render a sample: the one way from messages and media to what trains.

        The two samples of a preference row are two data, which `dpo` reads by turns: the chosen
        one, then the rejected one.

        Raises:
            DataError: it cannot be rendered, or is an augmented view.
        """
        check_plain(sample)
        document = render(sample, self._built.tokenizer, self._built.layout)
        return Datum(
            input_from(document),
            {"target_tokens": document.targets, "weights": document.weights},
        )

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFn = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Losses and the logprobs of every target; no gradient."""
        return self._compute(data, objective_of(loss_fn, loss_fn_config), backward=False)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFn = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Add the gradient of the summed loss. Logprobs are 0 where the loss reads none.

        Args:
            loss_fn: A name in `plait.trainer.losses.LOSSES`, a `Loss`, or a function of a
                `LossBatch` that returns each document's loss.
            loss_fn_config: The loss's settings that should not be their defaults.

        Raises:
            UnknownNameError: nobody registered the loss, or it has no such setting or input.
            DataError: a datum cannot be used.
        """
        return self._compute(data, objective_of(loss_fn, loss_fn_config), backward=True)

    def _compute(
        self, data: Sequence[Datum], objective: Objective, backward: bool
    ) -> APIFuture[ForwardBackwardOutput]:
        documents = list(documents_of(data, self._built, objective))
        self._check_open()
        future = self._engine.forward_backward(self._run, documents, objective, backward=backward)
        return APIFuture(future, forward_backward_output)

    def optim_step(
        self, adam_params: AdamParams | OptimizerParams, *, divide_by_weight: bool = False
    ) -> APIFuture[OptimStepResponse]:
        """One optimiser step on the gradients added since the last one.

        Args:
            divide_by_weight: Divide the summed gradients by the summed weights first, which makes
                the step that of the mean loss per token.
        """
        if not isinstance(adam_params, AdamParams | OptimizerParams):
            raise ConfigError(
                f"a step is told by AdamParams or OptimizerParams; it was given {adam_params!r}: "
                "write AdamParams(learning_rate=1e-4), for example"
            )
        settings = StepSettings(**asdict(adam_params))
        future = self._submit(commands.OptimStep(self._run, settings, divide_by_weight))
        return APIFuture(future, OptimStepResponse)

    def _submit(self, command: commands.RunCommand) -> Any:
        self._check_open()
        return self._engine.submit(command)

    def _check_open(self) -> None:
        if not self._release.alive:
            raise ModelError("this client is closed; create a new client")

    def save_state(
        self,
        name: str,
        ttl_seconds: float | None = None,
        *,
        overwrite: bool = False,
        cursor: Any = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Save all that the run needs to go on exactly; the response's path loads it.

        Args:
            ttl_seconds: After them it expires and is removed; None keeps it.
            overwrite: Replace a checkpoint of this run and name, which is refused otherwise.
            cursor: Whatever the loop needs to go on with its data, as plain JSON;
                `load_state_with_optimizer` gives it back.

        Raises:
            ConfigError: the name or the lifetime cannot be, or the cursor is not plain JSON.
            CheckpointError: by the result: the name is taken, or it cannot be written; what was
                saved before is unchanged.
        """
        return self._save("weights", name, ttl_seconds, overwrite, cursor)

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: float | None = None, *, overwrite: bool = False
    ) -> APIFuture[SaveWeightsResponse]:
        """Save what sampling needs under `name`; arguments and errors as of `save_state`."""
        return self._save("sampler_weights", name, ttl_seconds, overwrite)

    def _save(
        self, kind: str, name: str, ttl_seconds: float | None, overwrite: bool, cursor: Any = None
    ) -> APIFuture[SaveWeightsResponse]:
        check_ttl(ttl_seconds)
        _check_cursor(cursor)
        place = Place(self.run_id, kind, name)
        command = commands.SaveState(
            self._run,
            self._store,
            place,
            weights_only=kind == "sampler_weights",
            overwrite=overwrite,
            ttl_seconds=ttl_seconds,
            metadata=dict(self.user_metadata),
            cursor=cursor,
        )
        future = self._submit(command)
        return APIFuture(future, lambda digest: SaveWeightsResponse(place.path, digest))

    def load_state(self, path: str) -> APIFuture[LoadWeightsResponse]:
        """Load saved weights; the optimiser stays as it is, and pending gradients go.

        Raises:
            ConfigError: there is no such checkpoint; it was deleted, or it expired.
            DamagedCheckpointError: by the result: a file of it is not what was saved.
            CheckpointError: by the result: it is of another model; says of which other part.
        """
        return self._load(path, with_optimizer=False)

    def load_state_with_optimizer(self, path: str) -> APIFuture[LoadWeightsResponse]:
        """Load saved weights, the optimiser's state, and gradients that were pending.

        Raises:
            ConfigError, DamagedCheckpointError, CheckpointError: as `load_state`.
        """
        return self._load(path, with_optimizer=True)

    def _load(self, path: str, with_optimizer: bool) -> APIFuture[LoadWeightsResponse]:
        source = Source(self._store, path)
        source.require()
        future = self._submit(commands.LoadState(self._run, source, with_optimizer))
        return APIFuture(future, lambda cursor: LoadWeightsResponse(path, cursor))

    def save_weights_and_get_sampling_client(self, name: str | None = None) -> SamplingClient:
        """A client that samples from the weights as they are now, whatever trains later.

        It holds a copy of all that trains until it is closed or dropped, without a trip through
        the disk; with a `name` it is saved as well.
        """
        if name is not None:
            self.save_weights_for_sampler(name).result()
        view = self._engine.new_name("view")
        built: Built = self._submit(commands.TakeView(self._run, view)).result()
        return SamplingClient(self._engine, built, view)

    def get_info(self) -> ModelInfo:
        spec, counts = self._built.spec, parameter_counts(self._built.model)
        return ModelInfo(
            base_model=spec.language,
            is_lora=self._built.lora is not None,
            lora_rank=spec.lora.rank if spec.lora and self._built.lora is not None else None,
            trainable={part: count["trainable"] for part, count in counts.items()},
            user_metadata=dict(self.user_metadata),
        )

    def close(self) -> None:
        """Finish what is queued and forget the run; its sampling clients stay."""
        if self._release.detach():
            self._engine.finish(commands.DropRun(self._run))


def _check_cursor(cursor: Any) -> None:
    """
    Raises:
        ConfigError: it would not come back from JSON as it is.
    """
    try:
        same = json.loads(json.dumps(cursor, allow_nan=False)) == cursor
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ConfigError(
            "a cursor comes back as it was, so it must be plain JSON (dicts with text keys, lists, "
            f"texts, finite numbers, True, False, None); got {cursor!r}"
        )

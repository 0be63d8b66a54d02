"""The client that trains."""

import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from plait.client.base import Client
from plait.client.futures import APIFuture
from plait.client.inputs import check_plain, input_from
from plait.client.paths import SCHEME, weights_folder
from plait.client.sampling import SamplingClient
from plait.errors import ConfigError, DataError, UnknownNameError
from plait.stream import Sample, render
from plait.trainer.build import parameter_counts
from plait.trainer.engine import commands
from plait.trainer.engine.controller import Engine
from plait.trainer.losses import LOSSES
from plait.trainer.optimiser import StepSettings
from plait.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    LoadWeightsResponse,
    ModelInfo,
    OptimStepResponse,
    SaveWeightsResponse,
    TensorData,
)


class TrainingClient(Client):
    """Trains one model through primitives. Losses are SUMS over tokens and datums.

    Args:
        folder: Where `save_state` puts its files.
        metadata: Stands in the manifest of everything saved, and in `get_info`.
    """

    def __init__(self, engine: Engine, folder: Path, metadata: dict[str, str]) -> None:
        super().__init__(engine)
        self.run_id = uuid.uuid4().hex
        self.user_metadata = metadata
        self._folder = folder

    def datum(self, sample: Sample) -> Datum:
        """Render a sample: the one way from messages and media to what trains.

        Raises:
            DataError: it cannot be rendered, is an augmented view, or belongs to a group.
        """
        check_plain(sample)
        document = render(sample, self._built.tokenizer, self._built.layout)
        return Datum(
            input_from(document),
            {"target_tokens": document.targets, "weights": document.weights},
        )

    def forward(
        self, data: Sequence[Datum], loss_fn: str = "cross_entropy"
    ) -> APIFuture[ForwardBackwardOutput]:
        """Losses and the logprobs of every target; no gradient."""
        return self._submit(data, loss_fn, backward=False)

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str = "cross_entropy"
    ) -> APIFuture[ForwardBackwardOutput]:
        """Add the gradient of the summed loss. Logprobs are 0 where the weight is 0.

        Raises:
            UnknownNameError: nobody registered the loss.
            DataError: a datum cannot be used.
        """
        return self._submit(data, loss_fn, backward=True)

    def _submit(
        self, data: Sequence[Datum], loss_fn: str, backward: bool
    ) -> APIFuture[ForwardBackwardOutput]:
        if loss_fn not in LOSSES:
            raise UnknownNameError("loss", loss_fn, LOSSES)
        if not data:
            raise DataError("forward_backward needs at least one datum; it was given none")
        if any("target_tokens" not in datum.loss_fn_inputs for datum in data):
            raise DataError("a datum needs target_tokens: the token after each position")
        documents = [self._document(datum.model_input, datum.loss_fn_inputs) for datum in data]
        future = self._engine.forward_backward(documents, backward)
        return APIFuture(future, _forward_backward_output)

    def optim_step(
        self, adam_params: AdamParams, *, divide_by_weight: bool = False
    ) -> APIFuture[OptimStepResponse]:
        """One AdamW step on the gradients added since the last one.

        Args:
            divide_by_weight: Divide the summed gradients by the summed weights first, which makes
                the step that of the mean loss per token.
        """
        settings = StepSettings(**asdict(adam_params))
        future = self._engine.submit(commands.OptimStep(settings, divide_by_weight))
        return APIFuture(future, OptimStepResponse)

    def save_state(self, name: str) -> APIFuture[SaveWeightsResponse]:
        """Save weights and optimiser under `name`; the response's path loads them."""
        return self._save("weights", name, weights_only=False)

    def save_weights_for_sampler(self, name: str) -> APIFuture[SaveWeightsResponse]:
        """Save what sampling needs under `name`."""
        return self._save("sampler_weights", name, weights_only=True)

    def _save(self, kind: str, name: str, weights_only: bool) -> APIFuture[SaveWeightsResponse]:
        if not name or "/" in name or name.startswith("."):
            raise ConfigError(f"a checkpoint's name has no / and no leading dot; got {name!r}")
        folder = self._folder / self.run_id / kind / name
        future = self._engine.submit(
            commands.SaveState(folder, weights_only, dict(self.user_metadata))
        )
        path = f"{SCHEME}{self.run_id}/{kind}/{name}"
        return APIFuture(future, lambda _: SaveWeightsResponse(path))

    def load_state(self, path: str) -> APIFuture[LoadWeightsResponse]:
        """Load saved weights; the optimiser stays as it is."""
        return self._load(path, with_optimizer=False)

    def load_state_with_optimizer(self, path: str) -> APIFuture[LoadWeightsResponse]:
        """Load saved weights and the optimiser's state."""
        return self._load(path, with_optimizer=True)

    def _load(self, path: str, with_optimizer: bool) -> APIFuture[LoadWeightsResponse]:
        folder = weights_folder(path, self._folder)
        future = self._engine.submit(commands.LoadState(folder, with_optimizer))
        return APIFuture(future, lambda _: LoadWeightsResponse(path))

    def save_weights_and_get_sampling_client(self, name: str | None = None) -> SamplingClient:
        """A client that samples from the weights as they are now, whatever trains later.

        It holds a copy of all that trains until it is closed or dropped; this client's end is its
        own, too.
        """
        if name is not None:
            self.save_weights_for_sampler(name).result()
        number: int = self._engine.submit(commands.TakeSnapshot()).result()
        return SamplingClient(self._engine, number)

    def get_info(self) -> ModelInfo:
        spec, counts = self._built.spec, parameter_counts(self._built.model)
        return ModelInfo(
            base_model=spec.language,
            is_lora=self._built.lora is not None,
            lora_rank=spec.lora.rank if spec.lora and self._built.lora is not None else None,
            trainable={part: count["trainable"] for part, count in counts.items()},
            user_metadata=dict(self.user_metadata),
        )


def _forward_backward_output(results: list[commands.DocumentResult]) -> ForwardBackwardOutput:
    return ForwardBackwardOutput(
        loss_fn_outputs=[{"logprobs": TensorData(result.logprobs)} for result in results],
        metrics={
            "loss:sum": sum(result.loss for result in results),
            "weight:sum": sum(result.weight for result in results),
        },
    )

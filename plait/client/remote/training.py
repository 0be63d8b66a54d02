"""The client that trains, over HTTP."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import count
from typing import Any, Self

from plait.client.custom import CustomLosses
from plait.client.futures import APIFuture, AsyncNames, Ready
from plait.client.remote.inputs import proto_chunks
from plait.client.remote.rendering import Rendering
from plait.client.remote.sampling import RemoteSamplingClient
from plait.client.remote.transport import UPLOAD_BYTES, InOrder, Transport
from plait.errors import ConfigError
from plait.primitives.inputs import check_data, check_plain
from plait.service.wire import training as wire
from plait.trainer.losses import loss_named
from plait.types import (
    AdamParams,
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    LoadWeightsResponse,
    ModelInfo,
    OptimizerParams,
    OptimStepResponse,
    SaveWeightsResponse,
)

PROTOBUF = {"content-type": "application/x-protobuf"}
CALL_BYTES = 8_000_000
"""Of one request; a larger call is sent as several, whose gradients add up the same."""


class RemoteTrainingClient(CustomLosses, AsyncNames, Ready, Rendering):
    """A run on a server; see `plait.TrainingClient`, whose methods these are.

    Args:
        run: The server's name for it.
        session: A client that makes samplers of the same session.
    """

    def __init__(self, transport: Transport, run: str, session: "Any", info: Any) -> None:
        super().__init__(transport, run)
        self.run_id = run
        self.restored: LoadWeightsResponse | None = None
        self._session, self._info = session, info
        self._numbers = count(1)
        self._queue = InOrder(transport)

    def datum(self, sample: Any) -> Datum:
        """A sample as a datum, rendered by the server's model.

        Raises:
            DataError: it cannot be rendered, or is an augmented view.
        """
        check_plain(sample)
        return self._datum(sample)

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Losses and the logprobs of every target; no gradient."""
        return self._compute(data, loss_fn, loss_fn_config, backward=False)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Add the gradient of the summed loss.

        Raises:
            ConfigError: the loss is no name: functions run by `forward_backward_custom`.
        """
        return self._compute(data, loss_fn, loss_fn_config, backward=True)

    def _compute(
        self,
        data: Sequence[Datum],
        loss_fn: Any,
        config: Mapping[str, float] | None,
        backward: bool,
    ) -> APIFuture[ForwardBackwardOutput]:
        if not isinstance(loss_fn, str):
            raise ConfigError(
                "over HTTP a loss is named; forward_backward_custom runs a function of logprobs"
            )
        loss, given = loss_named(loss_fn), check_data(data)
        parts = _split(given, 2 if loss.paired else 1)
        futures = [self._send(part, loss_fn, dict(config or {}), backward) for part in parts]
        if len(futures) == 1:
            return futures[0]

        async def every() -> list[ForwardBackwardOutput]:
            return [await future for future in futures]

        return APIFuture(self._transport.run(every()), _added)

    def _send(
        self, data: list[Datum], loss: str, config: dict[str, float], backward: bool
    ) -> APIFuture[ForwardBackwardOutput]:
        number = next(self._numbers)

        async def send() -> Any:
            chunks = [await proto_chunks(self._transport, datum.model_input) for datum in data]
            pairs = [(c, datum.loss_fn_inputs) for c, datum in zip(chunks, data, strict=True)]
            message = wire.request_of(self.run_id, number, pairs, loss, config, backward=backward)
            body = await asyncio.to_thread(message.SerializeToString)
            return await self._transport.ask(
                "POST", "/api/v1/forward_backward", content=body, headers=PROTOBUF
            )

        future = self._queue.put(send, lambda response: wire.answer_of(response.content))
        return APIFuture(future, lambda output: output)

    def optim_step(
        self, adam_params: AdamParams | OptimizerParams, *, divide_by_weight: bool = False
    ) -> APIFuture[OptimStepResponse]:
        """One optimiser step on the gradients added since the last one."""
        if isinstance(adam_params, AdamParams):
            params = {"adam_params": asdict(adam_params)}
        elif isinstance(adam_params, OptimizerParams):
            params = {"optimizer_params": asdict(adam_params)}
        else:
            raise ConfigError(
                f"a step is told by AdamParams or OptimizerParams; it was given {adam_params!r}"
            )
        body = {**params, "divide_by_weight": divide_by_weight}
        future = self._post("/api/v1/optim_step", body)
        return APIFuture(future, lambda said: OptimStepResponse(said["metrics"]))

    def save_state(
        self,
        name: str,
        ttl_seconds: float | None = None,
        *,
        overwrite: bool = False,
        cursor: Any = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Save all that the run needs to go on exactly."""
        body = {"path": name, "overwrite": overwrite, "ttl_seconds": ttl_seconds, "cursor": cursor}
        return APIFuture(self._post("/api/v1/save_weights", body), _saved)

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: float | None = None
    ) -> APIFuture[SaveWeightsResponse]:
        """Save what sampling needs."""
        body = {"path": name, "ttl_seconds": ttl_seconds}
        return APIFuture(self._post("/api/v1/save_weights_for_sampler", body), _saved)

    def load_state(self, path: str) -> APIFuture[LoadWeightsResponse]:
        """Load saved weights; the optimiser stays as it is."""
        return self._load(path, optimizer=False)

    def load_state_with_optimizer(self, path: str) -> APIFuture[LoadWeightsResponse]:
        """Load saved weights, the optimiser's state, and gradients that were pending."""
        return self._load(path, optimizer=True)

    def _load(self, path: str, *, optimizer: bool) -> APIFuture[LoadWeightsResponse]:
        future = self._post("/api/v1/load_weights", {"path": path, "optimizer": optimizer})
        return APIFuture(future, lambda said: LoadWeightsResponse(path, said.get("cursor")))

    def save_weights_and_get_sampling_client(self, name: str | None = None) -> RemoteSamplingClient:
        """A client that samples from the weights as they are now, whatever trains later."""
        if name is not None:
            self.save_weights_for_sampler(name).result()
        number = self._session.next_sampler()
        body = {"sampling_session_seq_id": number}
        said = self._post("/api/v1/save_weights_for_sampler", body).result()
        return RemoteSamplingClient(self._transport, said["sampling_session_id"], self.run_id)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """Promise an operation of this run; its result's JSON."""
        said = {key: value for key, value in body.items() if value is not None}
        said |= {"model_id": self.run_id, "seq_id": next(self._numbers)}

        async def send() -> Any:
            return await self._transport.ask("POST", path, json=said)

        return self._queue.put(send, lambda response: response.json())

    def get_info(self) -> ModelInfo:
        info = self._info
        return ModelInfo(
            base_model=info["model_name"],
            is_lora=bool(info["is_lora"]),
            lora_rank=info["lora_rank"],
            trainable=info.get("trainable", {}),
            user_metadata=info.get("user_metadata", {}),
        )

    def close(self) -> None:
        """Let the run leave the server's memory; its next request brings it back."""
        if not self._transport.end.alive:
            return
        self._transport.call("POST", "/api/v1/unload_model", json={"model_id": self.run_id})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


def _saved(said: Mapping[str, Any]) -> SaveWeightsResponse:
    return SaveWeightsResponse(said["path"], said.get("digest", ""))


def _size(datum: Datum) -> int:
    """About how many bytes it takes: a file may be anything, and is counted as a large one."""
    read = [
        4 * chunk.length if isinstance(chunk, EncodedTextChunk) else UPLOAD_BYTES
        for chunk in datum.model_input.chunks
    ]
    return sum(read) + sum(int(value.data.nbytes) for value in datum.loss_fn_inputs.values())


def _split(data: list[Datum], together: int) -> list[list[Datum]]:
    """In parts of about CALL_BYTES; so many neighbours stay together."""
    parts: list[list[Datum]] = [[]]
    size = 0
    for start in range(0, len(data), together):
        some = data[start : start + together]
        more = sum(map(_size, some))
        if parts[-1] and size + more > CALL_BYTES:
            parts.append([])
            size = 0
        parts[-1] += some
        size += more
    return parts


def _added(made: Sequence[ForwardBackwardOutput]) -> ForwardBackwardOutput:
    """One answer of several: outputs in order, sums added."""
    metrics: dict[str, float] = {}
    for one in made:
        for name, value in one.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value
    return ForwardBackwardOutput([row for one in made for row in one.loss_fn_outputs], metrics)

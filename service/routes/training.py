"""Runs: made, trained, saved, loaded."""

import json
from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy import Row

from plait.errors import ConfigError, DataError, UnknownNameError
from plait.loss_inputs import LOSS_NAMES
from plait.service import bodies, catalog
from plait.service.errors import NotFoundError, ServiceError
from plait.service.operations import Operation
from plait.service.routes.context import READS, Asking, Serving
from plait.service.routes.numbers import NumberedRoute
from plait.service.wire import training as wire
from plait.trainer.places import Place
from plait.types import AdamParams, OptimizerParams

router = APIRouter(prefix="/api/v1", tags=["training"], route_class=NumberedRoute)


_MOST_GRAPH = 2_000_000


def promise(operation: Operation, **more: Any) -> dict[str, Any]:
    return {"request_id": operation.id, **more}


@router.post("/create_model")
async def create_model(
    body: bodies.CreateModel, caller: Asking, service: Serving
) -> dict[str, Any]:
    await service.sessions.require(caller.owner, body.session_id, service.clock())
    offer = catalog.offered(service.settings.models, body.base_model)
    lora = None if body.lora_config is None else body.lora_config.model_dump(exclude_none=True)
    spec, seed = catalog.training_spec(offer, lora, f"{body.session_id}:train:{body.model_seq_id}")
    options = {"spec": catalog.spec_values(spec), "seed": seed}
    if offer.weights is not None:
        options["weights"] = str(offer.weights)
    metadata = body.user_metadata or {}
    operation = await service.create_run(
        caller, body.session_id, body.model_seq_id, body.base_model, options, metadata
    )
    return promise(operation, model_id=operation.scope)


@router.post("/get_info", openapi_extra=READS)
async def get_info(body: bodies.OfModel, caller: Asking, service: Serving) -> dict[str, Any]:
    run = await service.run(caller, body.model_id)
    info = json.loads(run.info_json or "{}")
    return {
        "type": "get_info",
        "model_id": run.id,
        "model_name": run.base_model,
        "is_lora": info.get("is_lora"),
        "lora_rank": info.get("lora_rank"),
        "optimizer_config": {"type": "adamw"},
        "trainable": info.get("trainable", {}),
        "user_metadata": json.loads(run.metadata_json),
        "model_data": {
            "arch": info.get("arch"),
            "model_name": run.base_model,
            "tokenizer_id": info.get("tokenizer_id"),
        },
    }


@router.post("/unload_model")
async def unload_model(body: bodies.OfModel, caller: Asking, service: Serving) -> dict[str, Any]:
    """Take a run out of memory; its next request brings it back."""
    run = await service.run(caller, body.model_id)
    scope = await service.runner.scope(run.id)
    if scope is not None and scope.resident and not scope.waiting:
        await service.runner.let_go(scope)
    return {"type": "unload_model", "model_id": run.id, "request_id": f"unload:{run.id}"}


@router.post(
    "/forward_backward",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/x-protobuf": {"schema": {"type": "string", "format": "binary"}}
            },
        }
    },
)
async def forward_backward(request: Request, caller: Asking, service: Serving) -> dict[str, Any]:
    """A protobuf ForwardBackwardRequest, zstd-compressed or not."""
    body = await request.body()
    try:
        message = wire.parsed(body)
    except DataError as error:
        raise ServiceError(error.message) from error
    run = message.model_id
    await service.owned(caller, run, "run")
    request.state.target = run
    if message.seq_id < 0:
        raise ServiceError(f"seq_id is a whole number of 0 or more; it is {message.seq_id}", 422)
    try:
        options = await _loss_options(message, caller, service)
    except ServiceError:
        await service.refuse(run, message.seq_id)
        raise
    operation = await service.submit(caller, run, message.seq_id, "forward_backward", options, body)
    return promise(operation, model_id=run)


async def _loss_options(message: Any, caller: Asking, service: Serving) -> dict[str, Any]:
    """What the engine is told besides the body.

    Raises:
        ServiceError: there is no such loss, or no data.
    """
    if not message.data:
        raise ServiceError("forward_backward needs at least one datum; it got none")
    options: dict[str, Any] = {"forward": message.forward_only}
    if message.loss_fn != wire.CUSTOM:
        if message.loss_fn not in LOSS_NAMES:
            known = (*LOSS_NAMES, wire.CUSTOM)
            raise ServiceError(str(UnknownNameError("loss", message.loss_fn, known)))
        return options
    loss = message.loss_fn_config_v2["loss_id"].text
    return {**options, "graph": await service.loss(caller, loss)}


@router.post("/optim_step")
async def optim_step(body: bodies.OptimStep, caller: Asking, service: Serving) -> dict[str, Any]:
    run = body.model_id
    await service.owned(caller, run, "run")
    try:
        params = _step_settings(body)
    except ServiceError:
        await service.refuse(run, body.seq_id)
        raise
    options = {"params": params, "divide_by_weight": body.divide_by_weight}
    operation = await service.submit(caller, run, body.seq_id, "optim_step", options)
    return promise(operation, model_id=run)


def _step_settings(body: bodies.OptimStep) -> dict[str, Any]:
    if (body.adam_params is None) == (body.optimizer_params is None):
        raise ServiceError("optim_step takes either adam_params or optimizer_params", 422)
    try:
        if body.adam_params is not None:
            given = body.adam_params.model_dump()
            AdamParams(**given)
            return given
        named = dict(body.optimizer_params or {})
        named["optimizer"] = named.pop("type", named.get("optimizer"))
        if named["optimizer"] == "dimuon":
            raise ServiceError("the optimizer dimuon is not supported; use adamw", 422)
        OptimizerParams(**named)
        named = {name: _float(value) for name, value in named.items()}
    except (ConfigError, TypeError, OverflowError) as error:
        raise ServiceError(str(error)[:500], 422) from error
    return named


def _float(value: Any) -> Any:
    """Whole numbers may be too large for one."""
    return float(value) if type(value) is int else value


@router.post("/save_weights")
async def save_weights(
    body: bodies.SaveWeights, caller: Asking, service: Serving
) -> dict[str, Any]:
    """A checkpoint to train on from."""
    name = body.path or f"{body.seq_id:08d}"
    return await _save(service, caller, body.model_id, body.seq_id, "weights", name,
                       body.ttl_seconds, body.user_metadata, body.overwrite,
                       body.cursor)  # fmt: skip


@router.post("/save_weights_external")
async def save_weights_external(
    body: bodies.SaveExternal, caller: Asking, service: Serving
) -> dict[str, Any]:
    """A checkpoint in the form that transformers and peft read."""
    if body.age_encryption_recipients:
        run = await service.run(caller, body.model_id)
        await service.refuse(run.id, body.seq_id)
        raise ServiceError("age_encryption_recipients are not supported: leave them out", 422)
    return await _save(service, caller, body.model_id, body.seq_id, "external_weights", body.path,
                       body.ttl_seconds, None, False)  # fmt: skip


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(
    body: bodies.SaveForSampler, caller: Asking, service: Serving
) -> dict[str, Any]:
    """Weights to sample from: under a name, or for one sampler alone and in memory."""
    run = await service.run(caller, body.model_id)
    refused = _unsupported(body)
    if refused is not None:
        await service.refuse(run.id, body.seq_id)
        raise ServiceError(refused, 422)
    if body.sampling_session_seq_id is not None:
        await _check_free(service, caller, run, body)
        operation = await service.take_view(caller, run, body.seq_id, body.sampling_session_seq_id)
        return promise(operation, model_id=run.id)
    name = body.path or f"{body.seq_id:08d}"
    return await _save(service, caller, run.id, body.seq_id, "sampler_weights", name,
                       body.ttl_seconds, body.user_metadata, False)  # fmt: skip


def _unsupported(body: bodies.SaveForSampler) -> str | None:
    """What of a request would be ignored, and is refused instead."""
    if body.kind == "inflight":
        return "inflight samplers are not supported: use kind 'snapshot'"
    if body.sampling_session_seq_id is None:
        return None
    for name in ("path", "ttl_seconds", "user_metadata"):
        if getattr(body, name) is not None:
            return f"{name} is for weights that are saved, not for a sampler's own: leave it out"
    return None


async def _check_free(
    service: Serving, caller: Asking, run: Row[Any], body: bodies.SaveForSampler
) -> None:
    """
    Raises:
        ServiceError: another request made the sampler of this number.
    """
    name = f"{run.session_id}:sample:{body.sampling_session_seq_id}"
    try:
        there = await service.sampler(caller, name)
    except NotFoundError:
        return
    if (there.run_id, there.run_seq) != (run.id, body.seq_id):
        await service.refuse(run.id, body.seq_id)
        raise ServiceError(f"{name} is another sampler already: take the next number", 422)


async def _save(
    service: Serving, caller: Asking, run_id: str, seq: int, kind: str, name: str,
    ttl_seconds: float | None, metadata: dict[str, str] | None, overwrite: bool,
    cursor: Any = None,
) -> dict[str, Any]:  # fmt: skip
    run = await service.run(caller, run_id)
    try:
        path = Place(run.id, kind, name).path
    except ConfigError as error:
        await service.refuse(run.id, seq)
        raise ServiceError(str(error), 422) from error
    options = {"path": path, "ttl_seconds": ttl_seconds, "metadata": metadata or {},
               "overwrite": overwrite, "cursor": cursor}  # fmt: skip
    operation = await service.submit(caller, run.id, seq, "save", options)
    return promise(operation, model_id=run.id)


@router.post("/load_weights")
async def load_weights(
    body: bodies.LoadWeights, caller: Asking, service: Serving
) -> dict[str, Any]:
    """Into a run that is there, or into a new one."""
    if body.weights_access_token:
        if body.model_id is not None and body.seq_id is not None:
            run = await service.run(caller, body.model_id)
            await service.refuse(run.id, body.seq_id)
        raise ServiceError("weights_access_token is not supported: ask the owner to publish", 422)
    if body.session_id is None:
        return await _load_in_place(body, caller, service)
    if body.model_id is not None or body.model_seq_id is None:
        raise ServiceError("a new run is named by session_id and model_seq_id", 422)
    await service.sessions.require(caller.owner, body.session_id, service.clock())
    saved = await service.checkpoint(caller, body.path)
    base_model = await service.base_model_of(saved.run_id)
    if body.base_model not in (None, base_model):
        raise ServiceError(f"this checkpoint is of {base_model}, not of {body.base_model}", 422)
    manifest = service.manifest(body.path)
    options = {"spec": manifest["spec"], "seed": 0, "path": body.path, "optimizer": body.optimizer}
    operation = await service.create_run(
        caller, body.session_id, body.model_seq_id, base_model, options, body.user_metadata or {}
    )
    return promise(operation, model_id=operation.scope)


async def _load_in_place(
    body: bodies.LoadWeights, caller: Asking, service: Serving
) -> dict[str, Any]:
    if body.model_id is None or body.seq_id is None:
        raise ServiceError("load_weights needs model_id and seq_id, or session_id", 422)
    run = await service.run(caller, body.model_id)
    for name in ("base_model", "user_metadata", "optimizer_config", "model_seq_id"):
        if getattr(body, name) is not None:
            await service.refuse(run.id, body.seq_id)
            raise ServiceError(f"{name} is for a new run; this one is there: leave it out", 422)
    try:
        await service.checkpoint(caller, body.path)
    except NotFoundError:
        await service.refuse(run.id, body.seq_id)
        raise
    options = {"path": body.path, "optimizer": body.optimizer}
    operation = await service.submit(caller, run.id, body.seq_id, "load", options)
    return promise(operation, model_id=run.id)


@router.post("/create_custom_loss")
async def create_custom_loss(
    body: bodies.CreateCustomLoss, caller: Asking, service: Serving
) -> dict[str, Any]:
    """Keep a traced loss; its operations are checked against the list of those allowed."""
    await service.sessions.require(caller.owner, body.session_id, service.clock())
    graph = {
        "name": body.name,
        "inputs": [one.model_dump() for one in body.inputs],
        "graph": body.graph.model_dump(),
    }
    if len(json.dumps(graph)) > _MOST_GRAPH:
        raise ServiceError(f"a custom loss is described in up to {_MOST_GRAPH} characters", 413)
    return promise(
        await service.create_loss(caller, body.session_id, body.custom_loss_seq_id, graph)
    )

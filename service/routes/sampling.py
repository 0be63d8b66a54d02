"""Samplers, and samples."""

import hashlib
from typing import Any

from fastapi import APIRouter, Request, Response

from plait.service import bodies
from plait.service.errors import ServiceError
from plait.service.routes.context import Asking, Serving
from plait.service.routes.training import promise
from plait.service.wire import sampling as wire

router = APIRouter(prefix="/api/v1", tags=["sampling"])


@router.post("/create_sampling_session")
async def create_sampling_session(
    body: bodies.CreateSampler, caller: Asking, service: Serving
) -> dict[str, Any]:
    """A sampler of a base model, or of a checkpoint."""
    await service.sessions.require(caller.owner, body.session_id, service.clock())
    if body.model_path is None and body.base_model is None:
        raise ServiceError("a sampling session needs base_model or model_path", 422)
    base_model = body.base_model or ""
    if body.model_path is not None:
        saved = await service.checkpoint(caller, body.model_path)
        base_model = await service.base_model_of(saved.run_id)
        if body.base_model not in (None, base_model):
            raise ServiceError(f"this checkpoint is of {base_model}, not of {body.base_model}", 422)
    name = await service.create_sampler(
        caller, body.session_id, body.sampling_session_seq_id, base_model, body.model_path
    )
    made = await service.sampler(caller, name)
    if (made.base_model, made.model_path, made.run_id) != (base_model, body.model_path, None):
        raise ServiceError(f"{name} is another sampler already: take the next number", 422)
    return {"type": "create_sampling_session", "sampling_session_id": name}


@router.post("/join_sampling_session")
async def join_sampling_session(
    body: bodies.JoinSampler, caller: Asking, service: Serving
) -> dict[str, Any]:
    sampler = await service.sampler(caller, body.sampling_session_id)
    return {
        "type": "join_sampling_session",
        "client_counter": await service.join_sampler(sampler.id),
    }


@router.delete("/samplers/{sampler_id}", status_code=204)
async def close_sampler(sampler_id: str, caller: Asking, service: Serving) -> Response:
    """Give its weights back; it does not sample any more."""
    row = await service.sampler(caller, sampler_id)
    await service.close_sampler(row.id)
    return Response(status_code=204)


@router.get("/samplers/{sampler_id}")
async def sampler(sampler_id: str, caller: Asking, service: Serving) -> dict[str, Any]:
    row = await service.sampler(caller, sampler_id)
    return {"sampler_id": row.id, "base_model": row.base_model, "model_path": row.model_path}


@router.post("/asample")
async def asample(
    body: bodies.Sample, request: Request, caller: Asking, service: Serving
) -> dict[str, Any]:
    """Continue a prompt."""
    check(body)
    sampler = body.sampling_session_id
    await service.owned(caller, sampler, "sampling session")
    options = {"seed": seed_of(sampler, body.seq_id)}
    operation = await service.submit(
        caller, sampler, body.seq_id, "sample", options, await request.body()
    )
    ids = [f"{operation.id}:{number}" for number in range(body.num_samples)]
    return promise(operation, sample_sequence_ids=ids)


def seed_of(sampler: str, seq: int) -> int:
    """Where a request says none: one that is the same when it is done again."""
    digest = hashlib.sha256(f"{sampler}:{seq}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def check(body: bodies.Sample) -> None:
    """
    Raises:
        ServiceError: a request for samples asks for what is not supported.
        ConfigError, DataError: a setting cannot be.
    """
    for field in ("base_model", "model_path"):
        if getattr(body, field) is not None:
            raise ServiceError(f"asample takes {field} by its sampling session: leave it out", 422)
    for name in wire.REFUSED:
        if getattr(body, name):
            raise ServiceError(f"{name} is not supported by this server: leave it out", 422)
    wire.params_from_json(body.sampling_params.model_dump(exclude_none=True))

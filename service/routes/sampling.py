"""Samplers, and samples."""

import hashlib
import json
from typing import Any

from fastapi import APIRouter, Request, Response

from plait.errors import PlaitError
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


@router.post(
    "/asample",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"type": "object"}}},
        }
    },
)
async def asample(request: Request, caller: Asking, service: Serving) -> dict[str, Any]:
    """Continue a prompt; the prompt is checked when its turn comes."""
    body = await request.body()
    given = checked(body)
    sampler: str = given["sampling_session_id"]
    await service.owned(caller, sampler, "sampling session")
    request.state.target = sampler
    seq, samples = given["seq_id"], given.get("num_samples", 1)
    options = {"seed": seed_of(sampler, seq)}
    operation = await service.submit(caller, sampler, seq, "sample", options, body)
    ids = [f"{operation.id}:{number}" for number in range(samples)]
    return promise(operation, sample_sequence_ids=ids)


_FIELDS = {
    "num_samples", "prompt", "sampling_params", "base_model", "model_path", "sampling_session_id",
    "seq_id", "prompt_logprobs", "topk_prompt_logprobs", "prompt_logprobs_last_n", "type",
    *wire.REFUSED,
}  # fmt: skip


def seed_of(sampler: str, seq: int) -> int:
    """Where a request says none: one that is the same when it is done again."""
    digest = hashlib.sha256(f"{sampler}:{seq}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def checked(body: bytes) -> dict[str, Any]:
    """A request for samples.

    Raises:
        ServiceError: it is no request for samples, or asks for what is not supported.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ServiceError(f"the body must be JSON: {error}"[:300], 422) from error
    if not isinstance(given, dict):
        raise ServiceError("the body must be an object", 422)
    unknown = sorted(set(given) - _FIELDS)
    if unknown:
        raise ServiceError(f"asample has no {unknown[0][:80]!r}", 422)
    for field in ("base_model", "model_path"):
        if given.get(field) is not None:
            raise ServiceError(f"asample takes {field} by its sampling session: leave it out", 422)
    sampler = given.get("sampling_session_id")
    if not isinstance(sampler, str) or not sampler.isprintable():
        raise ServiceError("asample needs a sampling_session_id: create_sampling_session", 422)
    seq, samples = given.get("seq_id"), given.get("num_samples", 1)
    if type(seq) is not int or not 0 <= seq < 2**62:
        raise ServiceError(f"seq_id is a whole number of 0 or more; it is {seq!r}"[:200], 422)
    if type(samples) is not int or not 1 <= samples <= 1024:
        raise ServiceError(f"num_samples is 1 to 1024; it is {samples!r}"[:200], 422)
    try:
        for name in wire.REFUSED:
            if given.get(name):
                raise ServiceError(f"{name} is not supported by this server: leave it out", 422)
        params = given.get("sampling_params") or {}
        if not isinstance(params, dict):
            raise ServiceError("sampling_params is an object", 422)
        wire.params_from_json(params)
    except PlaitError as error:
        if isinstance(error, ServiceError):
            raise
        raise ServiceError(str(error)[:500], 422) from error
    return given

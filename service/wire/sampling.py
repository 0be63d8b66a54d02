"""`asample`: the request's prompt and settings, and its answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from plait.errors import DataError
from plait.service.wire import tinker_pb2 as pb
from plait.service.wire.chunks import Uploaded, chunk_from_json, nothing_uploaded
from plait.types import ModelInput, SampledSequence, SampleResponse, SamplingParams

NOT_COMPUTED = -99999.0
"""The logprob of a cell that says nothing, as the Tinker API has it."""

REFUSED = ("topk_sample_logprobs", "target_prompt_logprobs", "prompt_alt_tokens_k",
           "record_stability_info")  # fmt: skip
"""What the Tinker API asks for besides, and this version does not compute."""

MOST_TOP = 1024
"""Likeliest tokens of each position of a prompt."""

_PARAMS = ("max_tokens", "seed", "stop", "temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True, slots=True)
class SampleCall:
    """A request, parsed."""

    prompt: ModelInput
    params: SamplingParams
    samples: int
    prompt_logprobs: bool
    top_prompt_logprobs: int
    last_prompt_logprobs: int | None


def input_from_json(value: Any, uploaded: Uploaded = nothing_uploaded) -> ModelInput:
    """
    Raises:
        DataError: it is no list of chunks.
    """
    chunks = value.get("chunks") if isinstance(value, dict) else None
    if not isinstance(chunks, list):
        raise DataError('a prompt is an object {"chunks": [...]}')
    return ModelInput(tuple(chunk_from_json(chunk, uploaded) for chunk in chunks))


def params_from_json(given: Mapping[str, Any]) -> SamplingParams:
    """
    Raises:
        ConfigError, DataError: a setting is unknown, or cannot be.
    """
    unknown = sorted(set(given) - set(_PARAMS))
    if unknown:
        raise DataError(f"sampling_params has no {unknown[0]!r}; it has {', '.join(_PARAMS)}")
    for name, value in given.items():
        if isinstance(value, int | float) and not abs(value) < 2**63:
            raise DataError(f"{name} is a number of 64 bits; it is larger")
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def call_from_json(value: Mapping[str, Any], uploaded: Uploaded = nothing_uploaded) -> SampleCall:
    """
    Raises:
        ConfigError, DataError: something cannot be, or is not supported.
    """
    for name in REFUSED:
        if value.get(name):
            raise DataError(f"{name} is not supported by this server: leave it out")
    last = value.get("prompt_logprobs_last_n")
    return SampleCall(
        prompt=input_from_json(value.get("prompt"), uploaded),
        params=params_from_json(value.get("sampling_params") or {}),
        samples=_whole(value, "num_samples", 1),
        prompt_logprobs=bool(value.get("prompt_logprobs")),
        top_prompt_logprobs=_whole(value, "topk_prompt_logprobs", 0, MOST_TOP),
        last_prompt_logprobs=None if last is None else _whole(value, "prompt_logprobs_last_n", 0),
    )


def _whole(value: Mapping[str, Any], name: str, otherwise: int, most: int = 2**31) -> int:
    number = value.get(name, otherwise)
    if type(number) is not int or not 0 <= number <= most:
        raise DataError(f"{name} is a whole number from 0 to {most}; it is {number!r}"[:200])
    return number


def answer_to(response: SampleResponse, call: SampleCall) -> bytes:
    """The protobuf of an answer."""
    message = pb.SampleResponse()
    for sequence in response.sequences:
        stopped = sequence.stop_reason == "stop"
        message.sequences.add(
            stop_reason=pb.STOP_REASON_STOP if stopped else pb.STOP_REASON_LENGTH,
            tokens=np.asarray(sequence.tokens, "<i4").tobytes(),
            logprobs=np.asarray(sequence.logprobs, "<f4").tobytes(),
        )
    if response.prompt_logprobs is not None and call.prompt_logprobs:
        values = [np.nan if value is None else value for value in response.prompt_logprobs]
        if call.last_prompt_logprobs is not None:
            before = max(len(values) - call.last_prompt_logprobs, 0)
            values[:before] = [np.nan] * before
        message.prompt_logprobs = np.asarray(values, "<f4").tobytes()
    if response.topk_prompt_logprobs is not None:
        message.topk_prompt_logprobs.CopyFrom(
            _top(response.topk_prompt_logprobs, call.top_prompt_logprobs)
        )
    return message.SerializeToString()


def _top(rows: list[list[tuple[int, float]] | None], count: int) -> pb.TopkLogprobs:
    tokens = np.zeros((len(rows), count), "<i4")
    logprobs = np.full((len(rows), count), NOT_COMPUTED, "<f4")
    for number, row in enumerate(rows):
        for place, (token, logprob) in enumerate(row or ()):
            tokens[number, place], logprobs[number, place] = token, logprob
    return pb.TopkLogprobs(
        token_ids=tokens.tobytes(), logprobs=logprobs.tobytes(), k=count, length=len(rows)
    )


def answer_of(body: bytes) -> SampleResponse:
    """What `answer_to` wrote."""
    message = pb.SampleResponse()
    message.ParseFromString(body)
    sequences = [
        SampledSequence(
            "stop" if one.stop_reason == pb.STOP_REASON_STOP else "length",
            np.frombuffer(one.tokens, "<i4").tolist(),
            np.frombuffer(one.logprobs, "<f4").tolist(),
        )
        for one in message.sequences
    ]
    scores: list[float | None] | None = None
    if message.HasField("prompt_logprobs"):
        given = np.frombuffer(message.prompt_logprobs, "<f4").tolist()
        scores = [None if value != value else value for value in given]
    top = None
    if message.HasField("topk_prompt_logprobs"):
        top = _top_of(message.topk_prompt_logprobs)
    return SampleResponse(sequences, scores, top)


def _top_of(message: pb.TopkLogprobs) -> list[list[tuple[int, float]] | None]:
    shape = (message.length, message.k)
    tokens = np.frombuffer(message.token_ids, "<i4").reshape(shape).tolist()
    logprobs = np.frombuffer(message.logprobs, "<f4").reshape(shape).tolist()
    rows: list[list[tuple[int, float]] | None] = []
    for row in zip(tokens, logprobs, strict=True):
        cells = [pair for pair in zip(*row, strict=True) if pair[1] != NOT_COMPUTED]
        rows.append(cells or None)
    return rows

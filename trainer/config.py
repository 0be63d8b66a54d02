"""A training run as data: the dataclasses that a YAML recipe is loaded into.

`load_config` refuses a key that no dataclass has and offers the nearest one; jsonargparse checks
the values' types and builds the same objects that Python code would.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from plait.datasets.policy import TooLong
from plait.datasets.records.captions import CaptionOptions
from plait.datasets.settings import Packing
from plait.datasets.splits import SplitOptions
from plait.datasets.views import Views
from plait.errors import ConfigError
from plait.modalities import Limits
from plait.ranges import ADAMW, check_number
from plait.trainer.spec import ModelSpec, check_part_rates
from plait.trainer.strict import strictly

CacheFeatures = Literal["auto", "always", "never"]

FETCHED = "fetched:"
"""`data.path: fetched:stamps` is what `plait fetch stamps` brought."""


@dataclass(frozen=True, kw_only=True)
class BrokenRows:
    """What happens to rows that cannot be decoded."""

    on_error: Literal["raise", "skip"] = "raise"
    """"raise" stops at the first; "skip" leaves it out, writes it down and goes on."""

    max_consecutive: int | None = 16
    """Broken rows one after another that are still skipped; null is no limit."""

    max_total: int | None = 100
    """Broken rows of a run that are still skipped; null is no limit."""

    too_long: TooLong = "error"
    """What happens to a row that no pack can hold: "truncate" cuts text off its end, after its
    last media item, and drops it where that does not help."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One dataset: where its rows are and how they are read."""

    path: str | None = None
    """A folder of media with texts, a table (.jsonl, .json, .csv, .parquet), WebDataset shards, or
    `fetched:<name>`."""

    name: str | None = None
    """What logs, messages and the ledger call it; the file's or folder's own name by default."""

    dialect: str | None = None
    """What its rows mean, one of `plait.datasets.records.DIALECTS`; recognised by default."""

    media_dir: str | None = None
    """Where relative media paths start; the table's own folder by default."""

    remote: bool | None = None
    """Whether media at addresses (https://, s3://) are fetched; rows with them are broken
    otherwise."""

    captions: CaptionOptions | None = None
    """How texts become answers; for pictures with captions."""


@dataclass(frozen=True, kw_only=True)
class BlendEntry:
    """A dataset of a blend, and how much of it is drawn."""

    data: DatasetConfig

    weight: float = 1.0
    """Its share of the rows drawn, relative to the other weights of the blend."""

    epochs: int | None = None
    """Passes over its training rows at most, after which its share goes to the others; null is
    any number. A blend of which all have ended ends the training."""

    split: SplitOptions | None = None
    """Which of its rows are held out; `data.split` by default."""

    def __post_init__(self) -> None:
        if self.data.path is None:
            raise ConfigError("each dataset of data.blend needs a path; one has none")
        check_number("data.blend.weight", self.weight, "(0, inf)")
        if self.epochs is not None:
            check_number("data.blend.epochs", self.epochs, "[1, inf)", whole=True)


@dataclass(frozen=True, kw_only=True)
class DataConfig(DatasetConfig):
    """Rows, of one dataset or of a blend of several, and which of them are held out."""

    blend: list[BlendEntry] | None = None
    """Several datasets, each with a weight, instead of `path` and what belongs to it."""

    split: SplitOptions = field(default_factory=SplitOptions)
    """Which rows are held out, of each dataset."""

    broken: BrokenRows = field(default_factory=BrokenRows)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if (self.path is None) == (self.blend is None):
            raise ConfigError(
                "a run needs exactly one of data.path and data.blend; "
                + ("neither is set" if self.path is None else "both are set")
            )
        if self.blend is None:
            return
        if not self.blend:
            raise ConfigError("data.blend needs at least one dataset; it is empty")
        for own in fields(DatasetConfig):
            if getattr(self, own.name) is not None:
                raise ConfigError(
                    f"data.{own.name} is of a single dataset; with data.blend, set it in the "
                    "entry of the dataset that is meant"
                )

    @property
    def datasets(self) -> list[BlendEntry]:
        """The datasets of the blend, or the single one as a blend of one."""
        if self.blend is not None:
            return self.blend
        own = {own.name: getattr(self, own.name) for own in fields(DatasetConfig)}
        return [BlendEntry(data=DatasetConfig(**own))]

    @property
    def described(self) -> str:
        """The paths in one line."""
        return " + ".join(str(entry.data.path) for entry in self.datasets)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation, in packs and steps."""

    steps: int = 200
    """Optimiser steps."""

    capacity: int = 1024
    """Positions of a pack, which is one micro-batch, at most."""

    max_documents: int | None = None
    """Samples of a pack at most; null is no limit."""

    max_patches: int | None = None
    """Positions of a pack that pictures fill at most; null is no limit."""

    max_frames: int | None = None
    """Frames of films in a pack at most; null is no limit."""

    max_squares: int | None = None
    """The sum of the squared lengths of a pack's samples at most, to which the time of attention
    is proportional; null is no limit."""

    packing: Packing = "stream"
    """"stream" packs rows in their shuffled order, a window of them at a time; "decreasing" sorts
    all by length, which fills packs a little better and mixes lengths less."""

    accumulate: int = 1
    """Packs of one optimiser step."""

    learning_rate: float = 4e-4
    """Peak learning rate of every part not named in `part_learning_rates`."""

    part_learning_rates: Mapping[str, float] = field(default_factory=dict)
    """Peak learning rates by part: language, projector, vision."""

    warmup: int = 20
    """Steps over which learning rates rise linearly to their peak."""

    final_share: float = 0.0
    """Learning rates fall along a cosine to this share of their peak."""

    weight_decay: float = 0.0
    grad_clip_norm: float = 1.0
    """Of the mean gradient; 0 clips nothing."""

    workers: int = 2
    """Threads that decode pictures."""

    prefetch: int = 4
    """Packs prepared ahead."""

    prefetch_mb: int = 512
    """What prepared packs may hold, in 10^6 bytes, before decoding waits."""

    cache_features: CacheFeatures = "auto"
    """Whether features of frozen encoders are computed once and kept under $PLAIT_HOME: "always",
    "never", or where a run would read them several times and there is room ("auto")."""

    cache_disk_mb: int = 20_000
    """What features of all runs may take on the disk, in 10^6 bytes; the longest unused go first,
    and a run whose own need more keeps none."""

    cache_memory_mb: int = 256
    """Features kept in memory besides, in 10^6 bytes."""

    validate_every: int = 25
    """Steps between measurements on the validation rows."""

    patience: int | None = None
    """Stop after so many validations without a better one; null never stops early."""

    checkpoint_every: int = 25
    """Steps between checkpoints."""

    keep_checkpoints: int = 2
    """Newest checkpoints kept; the best one is kept besides."""

    def __post_init__(self) -> None:
        least = {"steps": 1, "capacity": 2, "accumulate": 1, "warmup": 0, "validate_every": 1,
                 "checkpoint_every": 1, "keep_checkpoints": 1, "cache_memory_mb": 0,
                 "cache_disk_mb": 0,
                 "patience": 1, "max_documents": 1, "workers": 0, "prefetch": 0, "prefetch_mb": 0,
                 "max_patches": 0, "max_frames": 0, "max_squares": 1}  # fmt: skip
        for name, low in least.items():
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise ConfigError(
                    f"train.{name} must be at least {low}; it is {getattr(self, name)}"
                )
        for name in ("learning_rate", "weight_decay", "grad_clip_norm"):
            check_number(f"train.{name}", getattr(self, name), ADAMW[name])
        check_number("train.final_share", self.final_share, "[0, 1]")
        check_part_rates("train.part_learning_rates", self.part_learning_rates)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured on the test rows, before and after."""

    captions: int = 12
    """Test rows whose greedy answers are written down."""

    max_tokens: int = 24
    """Of a greedy answer at most."""

    word_error_rate: bool = False
    """Compare the greedy answers to all test rows, word by word: for transcripts."""

    without: bool = False
    """Measure the nll again without each medium, text included."""

    single_frame: bool = False
    """Measure the nll again with one frame of each film."""

    def __post_init__(self) -> None:
        check_number("evaluation.captions", self.captions, "[0, inf)", whole=True)
        check_number("evaluation.max_tokens", self.max_tokens, "[1, inf)", whole=True)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a training run."""

    name: str
    data: DataConfig
    model: ModelSpec

    run_dir: str = ""
    """Where checkpoints, logs and metrics go; runs/<name> by default."""

    seed: int = 0
    """Draws the initial weights, the order of rows and the choice of views."""

    threads: int = 0
    """CPU threads of torch; 0 is one per core."""

    devices: int = 1
    """Ranks that train together, one on each GPU, or as so many processes on a CPU. The packs of a
    step are shared out among them, so that the result does not depend on it."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How several devices share the model: each has all of it ("ddp"), or the layers of the
    language model are cut into shards ("fsdp")."""

    views: Views = field(default_factory=Views)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        check_number("devices", self.devices, "[1, inf)", whole=True)
        check_number("threads", self.threads, "[0, inf)", whole=True)
        check_number("seed", self.seed, "[0, inf)", whole=True)

    @property
    def folder(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML recipe.

    Args:
        overrides: `section.key=value`, the value in YAML; applied over the file.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value does not fit.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"a recipe must be a file; there is none at {path}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"a recipe must be YAML; {path} is not: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"a recipe must be YAML with keys; {path} holds {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return config_from(values)


def config_from(values: Mapping[str, Any]) -> RunConfig:
    """A run from nested plain values, as they stand in YAML.

    Raises:
        ConfigError: as `load_config`.
    """
    return strictly(RunConfig, values)


def plain(config: RunConfig) -> dict[str, Any]:
    """The run as nested plain values, ready for JSON and for `config_from`."""
    values = asdict(config)
    return {key: _listed(value) for key, value in values.items()}


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, tuple | list) else value


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"an override is written key=value; got {override!r}")
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key} cannot be set: {section} is a value, not a section")
        values = inner
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {key} must be YAML; quote it: {text!r} is not") from error

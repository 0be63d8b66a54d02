"""Commands and results between controller and executors: plain data that can be pickled.

Shape letters: T positions of a document, K soft targets of a position.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.modalities import Limits
from plait.stream import Document, ItemInputs
from plait.trainer.checkpoint import Snapshot
from plait.trainer.model import Objective
from plait.trainer.optimiser import StepSettings
from plait.trainer.places import Place
from plait.trainer.sampling.requests import Generated, PromptScores
from plait.trainer.sampling.settings import SamplerSettings
from plait.trainer.source import Source
from plait.trainer.spec import ModelSpec
from plait.trainer.store import Store

BaseKey = tuple[str, ...]
"""What tells one language model from others."""


@dataclass(frozen=True, slots=True)
class CreateRun:
    """Build a model that trains, on a language model that is there already where it may."""

    run: str
    spec: ModelSpec
    seed: int
    limits: Limits


@dataclass(frozen=True, slots=True)
class DropRun:
    """Forget a run when what is queued of it is done; one that is gone is no error."""

    run: str


@dataclass(frozen=True, slots=True)
class ForwardBackward:
    """Compute documents in the micro-batches planned: lists of indices into `documents`.

    Without `backward` nothing is added to the gradients. Then, and with `everywhere`, logprobs are
    given at every text position, not only where the loss reads them.
    """

    run: str
    documents: list[Document]
    micro_batches: list[list[int]]
    objective: Objective
    backward: bool = True
    everywhere: bool = False


@dataclass(frozen=True, slots=True)
class DocumentResult:
    """One document's logprobs (T,) or (T, K), 0 where none was computed, its loss, its weight, and
    what its loss says besides."""

    logprobs: NDArray[np.float32]
    loss: float
    weight: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Documents of one `ForwardBackward` that one rank computes in one row."""

    run: str
    documents: Sequence[Document]
    objective: Objective
    backward: bool
    place: tuple[int, ...]
    """In its pass, for what is drawn at random."""

    inputs: Sequence[Sequence[ItemInputs]] | None = None
    """Of each document's media, where they are loaded already."""

    behind: int = 0
    """Passes of the run that have begun since its own."""

    everywhere: bool = False
    """Logprobs are wanted also where the loss reads none."""


@dataclass(frozen=True, slots=True)
class Compute:
    """One rank's row, micro-batches of several runs; it may be empty.

    Args:
        beside: A run of some rank's row.
        backward: Whether some rank's row is learned from.
    """

    row: Sequence[MicroBatch]
    beside: str
    backward: bool


@dataclass(frozen=True, slots=True)
class Begin:
    """Training passes of a run begin: one with each `ForwardBackward`."""

    run: str
    passes: int = 1


@dataclass(frozen=True, slots=True)
class Finish:
    """All of it is computed: its gradients are the run's."""

    run: str


@dataclass(frozen=True, slots=True)
class Abandon:
    """It failed: nothing of it stays."""

    run: str
    reason: str


@dataclass(frozen=True, slots=True)
class OptimStep:
    """Apply the summed gradients, divided by their summed weights where asked, and clear them."""

    run: str
    settings: StepSettings
    divide_by_weight: bool = False


@dataclass(frozen=True, slots=True)
class SaveState:
    """Keep a run's weights, and all else that it needs to go on exactly, under a name.

    The result is the checkpoint's digest.
    """

    run: str
    store: Store
    place: Place
    weights_only: bool = False
    overwrite: bool = False
    ttl_seconds: float | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    """The user's own words about the run, for the manifest."""

    cursor: Any = None
    """Whatever the caller needs to go on with its data, as plain JSON."""


@dataclass(frozen=True, slots=True)
class LoadState:
    """Read back what `SaveState` wrote; without the optimiser's state where not asked for."""

    run: str
    source: Source
    with_optimizer: bool = False


@dataclass(frozen=True, slots=True)
class TakeView:
    """Keep an immutable copy of a run's present weights, to sample from as `view`."""

    run: str
    view: str


@dataclass(frozen=True, slots=True)
class CreateView:
    """Build a model that only samples, with the weights of a checkpoint where one is named."""

    view: str
    spec: ModelSpec
    source: Source | None
    limits: Limits


@dataclass(frozen=True, slots=True)
class SaveView:
    """Keep a view's weights under a name, which replaces what was there; the result is the
    checkpoint's digest."""

    view: str
    store: Store
    place: Place


@dataclass(frozen=True, slots=True)
class DropView:
    """Forget a view when its samples are done; one that is gone already is no error."""

    view: str


@dataclass(frozen=True, slots=True)
class Sample:
    """Continue one prompt `samples` times, or only score it, with the weights of `view`."""

    view: str
    prompt: Document
    settings: SamplerSettings
    samples: int = 1
    prompt_logprobs: bool = False
    top_prompt_logprobs: int = 0
    on_token: Callable[[int, int, float], None] | None = None
    """In this process only: is told each token as it comes."""

    request: str = ""
    """What `CancelSample` calls it."""


@dataclass(frozen=True, slots=True)
class CancelSample:
    """Take a request back; one that is done already is no error."""

    view: str
    request: str


def named(command: Sample, request: str) -> Sample:
    """The same, so that it can be cancelled."""
    return replace(command, request=request)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The samples of a prompt, and what the model thinks of it, where that was asked for."""

    samples: list[Generated]
    scores: PromptScores | None = None


@dataclass(frozen=True, slots=True)
class Gather:
    """Take part in gathering what is sharded of a run, for the rank that keeps it."""

    run: str
    weights_only: bool = False


@dataclass(frozen=True, slots=True)
class Restore:
    """Put a run where rank 0 has it."""

    run: str
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Lend:
    """Take part in reading one row of a sharded language model."""

    base: BaseKey


@dataclass(frozen=True, slots=True)
class Forget:
    """Language models that rank 0 has freed."""

    bases: list[BaseKey]


RankCommand = Gather | Restore | Lend | Forget
UNANSWERED = (Begin, Finish, Abandon, Lend, Forget)
"""What cannot fail on one rank alone."""

RunCommand = CreateRun | DropRun | ForwardBackward | OptimStep | SaveState | LoadState | TakeView
PassCommand = Begin | Compute | Finish | Abandon
ViewCommand = CreateView | SaveView | DropView | Sample | CancelSample
Command = RunCommand | PassCommand | ViewCommand | RankCommand

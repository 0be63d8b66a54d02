"""Commands and results between controller and executors: plain data that can be pickled.

Shape letters: T positions of a document.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from plait.stream import Document
from plait.trainer.optimiser import StepSettings
from plait.trainer.sampling.requests import Generated
from plait.trainer.sampling.settings import SamplerSettings


@dataclass(frozen=True, slots=True)
class ForwardBackward:
    """Compute documents in the micro-batches planned: lists of indices into `documents`.

    Without `backward` nothing is added to the gradients, and logprobs are given at every text
    position, not only where there is a weight.
    """

    documents: list[Document]
    micro_batches: list[list[int]]
    backward: bool = True


@dataclass(frozen=True, slots=True)
class DocumentResult:
    """One document's logprobs (T,), 0 where none was computed, its loss and its weight."""

    logprobs: NDArray[np.float32]
    loss: float
    weight: float


@dataclass(frozen=True, slots=True)
class OptimStep:
    """Apply the summed gradients, divided by their summed weights where asked, and clear them."""

    settings: StepSettings
    divide_by_weight: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """Continue one prompt `samples` times with the weights of `snapshot`, or the present ones."""

    prompt: Document
    settings: SamplerSettings
    samples: int = 1
    snapshot: int | None = None


@dataclass(frozen=True, slots=True)
class TakeSnapshot:
    """Keep an immutable copy of the present weights; the result is its number."""


@dataclass(frozen=True, slots=True)
class DropSnapshot:
    """Forget a snapshot; one that is gone already is no error."""

    number: int


@dataclass(frozen=True, slots=True)
class SaveState:
    """Write weights, optimiser and random state into `folder`; refused while gradients pend."""

    folder: Path
    weights_only: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    """The user's own words about the run, for the manifest."""


@dataclass(frozen=True, slots=True)
class LoadState:
    """Read back what `SaveState` wrote; without the optimiser's state where not asked for."""

    folder: Path
    with_optimizer: bool = False


Command = ForwardBackward | OptimStep | Sample | TakeSnapshot | DropSnapshot | SaveState | LoadState
Result = list[DocumentResult] | dict[str, float] | list[Generated] | int | None

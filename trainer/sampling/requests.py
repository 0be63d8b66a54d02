"""What the sampler is asked for, and where each request stands.

Shape letters: T positions of a prompt, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from plait.stream import Document, ItemInputs, Layout
from plait.trainer.model import PlaitModel
from plait.trainer.sampling.choosing import Draws
from plait.trainer.sampling.memory import Place
from plait.trainer.sampling.settings import SamplerSettings
from plait.trainer.sampling.stopping import Stops


@dataclass(slots=True)
class Generated:
    """Tokens with their logprobs under the raw distribution; `stopped` by one of its ends."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False


@dataclass(slots=True)
class PromptScores:
    """What the model thinks of the prompt's own tokens; None where nothing predicts a token.

    That is the first position, and every media position.
    """

    logprobs: list[float | None] = field(default_factory=list)
    top: list[list[tuple[int, float]] | None] = field(default_factory=list)
    """The likeliest tokens at each position and their logprobs, where they were asked for."""


@dataclass(slots=True, eq=False)
class Request:
    """`samples` continuations of one prompt; with none of them it is only scored.

    Args:
        model: Whose weights sample; they must not change before the request is done.
        inputs: The loaded media of the prompt.
        owner: Whose turn it is, for fairness between those that share a sampler.
        prompt_logprobs: Also score the prompt's tokens.
        top_prompt_logprobs: Also so many likeliest tokens at each of its positions.
        on_token: Is told each token as it comes: (sample, token, logprob).
    """

    model: PlaitModel
    tokenizer: Any
    layout: Layout
    prompt: Document
    inputs: Sequence[ItemInputs]
    settings: SamplerSettings
    samples: int = 1
    owner: str = ""
    prompt_logprobs: bool = False
    top_prompt_logprobs: int = 0
    on_token: Callable[[int, int, float], None] | None = None


@dataclass(slots=True, eq=False)
class Prompt:
    """A request's prompt while it is read: embedded once it has room, then read in chunks."""

    positions: Tensor
    hi: Tensor
    """(T,) one past the last position that each sees."""

    keys: np.ndarray
    """(T,) int64: equal where positions hold the same token, or the same part of a media item."""

    embeddings: Tensor | None = None
    """Of the positions from `first` on; None before it has room, and after it is read."""

    deeper: Any = None
    first: int = 0
    place: Place | None = None
    read: int = 0
    """Positions that are read, or that another prompt had read."""

    end: Tensor | None = None
    """(H,) the hidden state after the prompt, once it is read."""


@dataclass(slots=True, eq=False)
class Continuation:
    """One sample of a request while it grows."""

    number: int
    draws: Draws
    place: Place
    owns_place: bool
    made: Generated = field(default_factory=Generated)


@dataclass(slots=True, eq=False)
class Job:
    """A request with everything that is known of it until it is done."""

    request: Request
    stops: Stops
    most: int
    """Tokens of each sample at most."""

    banned: Tensor
    """(N,) token ids that are never chosen: one tensor for all jobs that ban the same."""

    first_position: int
    """Rotary position of the first generated token."""

    done: Callable[[list[Generated], PromptScores | None], None]
    failed: Callable[[BaseException], None]
    number: int
    """Its place in the order of arrival at the sampler."""

    prompt: Prompt | None = None
    reserved: Place | None = None
    """Room of the first of several samples."""

    started: int = 0
    """Samples that have begun."""

    running: list[Continuation] = field(default_factory=list)
    finished: dict[int, Generated] = field(default_factory=dict)
    scores: PromptScores | None = None

    @property
    def reads(self) -> bool:
        """Whether some of its prompt is not read yet."""
        return self.prompt is not None and self.prompt.end is None

    @property
    def starts(self) -> bool:
        """Whether samples of it are still to begin, its prompt being read."""
        read = self.prompt is not None and self.prompt.end is not None
        return read and self.started < self.request.samples

"""Micro-batches that fail are tried again in smaller pieces, on all ranks together.

What fails in one row is tried again slice by slice, so that one run's error, a NaN of its media or
of its weights too, is no other's. Where memory ends, a slice is halved; so is one whose gradients
are not finite, until the document that spoils them is known.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from plait.errors import ModelError
from plait.stream import Document
from plait.trainer.engine.commands import DocumentResult, MicroBatch
from plait.trainer.engine.computing import NotFiniteGradientsError
from plait.trainer.ranks.group import UndoneError

Result = list[DocumentResult] | Exception
"""Of one micro-batch: its documents', or why it failed."""

Outcome = list[list[DocumentResult]] | Exception
"""Of one row: its micro-batches' documents, or why nothing of it counts."""

Attempt = Callable[[Sequence[Sequence[MicroBatch]]], Sequence[Outcome]]
"""Computes rows at the same time, one on each rank."""


@dataclass(slots=True)
class _Wanted:
    """A micro-batch, and what is known of it."""

    batch: MicroBatch
    results: dict[int, DocumentResult] = field(default_factory=dict)
    error: Exception | None = None

    @property
    def result(self) -> Result:
        return self.error or [self.results[i] for i in range(len(self.batch.documents))]


@dataclass(frozen=True, slots=True)
class _Part:
    """Documents [start, stop) of a micro-batch."""

    wanted: _Wanted
    start: int
    stop: int

    @property
    def documents(self) -> Sequence[Document]:
        return self.wanted.batch.documents[self.start : self.stop]

    @property
    def batch(self) -> MicroBatch:
        whole = self.wanted.batch
        inputs = None if whole.inputs is None else whole.inputs[self.start : self.stop]
        place = (*whole.place, self.start)
        return replace(whole, documents=self.documents, place=place, inputs=inputs)

    def cut(self, at: int) -> "list[list[_Part]]":
        return [
            [_Part(self.wanted, self.start, self.start + at)],
            [_Part(self.wanted, self.start + at, self.stop)],
        ]


_Piece = list[_Part]
"""What one rank computes as one row."""


def compute_rows(
    rows: Sequence[Sequence[MicroBatch]],
    attempt: Attempt,
    *,
    in_step: bool,
    release: Callable[[], bool] = lambda: False,
) -> list[list[Result]]:
    """The result of each micro-batch of each row.

    Args:
        rows: At most one for each rank.
        in_step: Whether one rank's failure undoes the rows of all; what failed together is then
            tried again alone.
        release: Gives memory back that something else keeps; False where there is none. It is
            asked before a micro-batch is split.
    """
    wanted = [[_Wanted(batch) for batch in row] for row in rows]
    waves: deque[list[_Piece]] = deque(
        [[[_Part(one, 0, len(one.batch.documents)) for one in row] for row in wanted]]
    )
    while waves:
        wave = [piece for piece in map(_needed, waves.popleft()) if piece]
        if not wave:
            continue
        outcomes = attempt([[part.batch for part in piece] for piece in wave])
        for piece, outcome in zip(wave, outcomes, strict=True):
            if not isinstance(outcome, Exception):
                _record(piece, outcome)
            elif (is_out_of_memory(outcome) and release()) or (in_step and len(wave) > 1):
                waves.append([piece])
            else:
                waves.extend([smaller] for smaller in _smaller(piece, outcome))
    return [[one.result for one in row] for row in wanted]


def _needed(piece: _Piece) -> _Piece:
    """Without what belongs to micro-batches that have failed already."""
    return [part for part in piece if part.wanted.error is None]


def _record(piece: _Piece, results: list[list[DocumentResult]]) -> None:
    for part, found in zip(piece, results, strict=True):
        part.wanted.results.update(zip(range(part.start, part.stop), found, strict=True))


def _smaller(piece: _Piece, error: Exception) -> list[_Piece]:
    """What to try in the place of a piece that failed; nothing where that is its own fault."""
    if len(piece) > 1:
        return [[part] for part in piece]
    [part] = piece
    if isinstance(error, UndoneError):
        error = ModelError("another rank failed beside this micro-batch; submit it again")
    short, spoilt = is_out_of_memory(error), isinstance(error, NotFiniteGradientsError)
    cut = _middle(part.documents) if short or spoilt else None
    if cut is not None:
        return part.cut(cut)
    if not short:
        part.wanted.error = error
        return []
    positions = sum(document.length for document in part.documents)
    part.wanted.error = ModelError(
        f"memory ended in a micro-batch of {len(part.documents)} documents with {positions} "
        "positions, which cannot be split further; shorten them, or lower the engine's capacity"
    )
    return []


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # of the CPU, of cuBLAS
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _middle(documents: Sequence[Document]) -> int | None:
    """The cut nearest to the middle that splits no group; None where there is none."""
    cuts = [
        number
        for number in range(1, len(documents))
        if documents[number].group is None or documents[number].group != documents[number - 1].group
    ]
    return min(cuts, key=lambda cut: abs(cut - len(documents) / 2), default=None)

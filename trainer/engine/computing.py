"""Micro-batches of several runs as one row: all of it counts, or nothing.

Shape letters: T positions of a document, K soft targets of a position.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plait.errors import DataError
from plait.stream import Document, ItemInputs, pack
from plait.trainer.build import Built
from plait.trainer.engine.commands import DocumentResult
from plait.trainer.engine.runs import Run
from plait.trainer.model import Objective, Sums
from plait.trainer.ranks.group import ALONE, Group, UndoneError, all_or_none
from plait.trainer.ranks.sharding import local
from plait.trainer.together import Part, Row

Load = Callable[[Document, Built], list[ItemInputs]]

_PROCESS_RANDOM = threading.Lock()


class NotFiniteGradientsError(DataError):
    """Of some document of a micro-batch, nobody knows which."""


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """One micro-batch of a run's `forward_backward`."""

    run: Run
    documents: Sequence[Document]
    objective: Objective
    backward: bool
    place: tuple[int, ...] = ()
    """In its pass, which dropout is drawn from."""

    inputs: Sequence[Sequence[ItemInputs]] | None = None
    """Of each document's media, where they are loaded already."""

    behind: int = 0
    """Passes of the run that have begun since its own."""

    everywhere: bool = False
    """Logprobs are wanted also where the loss reads none; without `backward` they always are."""


def compute(
    slices: Sequence[Slice],
    load: Load,
    group: Group = ALONE,
    *,
    backward: bool | None = None,
    beside: Run | None = None,
) -> list[list[DocumentResult]]:
    """Forward, and backward where it is wanted; the row's gradients are added all or none.

    Where models are sharded, all ranks compute rows of one language model at the same time, and a
    rank with nothing to read reads a single position.

    Args:
        load: Decodes the media of a document.
        backward: Whether some rank's row is learned from; by default this one's.
        beside: A run of the other ranks' rows, where models are sharded.

    Raises:
        DataError: a loss, or a gradient, is not finite, or media cannot be decoded.
        UndoneError: another rank's row failed.
    """
    for one in slices:
        one.run.train(one.backward)
    if slices:  # what they share: checkpointing saves memory in training mode alone
        slices[0].run.model.backbone.train(any(one.backward for one in slices))
    learns = any(one.backward for one in slices) if backward is None else backward
    with _random_of(slices), torch.set_grad_enabled(learns):
        with all_or_none(group):
            backbone = None if beside is None else beside.model.backbone
            row = Row([_part(one, load) for one in slices], backbone)
        with row.read(group, _finite(slices)) as made:
            if learns:
                _add_gradients(slices, row, made, group, beside)
    return [_results(one.documents, sums) for one, sums in zip(slices, made, strict=True)]


def _part(one: Slice, load: Load) -> Part:
    documents = list(one.documents)
    loaded = one.inputs or [load(document, one.run.built) for document in documents]
    stream = pack(documents, loaded)
    return Part(one.run.model, stream, one.objective, one.everywhere or not one.backward)


def _add_gradients(
    slices: Sequence[Slice], row: Row, made: Sequence[Sums], group: Group, beside: Run | None
) -> None:
    """Backward; the gradients of all slices are added to those of earlier micro-batches, or none.

    Raises:
        DataError: some are not finite.
    """
    learning = [(one, sums) for one, sums in zip(slices, made, strict=True) if one.backward]
    runs = [one.run for one, _ in learning]
    if beside is not None and beside not in runs:  # its shards have gradients of other ranks' rows
        runs.append(beside)
    before = [_taken(run) for run in runs]
    try:
        row.backward([sums for _, sums in learning])
        _check_gradients([one for one, _ in learning], runs, group)
        new = [_taken(run) for run in runs]
    except BaseException:
        for run, gradients in zip(runs, before, strict=True):
            run.give(gradients)
        raise
    for run, old, added in zip(runs, before, new, strict=True):
        run.give([_sum(a, b) for a, b in zip(old, added, strict=True)])
    for one, sums in learning:
        one.run.add(sums)


def _taken(run: Run) -> list[Tensor | None]:
    """The gradients that a run's parameters hold; they hold none afterwards."""
    gradients = [parameter.grad for *_, parameter in run.trainable]
    run.give([None] * len(gradients))
    return gradients


@torch.no_grad()
def _sum(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old.add_(new)


def _finite(slices: Sequence[Slice]) -> Callable[[Sequence[Sums]], None]:
    def check(made: Sequence[Sums]) -> None:
        for one, sums in zip(slices, made, strict=True):
            for document, (loss, _weight) in zip(one.documents, sums.documents, strict=True):
                if not np.isfinite(loss):
                    raise DataError(
                        f"a loss must be finite; that of {_named(document)} is {loss}: "
                        "nothing was added to the gradients; look at its data and its loss inputs",
                        document.origin,
                    )

    return check


def _check_gradients(learning: Sequence[Slice], runs: Sequence[Run], group: Group) -> None:
    """Collective where models are sharded: what one rank's data spoil may be another's shard.

    Raises:
        NotFiniteGradientsError: some of this rank's slices have gradients that are not finite.
        UndoneError: it has none, but another rank has.
    """
    spoilt = [run for run in runs if not _all_finite(run)]
    if group.all_true(not spoilt):
        return
    if not learning:
        raise UndoneError
    one = next((one for one in learning if one.run in spoilt), learning[0])
    names = ", ".join(_named(document) for document in one.documents[:3])
    more = f" and {len(one.documents) - 3} more" if len(one.documents) > 3 else ""
    raise NotFiniteGradientsError(
        f"gradients must be finite, and those of {names}{more} are not: nothing was added; look "
        "at their data and loss inputs, or lower the learning rate",
        one.documents[0].origin,
    )


def _all_finite(run: Run) -> bool:
    gradients = [local(p.grad) for *_, p in run.trainable if p.grad is not None]
    sums = [gradient.sum(dtype=torch.float64) for gradient in gradients]
    return not sums or bool(torch.stack(sums).sum().isfinite())


def _named(document: Document) -> str:
    return f"datum {document.sample_id}"


@contextmanager
def _random_of(slices: Sequence[Slice]) -> Iterator[None]:
    """Dropout draws from what the run and the place in its pass say, whatever else this process
    draws and on whichever rank it is. A run that draws has a row of its own.

    torch's layers know the process's generator only, hence the lock.
    """
    if not any(one.run.draws for one in slices):
        yield
        return
    [one] = slices
    device = one.run.model.device
    devices = [device] if device.type == "cuda" else []
    with _PROCESS_RANDOM, torch.random.fork_rng(devices=devices):
        torch.manual_seed(one.run.dropout_seed(one.place, one.behind))
        yield


def _results(documents: Sequence[Document], sums: Sums) -> list[DocumentResult]:
    """Cut a stream's logprobs into its documents'."""
    total = sum(document.length for document in documents)
    found = sums.logprobs.float().cpu().numpy()
    logprobs = np.zeros((total, *found.shape[1:]), dtype=np.float32)
    logprobs[sums.index.numpy()] = found
    metrics = {name: values.tolist() for name, values in sums.metrics.items()}
    results, start = [], 0
    for number, (document, (loss, weight)) in enumerate(
        zip(documents, sums.documents, strict=True)
    ):
        stop = start + document.length
        facts = {name: values[number] for name, values in metrics.items()}
        results.append(DocumentResult(logprobs[start:stop], loss, weight, facts))
        start = stop
    return results

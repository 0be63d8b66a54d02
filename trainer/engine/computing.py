"""Micro-batches of several runs, computed as one row where nothing goes wrong.

Shape letters: T positions of a document, K soft targets of a position.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plait.errors import DataError, ModelError
from plait.stream import Document, ItemInputs, TokenStream, pack
from plait.trainer.build import Built
from plait.trainer.engine.commands import DocumentResult
from plait.trainer.engine.runs import Run
from plait.trainer.model import Objective, Sums
from plait.trainer.together import Part, computed

Load = Callable[[Document, Built], list[ItemInputs]]

_PROCESS_RANDOM = threading.Lock()


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """One micro-batch of a run's `forward_backward`."""

    run: Run
    documents: Sequence[Document]
    objective: Objective
    backward: bool


Result = list[DocumentResult] | Exception


def compute(slices: Sequence[Slice], load: Load) -> list[Result]:
    """Each slice's documents, or why it failed; its gradients then are its run's to abandon.

    What fails in one row is tried again slice by slice, so that one run's error, a NaN of its
    media or of its weights too, is no other's. Where memory ends, a slice is halved.

    Args:
        load: Decodes the media of a document.
    """
    results: dict[int, Result] = {}
    ready: list[tuple[int, Slice, TokenStream]] = []
    for number, one in enumerate(slices):
        try:
            ready.append((number, one, _stream(one, load)))
        except Exception as error:
            results[number] = error
    made: Sequence[Result]
    try:
        made = _together([(one, stream) for _, one, stream in ready])
    except Exception as error:
        failed_alone = len(ready) == 1 and not _is_out_of_memory(error)
        made = [error if failed_alone else _alone(one, load) for _, one, _ in ready]
    results |= {number: result for (number, _, _), result in zip(ready, made, strict=True)}
    return [results[number] for number in range(len(slices))]


def _stream(one: Slice, load: Load) -> TokenStream:
    documents = list(one.documents)
    return pack(documents, [load(document, one.run.built) for document in documents])


def _alone(one: Slice, load: Load) -> Result:
    """One slice after a row of several failed, or after memory ended."""
    try:
        return _together([(one, _stream(one, load))])[0]
    except Exception as error:
        if not _is_out_of_memory(error):
            return error
    try:
        return _halved(one, load)
    except Exception as error:
        return error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _halved(one: Slice, load: Load) -> list[DocumentResult]:
    """A slice in two micro-batches, and these in two again where memory still ends.

    Raises:
        ModelError: a document, or a group of them, is too large by itself.
    """
    halves = _halves(one)
    if len(halves) == 1:
        positions = sum(document.length for document in one.documents)
        raise ModelError(
            f"memory ended in a micro-batch of {len(one.documents)} documents with {positions} "
            "positions, which cannot be split further; shorten them, or lower the engine's "
            "capacity"
        )
    results: list[DocumentResult] = []
    for half in halves:
        try:
            results += _together([(half, _stream(half, load))])[0]
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            results += _halved(half, load)
    return results


def _halves(one: Slice) -> list[Slice]:
    """Two slices, between whose documents no group is split; one where that cannot be."""
    documents = list(one.documents)
    middle = len(documents) / 2
    cuts = [
        number
        for number in range(1, len(documents))
        if documents[number].group is None or documents[number].group != documents[number - 1].group
    ]
    if not cuts:
        return [one]
    cut = min(cuts, key=lambda number: abs(number - middle))
    return [
        Slice(one.run, part, one.objective, one.backward)
        for part in (documents[:cut], documents[cut:])
    ]


def _together(pairs: Sequence[tuple[Slice, TokenStream]]) -> list[list[DocumentResult]]:
    """Forward, and backward where it is wanted; the row's gradients are added all or none.

    Raises:
        ModelError: a loss is not finite.
    """
    if not pairs:
        return []
    backward = [one.backward for one, _ in pairs]
    parts = [
        Part(one.run.model, stream, one.objective, everywhere=not one.backward)
        for one, stream in pairs
    ]
    for one, _ in pairs:
        one.run.train(one.backward)
    with (
        _random_of(pairs[0][0].run),
        torch.set_grad_enabled(any(backward)),
        computed(parts) as made,
    ):
        _check_finite(pairs, made)
        _add_gradients(pairs, made)
    return [_results(one.documents, sums) for (one, _), sums in zip(pairs, made, strict=True)]


def _add_gradients(pairs: Sequence[tuple[Slice, TokenStream]], made: Sequence[Sums]) -> None:
    """Backward; the gradients of all slices are added to those of earlier micro-batches, or none.

    Raises:
        DataError: some are not finite.
    """
    learning = [(one.run, sums) for (one, _), sums in zip(pairs, made, strict=True) if one.backward]
    if not learning:
        return
    before = [_taken(run) for run, _ in learning]
    try:
        torch.stack([sums.loss for _, sums in learning]).sum().backward()  # type: ignore[no-untyped-call]
        _check_gradients([one for one, _ in pairs if one.backward])
        new = [_taken(run) for run, _ in learning]
    except BaseException:
        for (run, _), gradients in zip(learning, before, strict=True):
            run.give(gradients)
        raise
    for (run, sums), old, added in zip(learning, before, new, strict=True):
        run.give([_sum(a, b) for a, b in zip(old, added, strict=True)])
        run.add(sums)


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


def _check_finite(pairs: Sequence[tuple[Slice, TokenStream]], made: Sequence[Sums]) -> None:
    for (one, _), sums in zip(pairs, made, strict=True):
        for document, (loss, _weight) in zip(one.documents, sums.documents, strict=True):
            if not np.isfinite(loss):
                raise DataError(
                    f"a loss must be finite; that of {_named(one, document)} is {loss}: nothing "
                    "was added to the gradients; look at its data and its loss inputs",
                    document.origin,
                )


def _check_gradients(learning: Sequence[Slice]) -> None:
    for one in learning:
        gradients = [p.grad for *_, p in one.run.trainable if p.grad is not None]
        total = torch.stack([g.sum(dtype=torch.float64) for g in gradients]).sum()
        if not torch.isfinite(total):
            names = ", ".join(_named(one, document) for document in one.documents[:3])
            more = f" and {len(one.documents) - 3} more" if len(one.documents) > 3 else ""
            raise DataError(
                f"gradients must be finite, and those of {names}{more} are not: nothing was added"
                "; look at their data and loss inputs, or lower the learning rate",
                one.documents[0].origin,
            )


def _named(one: Slice, document: Document) -> str:
    if document.sample_id:
        return f"datum {document.sample_id}"
    return f"datum {one.documents.index(document)} of its micro-batch"


@contextmanager
def _random_of(run: Run) -> Iterator[None]:
    """Dropout draws from the run's own state, whatever else this process draws.

    torch's layers know the process's generator only, hence the lock.
    """
    if not run.draws:
        with nullcontext():
            yield
        return
    with _PROCESS_RANDOM, torch.random.fork_rng(devices=[]):
        torch.set_rng_state(run.random)
        yield
        run.random = torch.get_rng_state()


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

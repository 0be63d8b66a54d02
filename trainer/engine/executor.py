"""One rank's half of the engine: owns the model, the gradients and the optimiser."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.datasets.decoding import Decoder
from plait.errors import CheckpointError, DataError, ModelError, UnknownNameError
from plait.stream import Document, Item, ItemInputs, pack
from plait.trainer import checkpoint
from plait.trainer.build import Built
from plait.trainer.engine.commands import (
    Command,
    DocumentResult,
    DropSnapshot,
    ForwardBackward,
    LoadState,
    OptimStep,
    Result,
    Sample,
    SaveState,
    TakeSnapshot,
)
from plait.trainer.model import Sums
from plait.trainer.optimiser import make_optimizer, prepare_step, refuse_untrained
from plait.trainer.sampling.generating import generate
from plait.trainer.sampling.requests import Generated

_PROCESS_RANDOM = threading.Lock()


class Executor:
    """Executes commands one at a time, in order.

    A command that fails leaves weights, gradients and optimiser as they were.
    """

    def __init__(self, built: Built) -> None:
        self.built, self.model = built, built.model
        self.decoder = Decoder()
        for name in self.model.encoders:
            self.model.media_encoder(name).headers = self.decoder.header
        self.random = torch.Generator().manual_seed(built.seed).get_state()
        self.steps = 0
        self.pending_weight = 0.0
        self._snapshots: dict[int, dict[str, Tensor]] = {}
        self._numbers = count()

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Made when it is first needed: a model that only samples has nothing to optimise."""
        return make_optimizer(self.model)

    def execute(self, command: Command) -> Result:
        return _HANDLERS[type(command)](self, command)

    def forward_backward(self, command: ForwardBackward) -> list[DocumentResult]:
        results: list[DocumentResult | None] = [None] * len(command.documents)
        self.model.train(command.backward)
        with (
            self._unchanged_on_failure(),
            self._own_random(),
            torch.set_grad_enabled(command.backward),
        ):
            for indices in command.micro_batches:
                documents = [command.documents[i] for i in indices]
                stream = pack(documents, [self._load(document) for document in documents])
                sums = self.model.compute(stream, everywhere=not command.backward)
                if command.backward:
                    self._backward(sums)
                for index, result in zip(indices, _results(documents, sums), strict=True):
                    results[index] = result
        return [result for result in results if result is not None]

    def _backward(self, sums: Sums) -> None:
        if not torch.isfinite(sums.loss):
            raise ModelError(
                f"a loss must be finite; this one is {float(sums.loss.detach())}: nothing was "
                "added to the gradients; look at the data of this call"
            )
        sums.loss.backward()  # type: ignore[no-untyped-call]
        self.pending_weight += sums.weight

    def _load(self, document: Document) -> list[ItemInputs]:
        return [self._load_item(item) for item in document.items]

    def _load_item(self, item: Item) -> ItemInputs:
        encoder = self.model.media_encoder(item.plan.encoder).encoder
        try:
            media = self.decoder.decode(item.part, self.built.limits, item.plan.wanted)
            return ItemInputs(inputs=encoder.process(media))
        except DataError as error:
            raise error.at(item.origin) from error

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """Dropout draws from this engine's own state, whatever else this process draws.

        torch's layers know the process's generator only, hence the lock.
        """
        with _PROCESS_RANDOM, torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.random)
            yield
            self.random = torch.get_rng_state()

    @contextmanager
    def _unchanged_on_failure(self) -> Iterator[None]:
        """Gradients of a call are all added or not at all."""
        parameters = [parameter for _, _, parameter in self.model.trainable()]
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        weight = self.pending_weight
        try:
            yield
        except BaseException:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
            self.pending_weight = weight
            raise

    def optim_step(self, command: OptimStep) -> dict[str, float]:
        if not any(p.grad is not None for _, _, p in self.model.trainable()):
            raise ModelError(
                "optim_step needs gradients and there are none; call forward_backward before it"
            )
        if self.steps == 0:
            refuse_untrained(self.model)
        divide_by = self.pending_weight if command.divide_by_weight else 1.0
        if divide_by == 0:
            raise ModelError("divide_by_weight needs weights above 0; all weights were 0")
        metrics = prepare_step(self.model, self.optimizer, command.settings, divide_by)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.pending_weight = 0.0
        self.steps += 1
        return {"grad_norm:mean": metrics["grad_norm"]}

    def sample(self, command: Sample) -> list[Generated]:
        with self._weights_of(command.snapshot):
            rows = generate(
                self.model,
                self.built.tokenizer,
                self.built.layout,
                [command.prompt],
                [self._load(command.prompt)],
                command.settings,
                command.samples,
            )
        return list(rows[0])

    def take_snapshot(self, command: TakeSnapshot) -> int:
        del command
        number = next(self._numbers)
        self._snapshots[number] = self._copies()
        return number

    def drop_snapshot(self, command: DropSnapshot) -> None:
        self._snapshots.pop(command.number, None)

    def _copies(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for _, name, parameter in self.model.trainable()}

    @contextmanager
    def _weights_of(self, snapshot: int | None) -> Iterator[None]:
        """The weights of a snapshot for the time of a block; training never sees them."""
        if snapshot is None:
            yield
            return
        if snapshot not in self._snapshots:
            raise UnknownNameError("snapshot", str(snapshot), map(str, self._snapshots))
        present = self._copies()
        self._put(self._snapshots[snapshot])
        try:
            yield
        finally:
            self._put(present)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for _, name, parameter in self.model.trainable():
            parameter.copy_(weights[name])

    def save_state(self, command: SaveState) -> None:
        if command.weights_only:
            checkpoint.save(command.folder, self.built, metadata=command.metadata)
            return
        if self.pending_weight or any(p.grad is not None for _, _, p in self.model.trainable()):
            raise CheckpointError(
                "save_state keeps the end of a step, and gradients are pending; call optim_step "
                "before it"
            )
        state = checkpoint.capture(self.optimizer, self.steps, self.random)
        checkpoint.save(command.folder, self.built, state, metadata=command.metadata)

    def load_state(self, command: LoadState) -> None:
        def accept(state: checkpoint.State | None) -> None:
            if command.with_optimizer:
                checkpoint.check_state(command.folder, state, self.optimizer)

        state = checkpoint.load(
            command.folder, self.built, with_state=command.with_optimizer, accept=accept
        )
        if state is not None:
            self.optimizer.load_state_dict(state.optimizer)
            self.random, self.steps = state.random, state.step
        self.optimizer.zero_grad(set_to_none=True)
        self.pending_weight = 0.0


_HANDLERS: dict[type[Command], Callable[[Executor, Any], Result]] = {
    ForwardBackward: Executor.forward_backward,
    OptimStep: Executor.optim_step,
    Sample: Executor.sample,
    TakeSnapshot: Executor.take_snapshot,
    DropSnapshot: Executor.drop_snapshot,
    SaveState: Executor.save_state,
    LoadState: Executor.load_state,
}


def _results(documents: Sequence[Document], sums: Sums) -> list[DocumentResult]:
    """Cut a stream's logprobs into its documents'."""
    total = sum(document.length for document in documents)
    logprobs = np.zeros(total, dtype=np.float32)
    logprobs[sums.index.numpy()] = sums.logprobs.cpu().numpy()
    results, start = [], 0
    for document, (loss, weight) in zip(documents, sums.documents, strict=True):
        stop = start + document.length
        results.append(DocumentResult(logprobs[start:stop], loss, weight))
        start = stop
    return results

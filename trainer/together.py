"""Streams of several runs as one row through the language model that they share.

Shape letters: T positions of the whole row, H hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.errors import ModelError
from plait.stream import ItemInputs, TokenStream
from plait.trainer.backbone import Backbone
from plait.trainer.model import LEARN, Objective, PlaitModel, Sums
from plait.trainer.ranks.group import ALONE, Group, OutOfStepError, all_or_none
from plait.trainer.rows import Rows, join

Check = Callable[[Sequence[Sums]], None]


@dataclass(slots=True)
class Part:
    """One run's documents in a row.

    Args:
        everywhere: Compute logprobs also at the text positions that the loss does not read.
    """

    model: PlaitModel
    stream: TokenStream
    objective: Objective = LEARN
    everywhere: bool = False


class Row:
    """Parts whose models share a backbone, embedded and ready to be read.

    Args:
        backbone: What reads a row without parts, a single position, where ranks read together.
    """

    def __init__(self, parts: Sequence[Part], backbone: Backbone | None = None) -> None:
        found = parts[0].model.backbone if parts else backbone
        if found is None:
            raise ModelError("a row without parts needs a backbone")
        self.parts, self.backbone = parts, found
        self._hidden: Tensor | None = None
        self._embedded: list[tuple[Rows, Tensor]] = []
        if found.packs:
            _encode_shared(parts)
            self._embedded = [part.model.embed(part.stream) for part in parts]

    @contextmanager
    def read(self, group: Group = ALONE, check: Check = lambda _: None) -> Iterator[list[Sums]]:
        """The sums of each part; a model that does not pack reads document by document.

        Backward passes belong inside: gradient checkpointing computes layers again in them, which
        must have the same adapters.

        Args:
            check: May refuse the sums, before any rank goes on with them.
        """
        if not self.backbone.packs:
            made = [p.model.compute(p.stream, p.objective, p.everywhere) for p in self.parts]
            check(made)
            yield made
            return
        rows = join([row for row, _ in self._embedded]) if self.parts else self.backbone.spare()
        if group.sharded and torch.is_grad_enabled():  # all ranks go back through all layers
            rows.embeddings = rows.embeddings + rows.embeddings.new_zeros(1).requires_grad_()
        with self.backbone.adapters_of(rows):
            with all_or_none(group):
                self._hidden = self.backbone.read(rows)
                made = self._scored(self._hidden)
                check(made)
            yield made

    def _scored(self, hidden: Tensor) -> list[Sums]:
        if not self.parts:
            return []
        pieces = torch.split(hidden, [part.stream.length for part in self.parts])
        return [
            part.model.score(part.stream, states, touched, part.objective, part.everywhere)
            for part, states, (_, touched) in zip(self.parts, pieces, self._embedded, strict=True)
        ]

    def backward(self, learned: Sequence[Sums]) -> None:
        """The gradients of the summed losses, inside of `read`.

        Raises:
            OutOfStepError: it failed where other ranks' backward passes wait for this one.
        """
        losses = [sums.loss for sums in learned]
        if not self.backbone.sharded:
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            return
        assert self._hidden is not None
        nothing = (self._hidden[:1] * 0).nan_to_num().sum()
        try:
            torch.stack([nothing, *losses]).sum().backward()  # type: ignore[no-untyped-call]
        except Exception as error:
            raise OutOfStepError(f"a backward pass over shards failed: {error}") from error


@contextmanager
def computed(parts: Sequence[Part]) -> Iterator[list[Sums]]:
    """The sums of parts whose models share a backbone; backward passes belong inside."""
    with Row(parts).read() as made:
        yield made


def _encode_shared(parts: Sequence[Part]) -> None:
    """Let a frozen tower that several runs use read all of their items at once."""
    waiting: dict[tuple[int, str], list[tuple[Part, str]]] = {}
    for part in parts:
        for name in part.stream.media.keys() & part.model.encoders.keys():
            media = part.model.media_encoder(name)
            if not media.trainable:
                key = (id(media.encoder), media.pool.describe())
                waiting.setdefault(key, []).append((part, name))
    for users in waiting.values():
        if len(users) > 1:
            _encode(users)


def _encode(users: Sequence[tuple[Part, str]]) -> None:
    batches = [part.stream.media[name] for part, name in users]
    fresh = [item.inputs for batch in batches for item in batch.items if item.features is None]
    part, name = users[0]
    features = iter(part.model.media_encoder(name).features([one for one in fresh if one]))
    for batch in batches:
        batch.items = [
            item if item.features is not None else ItemInputs(features=next(features))
            for item in batch.items
        ]

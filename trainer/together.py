"""Streams of several runs as one row through the language model that they share.

Shape letters: T positions of the whole row, H hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from plait.stream import ItemInputs, TokenStream
from plait.trainer.model import LEARN, Objective, PlaitModel, Sums
from plait.trainer.rows import join


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


@contextmanager
def computed(parts: Sequence[Part]) -> Iterator[list[Sums]]:
    """The sums of each part, whose models share a backbone; one that does not pack reads
    document by document.

    Backward passes belong inside: gradient checkpointing computes layers again in them, which
    must have the same adapters.
    """
    backbone = parts[0].model.backbone
    if not backbone.packs:
        yield [p.model.compute(p.stream, p.objective, p.everywhere) for p in parts]
        return
    _encode_shared(parts)
    embedded = [part.model.embed(part.stream) for part in parts]
    rows = join([row for row, _ in embedded])
    with backbone.adapters_of(rows):
        hidden = torch.split(backbone.read(rows), [part.stream.length for part in parts])
        yield [
            part.model.score(part.stream, states, touched, part.objective, part.everywhere)
            for part, states, (_, touched) in zip(parts, hidden, embedded, strict=True)
        ]


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

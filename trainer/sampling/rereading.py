"""Reading on with a model that cannot be packed: whole rows, one at a time, without a cache.

Such a model mixes positions by other means than attention, so a cache of keys would not hold all
that a next position needs. Shape letters: B sequences, T positions pushed now, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from plait.stream import Document, ItemInputs, Layout, pack
from plait.trainer.model import PlaitModel


class Rereading:
    """What `Continuation` does, slowly; its arguments and methods are the same."""

    def __init__(
        self,
        model: PlaitModel,
        layout: Layout,
        prompts: Sequence[Document],
        inputs: Sequence[Sequence[ItemInputs]],
        copies: Sequence[int],
    ) -> None:
        self.model, self.layout = model, layout
        self.prompt_of = [p for p, n in enumerate(copies) for _ in range(n)]
        self.rows = [prompts[p] for p in self.prompt_of]
        self.inputs = [inputs[p] for p in self.prompt_of]
        ends = [self._read(self.prompt_of.index(p))[-1] for p in range(len(prompts))]
        self.prompt_ends = torch.stack(ends)

    def last_hidden(self) -> Tensor:
        """(B, H): the hidden state after each sequence's prompt."""
        return self.prompt_ends[torch.tensor(self.prompt_of)]

    def push(self, tokens: Sequence[Sequence[int]], active: Sequence[int]) -> Tensor:
        """Append `tokens[i]` to sequence `active[i]`; returns (T, H), in order."""
        hidden = []
        for row, sequence in zip(tokens, active, strict=True):
            self.rows[sequence] = _extended(self.rows[sequence], row, self.layout)
            hidden.append(self._read(sequence)[-len(row) :])
        return torch.cat(hidden)

    def _read(self, sequence: int) -> Tensor:
        hidden, _ = self.model.hidden(pack([self.rows[sequence]], [self.inputs[sequence]]))
        return hidden


def _extended(document: Document, tokens: Sequence[int], layout: Layout) -> Document:
    """The document with more text; nothing of it is learned."""
    first = layout.decode_position(document.positions)
    more = np.arange(first, first + len(tokens))
    if document.positions.ndim == 2:
        more = np.broadcast_to(more, (3, len(tokens)))
    length = document.length + len(tokens)
    return replace(
        document,
        token_ids=np.concatenate([document.token_ids, np.array(tokens, dtype=np.int64)]),
        targets=np.zeros(length, dtype=np.int64),
        weights=np.zeros(length, dtype=np.float32),
        positions=np.concatenate([document.positions, more], axis=-1),
    )

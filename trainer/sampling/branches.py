"""Several continuations of prompts, whose tokens the caller gives: for scoring answers.

Shape letters: B sequences, T positions pushed now, H hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from plait.stream import Document, ItemInputs, Layout, pack
from plait.trainer.model import PlaitModel
from plait.trainer.sampling.memory import KeyMemory, Memory, Piece, RowMemory


class Branches:
    """B sequences: `copies[p]` of them continue prompt p, which is read once.

    Args:
        room: Tokens that each sequence may grow by.
    """

    def __init__(
        self,
        model: PlaitModel,
        layout: Layout,
        prompts: Sequence[Document],
        inputs: Sequence[Sequence[ItemInputs]],
        copies: Sequence[int],
        room: int,
    ) -> None:
        self._model = model
        self._prompt_of = [p for p, n in enumerate(copies) for _ in range(n)]
        self._first = [layout.decode_position(prompt.positions) for prompt in prompts]
        self._grown = [0] * len(self._prompt_of)
        self._rank = prompts[0].positions.ndim
        slots = sum(prompt.length * (1 + n) + room * n
                    for prompt, n in zip(prompts, copies, strict=True))  # fmt: skip
        kind = KeyMemory if model.packs else RowMemory
        self._memory: Memory = kind(model.backbone, slots)
        roots = [self._memory.open(prompt.length) for prompt in prompts]
        rows, _ = model.embed(pack(prompts, inputs))
        pieces = [
            Piece(
                root, part.embeddings, part.positions, part.visible.hi, model.adapter, part.deeper
            )
            for root, part in zip(roots, rows.apart(), strict=True)
            if root is not None
        ]
        self.prompt_hidden = self._memory.read(pieces)
        """(T, H) of each prompt."""

        self._places = [
            self._memory.open(room, roots[p], prompts[p].length) for p in self._prompt_of
        ]

    def last_hidden(self) -> Tensor:
        """(B, H): the hidden state after each sequence's prompt."""
        return torch.stack([self.prompt_hidden[p][-1] for p in self._prompt_of])

    def push(self, tokens: Sequence[Sequence[int]], active: Sequence[int]) -> Tensor:
        """Append `tokens[i]` to sequence `active[i]`; returns (T, H), in order."""
        pieces = [self._piece(row, number) for row, number in zip(tokens, active, strict=True)]
        return torch.cat(self._memory.read(pieces))

    def _piece(self, tokens: Sequence[int], number: int) -> Piece:
        place = self._places[number]
        assert place is not None
        count = len(tokens)
        first = self._first[self._prompt_of[number]] + self._grown[number]
        self._grown[number] += count
        positions = torch.arange(first, first + count)
        return Piece(
            place,
            self._model.backbone.embed_tokens(torch.tensor(tokens)),
            positions if self._rank == 1 else positions.expand(3, -1),
            torch.arange(place.length + 1, place.length + count + 1),
            self._model.adapter,
        )

"""Reading on from prompts: prefill once, then push further tokens through the cache.

Shape letters: B sequences, T positions pushed now, H hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from plait.kernels.interval_attention import Intervals
from plait.stream import Document, ItemInputs, Layout, TokenStream, pack
from plait.trainer.model import PlaitModel
from plait.trainer.sampling.cache import StretchCache
from plait.trainer.sampling.rereading import Rereading


def read_on(
    model: PlaitModel,
    layout: Layout,
    prompts: Sequence[Document],
    inputs: Sequence[Sequence[ItemInputs]],
    copies: Sequence[int],
    room: int,
) -> "Continuation | Rereading":
    """Sequences that continue prompts, through a cache where the model may be packed."""
    if model.packs:
        return Continuation(model, layout, prompts, inputs, copies, room)
    return Rereading(model, layout, prompts, inputs, copies)


class Continuation:
    """B sequences over a shared cache. `copies[p]` sequences continue prompt p.

    Each prompt is read once; its keys are copied for every further sequence.

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
        self.model = model
        self.prompt_of = [p for p, n in enumerate(copies) for _ in range(n)]
        self.lengths = torch.tensor([prompts[p].length for p in self.prompt_of])
        decode = [layout.decode_position(prompt.positions) for prompt in prompts]
        self.shift = torch.tensor([decode[p] for p in self.prompt_of]) - self.lengths
        self.rank = prompts[0].positions.ndim
        capacities = [int(length) + room for length in self.lengths]
        layers = model.language.config.get_text_config().num_hidden_layers
        self.cache = StretchCache(layers, capacities)
        first = [self.prompt_of.index(p) for p in range(len(prompts))]
        self.prompt_hidden = self._prefill(pack(prompts, inputs), first)
        for sequence, prompt in enumerate(self.prompt_of):
            if sequence != first[prompt]:
                self.cache.copy_stretch(first[prompt], sequence, prompts[prompt].length)

    def _prefill(self, stream: TokenStream, first: list[int]) -> Tensor:
        """Read all prompts as one packed row; returns (T, H)."""
        own = torch.arange(stream.length)
        move = torch.empty(stream.length, dtype=torch.long)
        for sequence, (start, stop) in zip(first, stream.bounds, strict=True):
            move[start:stop] = self.cache.base[sequence] - start
        self.cache.slots = own + move
        self.prompt_bounds = stream.bounds
        lo, hi = stream.visible + move
        visible = Intervals(lo, hi, own=own + move)
        hidden, _ = self.model.hidden(stream, self.cache, visible)
        return hidden

    def last_hidden(self) -> Tensor:
        """(B, H): the hidden state after each sequence's prompt."""
        ends = [self.prompt_bounds[p][1] - 1 for p in self.prompt_of]
        return self.prompt_hidden[torch.tensor(ends)]

    def push(self, tokens: Sequence[Sequence[int]], active: Sequence[int]) -> Tensor:
        """Append `tokens[i]` to sequence `active[i]` (ascending); returns (T, H), in order."""
        counts = torch.tensor([len(row) for row in tokens])
        sequence = torch.tensor(active).repeat_interleave(counts)
        within = torch.cat([torch.arange(len(row)) for row in tokens])
        place = self.lengths[sequence] + within
        base = self.cache.base[sequence]
        self.cache.slots = base + place
        positions = place + self.shift[sequence]
        if self.rank == 2:
            positions = positions.expand(3, -1)
        flat = torch.tensor([token for row in tokens for token in row])
        stream = _text_stream(flat, positions)
        visible = Intervals(base, base + place + 1, own=base + place)
        hidden, _ = self.model.hidden(stream, self.cache, visible)
        self.lengths[torch.tensor(active)] += counts
        return hidden


def _text_stream(token_ids: Tensor, positions: Tensor) -> TokenStream:
    length = len(token_ids)
    nothing = torch.zeros(length, dtype=torch.long)
    return TokenStream(
        token_ids=token_ids,
        targets=nothing,
        weights=nothing.float(),
        positions=positions,
        visible=torch.stack([nothing, torch.arange(1, length + 1)]),
        media={},
        bounds=[(0, length)],
        run=[""],
        sample_id=[""],
        loss=["cross_entropy"],
        group=[None],
        origins=[],
    )

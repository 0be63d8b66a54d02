"""What a request gives the language model to read next.

Shape letters: T positions of a prompt.
"""

import torch

from plait.stream import pack
from plait.trainer.sampling.memory import Piece
from plait.trainer.sampling.prefixes import position_keys
from plait.trainer.sampling.requests import Continuation, Job, Prompt, Request


def embedded(request: Request) -> Prompt:
    """The prompt, its media encoded."""
    request.model.encoders.eval()
    rows, _ = request.model.embed(pack([request.prompt], [request.inputs]))
    keys = position_keys(request.prompt, request.inputs)
    return Prompt(rows.embeddings, rows.positions, rows.visible.hi, rows.deeper, keys)


def next_token(job: Job, sample: Continuation) -> Piece:
    """The last token of a sample, which nothing has read yet."""
    backbone = job.request.model.backbone
    token = torch.tensor([sample.made.tokens[-1]])
    position = torch.tensor([job.first_position + len(sample.made.tokens) - 1])
    length = sample.place.length
    return Piece(
        sample.place,
        backbone.embed_tokens(token),
        position if job.request.prompt.positions.ndim == 1 else position.expand(3, -1),
        torch.tensor([length + 1]),
        job.request.model.adapter,
    )


def chunk(job: Job, prompt: Prompt, stop: int) -> Piece:
    """The next positions of a prompt, up to `stop`."""
    assert prompt.place is not None
    start = prompt.read
    return Piece(
        prompt.place,
        prompt.embeddings[start:stop],
        prompt.positions[..., start:stop],
        prompt.hi[start:stop],
        job.request.model.adapter,
        prompt.deeper.part(start, stop) if prompt.deeper else None,
    )

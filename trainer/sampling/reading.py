"""What a request gives the language model to read next.

Shape letters: T positions of a prompt.
"""

import torch

from plait.stream import pack
from plait.trainer.sampling.memory import Piece
from plait.trainer.sampling.prefixes import position_keys
from plait.trainer.sampling.requests import Continuation, Job, Prompt, Request


def planned(request: Request) -> Prompt:
    """All that is known of a prompt before it is embedded."""
    stream = pack([request.prompt], [request.inputs])
    keys = position_keys(request.prompt, request.inputs)
    return Prompt(stream.positions, stream.visible[1], keys)


def embed(request: Request, prompt: Prompt) -> None:
    """Encode a prompt's media, and keep the embeddings of what is not read yet."""
    request.model.encoders.eval()
    rows, _ = request.model.embed(pack([request.prompt], [request.inputs]))
    start, stop = prompt.read, rows.length
    # A copy, where what another has read would be kept with it.
    prompt.embeddings = rows.embeddings[start:].clone() if start else rows.embeddings
    prompt.deeper = rows.deeper.part(start, stop) if rows.deeper else None
    prompt.first = start


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
    assert prompt.place is not None and prompt.embeddings is not None
    start, first = prompt.read, prompt.first
    return Piece(
        prompt.place,
        prompt.embeddings[start - first : stop - first],
        prompt.positions[..., start:stop],
        prompt.hi[start:stop],
        job.request.model.adapter,
        prompt.deeper.part(start - first, stop - first) if prompt.deeper else None,
    )

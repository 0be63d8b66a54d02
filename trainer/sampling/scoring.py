"""The logprobs of a prompt's own tokens.

Shape letters: T positions of a chunk, H hidden size, P of them that predict a text token.
"""

import numpy as np
import torch
from torch import Tensor

from plait.trainer.sampling.requests import PromptScores, Request


def score_prompt(request: Request, scores: PromptScores, start: int, hidden: Tensor) -> None:
    """Append the scores of the tokens that follow positions `start` to `start` + T of the prompt,
    from their hidden states (T, H); with the first chunk also the first position's, which is None.
    """
    if start == 0:
        scores.logprobs.append(None)
        scores.top.append(None)
    prompt = request.prompt
    following = prompt.token_ids[start + 1 : start + 1 + len(hidden)]
    is_text = np.ones(prompt.length, dtype=bool)
    for span in prompt.spans:
        is_text[span.start : span.stop] = False
    (places,) = np.nonzero(is_text[start + 1 : start + 1 + len(hidden)])
    scored = request.model.scored(
        hidden[torch.from_numpy(places).to(hidden.device)],
        torch.from_numpy(following[places]).to(hidden.device),
        top_k=request.top_prompt_logprobs,
    )
    found = dict(zip(places.tolist(), scored.logprobs.tolist(), strict=True))
    scores.logprobs += [found.get(place) for place in range(len(following))]
    if scored.top_ids is None or scored.top_logprobs is None:
        scores.top += [None] * len(following)
        return
    rows = zip(scored.top_ids.tolist(), scored.top_logprobs.tolist(), strict=True)
    pairs = [list(zip(ids, values, strict=True)) for ids, values in rows]
    top = dict(zip(places.tolist(), pairs, strict=True))
    scores.top += [top.get(place) for place in range(len(following))]

"""Class accuracy by logprobs: which class name does the model find most probable first?"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from plait.stream import Layout, Sample
from plait.trainer.evaluation.reader import Reader
from plait.trainer.model import PlaitModel
from plait.trainer.sampling.branches import Branches

PROMPTS_AT_ONCE = 8


def class_accuracy(
    model: PlaitModel,
    reader: Reader,
    tokenizer: Any,
    layout: Layout,
    samples: Sequence[Sample],
    classes: Sequence[str],
) -> float:
    """The share of samples whose class has the greatest summed logprob of `<class>:`.

    The media and prompt of each sample are read once; the classes continue from its cache.
    """
    model.eval()
    names = [tokenizer(f"{name}:", add_special_tokens=False).input_ids for name in classes]
    prompts = [prompt_of(sample) for sample in samples]
    best: list[int] = []
    with model.backbone.without_gradients():
        for some in reader.prompts(prompts, PROMPTS_AT_ONCE):
            best += _scores(model, layout, some, names).argmax(1).tolist()
    right = [classes[i] == sample.label for i, sample in zip(best, samples, strict=True)]
    return sum(right) / len(samples)


def prompt_of(sample: Sample) -> Sample:
    """The sample without its last assistant turn, to be rendered for generation."""
    messages = list(sample.messages)
    while messages and messages[-1].role == "assistant":
        messages.pop()
    return replace(sample, messages=tuple(messages))


def _scores(
    model: PlaitModel, layout: Layout, prompts: Sequence[Any], names: Sequence[list[int]]
) -> torch.Tensor:
    """(prompts, classes) summed logprobs; -inf for a class that cannot be its prompt's best.

    A name is never more probable than its first token, so only names whose first token alone beats
    the whole of the name with the likeliest first token are read to their end.
    """
    documents, inputs = zip(*prompts, strict=True)
    copies, room = [len(names)] * len(prompts), max(len(name) for name in names)
    branches = Branches(model, layout, documents, inputs, copies, room)
    tokens = [name for _ in prompts for name in names]
    first = torch.tensor([name[0] for name in tokens])
    ceiling = _logprobs(model, branches.last_hidden(), first).view(len(prompts), len(names))
    scores = torch.full_like(ceiling, -torch.inf)

    def read(rows: torch.Tensor) -> None:
        """Score whole names; `rows` number the (prompt, name) pairs."""
        scores.view(-1)[rows] = ceiling.view(-1)[rows]
        longer = [row for row in rows.tolist() if len(tokens[row]) > 1]
        if longer:
            # The last token predicts nothing that is asked.
            hidden = branches.push([tokens[row][:-1] for row in longer], longer)
            targets = torch.tensor([token for row in longer for token in tokens[row][1:]])
            owners = torch.tensor([row for row in longer for _ in tokens[row][1:]])
            scores.view(-1).index_add_(0, owners, _logprobs(model, hidden, targets))

    likeliest = torch.zeros_like(ceiling, dtype=torch.bool).scatter(
        1, ceiling.argmax(1)[:, None], 1
    )
    read(likeliest.view(-1).nonzero()[:, 0])
    rest = (ceiling > scores.amax(1, keepdim=True)) & ~likeliest
    read(rest.view(-1).nonzero()[:, 0])
    return scores


def _logprobs(model: PlaitModel, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Logprobs of the tokens that follow `hidden` (T, H), on the CPU."""
    return model.logprobs_at(hidden, targets.to(model.device)).cpu()

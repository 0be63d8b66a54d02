"""Class accuracy by logprobs: which class name does the model find most probable first?"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from plait.stream import Layout, Sample
from plait.trainer.evaluation.reader import Reader
from plait.trainer.model import PlaitModel
from plait.trainer.sampling.continuation import read_on

PROMPTS_AT_ONCE = 8


@torch.inference_mode()
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
    prompts = reader.documents([prompt_of(sample) for sample in samples], for_generation=True)
    right = 0
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        some = prompts[start : start + PROMPTS_AT_ONCE]
        scores = _scores(model, layout, some, names)
        for sample, best in zip(samples[start:], scores.argmax(1).tolist(), strict=False):
            right += classes[best] == sample.label
    return right / len(samples)


def prompt_of(sample: Sample) -> Sample:
    """The sample without its last assistant turn, to be rendered for generation."""
    messages = list(sample.messages)
    while messages and messages[-1].role == "assistant":
        messages.pop()
    return replace(sample, messages=tuple(messages))


def _scores(
    model: PlaitModel, layout: Layout, prompts: Sequence[Any], names: Sequence[list[int]]
) -> torch.Tensor:
    """(prompts, classes) summed logprobs."""
    documents, inputs = zip(*prompts, strict=True)
    copies = [len(names)] * len(prompts)
    room = max(len(name) for name in names)
    continuation = read_on(model, layout, documents, inputs, copies, room)
    tokens = [name for _ in prompts for name in names]
    # A name's first token is predicted by the prompt's end, each other by the token before it; the
    # last token predicts nothing that is asked.
    pushed = [name[:-1] for name in tokens]
    longer = [row for row, name in enumerate(pushed) if name]
    before = continuation.last_hidden()
    if longer:
        hidden = continuation.push([pushed[row] for row in longer], longer)
        before = torch.cat([before, hidden])
    targets = [name[0] for name in tokens] + [t for name in tokens for t in name[1:]]
    rows = list(range(len(tokens))) + [row for row, name in enumerate(pushed) for _ in name]
    logprobs = model.logprobs_at(before, torch.tensor(targets).to(model.device)).cpu()
    scores = torch.zeros(len(tokens)).index_add(0, torch.tensor(rows), logprobs)
    return scores.view(len(prompts), len(names))

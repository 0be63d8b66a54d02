"""All of some prompts at once, for those who need nothing else meanwhile."""

from collections.abc import Sequence
from typing import Any

from plait.stream import Document, ItemInputs, Layout
from plait.trainer.model import PlaitModel
from plait.trainer.sampling.requests import Generated, Request
from plait.trainer.sampling.sampler import Sampler, most_tokens
from plait.trainer.sampling.settings import SamplerSettings


def generate(
    model: PlaitModel,
    tokenizer: Any,
    layout: Layout,
    prompts: Sequence[Document],
    inputs: Sequence[Sequence[ItemInputs]],
    settings: SamplerSettings,
    samples: int = 1,
) -> list[list[Generated]]:
    """`samples` continuations of each prompt.

    Logprobs are of the raw distribution (temperature 1, nothing banned), as the trainer computes
    them. Media ids, and ids that the tokenizer does not have, are never generated.
    """
    requests = [
        Request(model, tokenizer, layout, prompt, loaded, settings, samples)
        for prompt, loaded in zip(prompts, inputs, strict=True)
    ]
    sampler = Sampler(model.backbone)
    sampler.memory.slots = max(
        sampler.memory.slots,
        sum(
            sampler.memory.needed(r.prompt.length, most_tokens(model.backbone, r), samples)
            for r in requests
        ),
    )
    made: dict[int, list[Generated]] = {}
    for number, request in enumerate(requests):
        sampler.add(request, _keeper(made, number), _raise)
    sampler.run()
    return [made[number] for number in range(len(requests))]


def _keeper(made: dict[int, list[Generated]], number: int) -> Any:
    def keep(rows: list[Generated], scores: object) -> None:
        del scores
        made[number] = rows

    return keep


def _raise(error: BaseException) -> None:
    raise error

"""Samples, logprobs of prompts, and snapshots that training does not change."""

from typing import Any

from common import begin, datum, failure, given, tell, value
from tinker import types

PROMPT = types.ModelInput.from_ints([5, 6, 7])


def drawn(client: Any, samples: int = 1, **settings: Any) -> list[dict[str, Any]]:
    response = client.sample(PROMPT, samples, types.SamplingParams(**settings)).result()
    return [
        {
            "tokens": list(one.tokens),
            "logprobs": [float(number) for number in one.logprobs],
            "stop_reason": one.stop_reason,
        }
        for one in response.sequences
    ]


def main() -> None:
    asked, said = given(), {}
    service = begin()
    base = value(service.create_sampling_client(base_model="tiny"))
    said["base"] = base.compute_logprobs(PROMPT).result()
    said["base_model"] = base.get_base_model()
    client = value(service.create_lora_training_client("tiny", rank=4, seed=3))
    data = [datum(case) for case in asked["plain"]]
    client.forward_backward(data, "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-2))
    sampler = value(client.save_weights_and_get_sampling_client())
    said["draws"] = {name: drawn(sampler, 2, **one) for name, one in asked["draws"].items()}
    scored = sampler.sample(
        PROMPT, 1, types.SamplingParams(max_tokens=1, temperature=0.0),
        include_prompt_logprobs=True, topk_prompt_logprobs=3,
    ).result()  # fmt: skip
    said["prompt_logprobs"] = list(scored.prompt_logprobs)
    said["topk"] = [row and [list(pair) for pair in row] for row in scored.topk_prompt_logprobs]
    said["scores"] = sampler.compute_logprobs(PROMPT).result()
    saved = client.save_weights_for_sampler("kept").result().path
    client.forward_backward(data, "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-1)).result()
    said["scores_later"] = sampler.compute_logprobs(PROMPT).result()
    opened = value(service.create_sampling_client(model_path=saved))
    said["scores_saved"] = opened.compute_logprobs(PROMPT).result()
    now = value(client.save_weights_and_get_sampling_client())
    said["scores_now"] = now.compute_logprobs(PROMPT).result()
    said["many"] = [
        future.result().sequences[0].tokens
        for future in [
            now.sample(PROMPT, 1, types.SamplingParams(max_tokens=4, temperature=0.0))
            for _ in range(60)
        ]
    ]
    said["failures"] = {
        "stop": failure(lambda: drawn(now, stop=[100_000], max_tokens=2)),
        "temperature": failure(lambda: drawn(now, temperature=-1.0, max_tokens=2)),
        "path": failure(lambda: value(service.create_sampling_client(model_path=saved + "-not"))),
    }
    tell(said)


main()

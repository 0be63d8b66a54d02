"""Pictures in training data and in prompts, through the client's own image chunks."""

import base64
from typing import Any

import torch
from common import begin, failure, given, output, tell, value
from tinker import types


def main() -> None:
    asked, said = given(), {}
    service = begin()
    client = value(service.create_lora_training_client("seeing", rank=4, seed=3))
    picture = base64.b64decode(asked["picture"])

    def prompt(expected: int) -> types.ModelInput:
        image = types.ImageChunk(data=picture, format="png", expected_tokens=expected)
        text = types.EncodedTextChunk(tokens=asked["tokens"])
        return types.ModelInput(chunks=[image, text])

    def datum(expected: int) -> types.Datum:
        inputs: dict[str, Any] = {
            "target_tokens": torch.tensor(asked["targets"]),
            "weights": torch.tensor(asked["weights"], dtype=torch.float32),
        }
        return types.Datum(model_input=prompt(expected), loss_fn_inputs=inputs)

    said["before"] = output(client.forward_backward([datum(4)] * 2, "cross_entropy").result())
    client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    said["after"] = output(client.forward([datum(4)], "cross_entropy").result())
    sampler = value(client.save_weights_and_get_sampling_client())
    said["sample"] = (
        sampler.sample(prompt(4), 1, types.SamplingParams(max_tokens=4, temperature=0.0))
        .result()
        .sequences[0]
        .tokens
    )
    said["failure"] = failure(lambda: client.forward_backward([datum(5)], "cross_entropy").result())
    tell(said)


main()

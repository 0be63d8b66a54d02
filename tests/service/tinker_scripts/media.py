"""Sounds and films through the client's dmel chunks, as `plait.tinker_compat` makes them."""

import base64
import sys
from typing import Any

import torch
from common import begin, failure, given, output, tell, value
from tinker import types

from plait.tinker_compat import audio_chunk, positions, video_chunk

CHUNKS = {"audio": audio_chunk, "video": video_chunk}


def main() -> None:
    asked, said = given(), {}
    client = value(
        begin().create_lora_training_client("seeing", rank=4, seed=3, train_unembed=False)
    )
    text = types.EncodedTextChunk(tokens=asked["tokens"])
    for medium, make in CHUNKS.items():
        data = base64.b64decode(asked[medium])
        length = positions(sys.argv[1], "seeing", **{medium: data})
        chunk = make(data, length)
        assert chunk.length == length
        prompt = types.ModelInput(chunks=[chunk, text])
        before = [0] * length
        inputs: dict[str, Any] = {
            "target_tokens": torch.tensor(before + asked["targets"]),
            "weights": torch.tensor([0.0] * len(before) + [1.0] * len(asked["targets"])),
        }
        datum = types.Datum(model_input=prompt, loss_fn_inputs=inputs)
        trained = client.forward_backward([datum], "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        sampler = value(client.save_weights_and_get_sampling_client())
        params = types.SamplingParams(max_tokens=4, temperature=0.0)
        drawn = sampler.sample(prompt, 1, params).result().sequences[0].tokens
        said[medium] = {"length": length, "trained": output(trained), "drawn": list(drawn)}
    foreign = types.ModelInput(
        chunks=[types.DmelChunk(dmel=bytes([4, 2, 3, 80, *bytes(240)])), text]
    )
    said["foreign"] = failure(
        lambda: client.forward(
            [types.Datum(model_input=foreign, loss_fn_inputs={"target_tokens": [0] * 7})],
            "cross_entropy",
        ).result()
    )
    tell(said)


main()

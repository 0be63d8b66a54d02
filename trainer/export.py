"""`plait export`: a checkpoint as a folder that plain transformers and peft load.

    OUT/
      config.json, model.safetensors ...               the language model, with what was trained
      adapter_config.json, adapter_model.safetensors   or the adapter alone, as peft has it
      tokenizer.json, chat_template.jinja ...
      encoders.safetensors, preprocessing.json         for media, which transformers do not read
      export.json                                      from what, and what was compared

Before the folder appears another process loads it without Plait, and its logits must be those of
the checkpoint.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.encoders.quiet import without_loading_bars
from plait.errors import CheckpointError, ConfigError
from plait.stream import pack
from plait.trainer import checkpoint, quantization
from plait.trainer.build import Built, build
from plait.trainer.comparing import Compared, Job, compare
from plait.trainer.engine.inputs import document_from
from plait.trainer.files import new_folder, write_json
from plait.trainer.identity import TURNS
from plait.trainer.manifest import digest_of, sha256_of, verify, write_sealed
from plait.trainer.source import Source
from plait.trainer.spec import DTYPES, OUTPUT
from plait.trainer.strict import spec_from

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MEDIA = ("encoders.safetensors", "preprocessing.json")
ROWS = (5, 48)
"""Lengths of the random rows that are compared, beside a conversation."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What lies at `folder`, and how near its logits are to the checkpoint's."""

    folder: Path
    merged: bool
    compared: Compared


def export(source: Source, out: Path, *, merge: bool = False, dtype: str | None = None) -> Exported:
    """Write a checkpoint's adapter, or with `merge` the whole language model, into `out`.

    What was trained whole is written whole, with and without `merge`.

    Args:
        dtype: Of a whole model's weights; by default that of the run.

    Raises:
        ConfigError: there is no such checkpoint, `out` holds something, or nothing in the
            checkpoint is for peft.
        CheckpointError: the checkpoint is damaged, or what was written computes something else
            when it is loaded again; `out` does not appear.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"an export needs a folder of its own, and {out} holds something")
    with _taken(source) as folder:
        manifest = verify(folder)
        spec = spec_from(manifest["spec"])
        if dtype not in (None, *DTYPES):
            raise ConfigError(f"dtype is one of {', '.join(DTYPES)}; it is {dtype!r}")
        # All is compared in float32: what differs then is the weights and not their arithmetic.
        built = build(replace(spec, dtype="float32"), 0, trains=False)
        merge = merge or built.trains_language
        if not merge and built.lora is None:
            raise ConfigError(
                f"{source.path} has no adapter: its language model did not train; add --merge to "
                "write that as it is beside the encoders"
            )
        checkpoint.load(folder, built, with_state=False)
        with new_folder(out) as aside, without_loading_bars():
            wanted = dtype or spec.dtype if merge else "float32"
            untrained = _write_language(aside, folder, built, wanted if merge else None)
            _copy(folder, aside, MEDIA)
            built.tokenizer.save_pretrained(aside)
            compared = _compare(aside, built, untrained, merge, wanted)
            _write_facts(aside, manifest, merge, wanted, compared)
    return Exported(out, merge, compared)


@contextmanager
def _taken(source: Source) -> Iterator[Path]:
    """The checkpoint's files under names of our own: whoever saves meanwhile need not wait."""
    with tempfile.TemporaryDirectory(prefix="plait-export-") as name:
        mine = Path(name) / "checkpoint"
        with source.reading() as folder:
            verify(folder)  # here, where the error names the folder that the user knows
            shutil.copytree(folder, mine, copy_function=_link)
        yield mine


def _link(source: str, target: str) -> None:
    """Files of a checkpoint never change, so that a second name is as good as a copy."""
    try:
        os.link(source, target)
    except OSError:  # of another disk
        shutil.copyfile(source, target)


def _write_language(aside: Path, folder: Path, built: Built, dtype: str | None) -> list[Tensor]:
    """Write the whole model in `dtype`, or without one the adapter; returns the logits of the
    model as it was before it trained."""
    plain = _plain(built).eval()
    with torch.inference_mode():
        untrained = [plain(torch.tensor([row])).logits[0] for row in _rows(built)]
    if dtype is None:
        _copy(folder, aside, ADAPTER)
        config = json.loads((aside / ADAPTER[0]).read_text(encoding="utf-8"))
        write_json(aside / ADAPTER[0], {**config, "base_model_name_or_path": _base_name(built)})
        return untrained
    merged = _trained(plain, folder, built)
    merged.to(getattr(torch, dtype)).save_pretrained(aside)
    return untrained


def _plain(built: Built) -> Any:
    """transformers' own model with the weights that were trained on.

    Of quantized ones it is what 4 bits left of them, as plain numbers again: what is merged into
    those is not rounded, while quantizing the sum would lose most of what was trained.
    """
    from transformers import AutoModelForCausalLM

    if built.spec.quantize is not None:
        return quantization.dequantized(built.base.folder)
    return AutoModelForCausalLM.from_pretrained(
        built.base.folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )


def _trained(plain: Any, folder: Path, built: Built) -> Any:
    """The plain model with what the checkpoint's files say of it."""
    if built.lora is not None:
        from peft import PeftModel

        if OUTPUT in built.spec.lora_targets:  # what is merged there is not the embeddings'
            _untie(plain)
        return PeftModel.from_pretrained(plain, folder).merge_and_unload()
    if built.trains_language:
        report = plain.load_state_dict(load_file(folder / "language.safetensors"), strict=False)
        if report.unexpected_keys:
            raise CheckpointError(
                f"{folder} holds weights that transformers' model has no place for: "
                f"{report.unexpected_keys[0]}; export with the transformers it was trained with"
            )
    return plain


def _untie(plain: Any) -> None:
    """Give the output layer a weight of its own."""
    output = plain.get_output_embeddings()
    output.weight = torch.nn.Parameter(output.weight.detach().clone(), requires_grad=False)
    plain.config.get_text_config().tie_word_embeddings = False
    plain.config.tie_word_embeddings = False


def _base_name(built: Built) -> str:
    """What peft looks for: a hub id as it is, else the folder where the language model lies."""
    name = built.spec.language
    local = name.startswith("pip:") or Path(name).exists()
    return str(built.base.folder.resolve()) if local else name


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        shutil.copyfile(source / name, target / name)


def _rows(built: Built) -> list[list[int]]:
    """Token ids: random ones, the same for each export of a model, and a conversation."""
    vocabulary = min(built.model.output_weight.shape[0], len(built.tokenizer))
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, vocabulary, length).tolist() for length in ROWS]
    text = " ".join(text for _, text in TURNS)
    return [*rows, built.tokenizer(text, add_special_tokens=False).input_ids]


def _logits(built: Built) -> list[Tensor]:
    """(T, V) of each row, by the model that was trained and as it is trained."""
    model = built.model
    model.eval()
    vocabulary = model.output_weight.shape[0]

    def of(row: list[int]) -> Tensor:
        document = document_from([row], built.layout, lambda _: [], vocabulary=vocabulary)
        hidden, _ = model.hidden(pack([document], [[]]))
        return model.logits(hidden)

    with torch.inference_mode():
        return [of(row) for row in _rows(built)]


def _compare(
    aside: Path, built: Built, untrained: list[Tensor], merged: bool, dtype: str
) -> Compared:
    job = Job(
        model=aside if merged else built.base.folder,
        adapter=None if merged else aside,
        tokenizer=aside,
        rows=_rows(built),
        messages=_messages(built),
        quantize=None if merged else built.spec.quantize,
    )
    return compare(job, _logits(built), untrained, built.tokenizer, dtype)


def _messages(built: Built) -> list[dict[str, str]] | None:
    if built.tokenizer.chat_template is None:
        return None
    return [{"role": role, "content": text} for role, text in TURNS]


def _write_facts(
    aside: Path, manifest: Mapping[str, Any], merged: bool, dtype: str, compared: Compared
) -> None:
    kept = {name: manifest[name] for name in ("spec", "hashes", "step", "versions")}
    facts = {
        "checkpoint": digest_of(manifest),
        **kept,
        "user_metadata": manifest["user_metadata"],
        "merged": merged,
        "dtype": dtype,
        "compared": asdict(compared),
        "files": {path.name: sha256_of(path) for path in sorted(aside.iterdir())},
    }
    write_sealed(aside / "export.json", facts)

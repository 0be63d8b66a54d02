"""Checkpoints: the adapter as peft reads it, the encoders' trained tensors, a manifest.

    step-000120/
      manifest.json                what it is, and the SHA-256 of every other file
      adapter_config.json          )  peft's own format; only where an adapter trains
      adapter_model.safetensors    )
      language.safetensors         only where the whole language model trains
      encoders.safetensors         projectors, and towers that train
      template.jinja               the chat template that rendered the training rows
      preprocessing.json           how each medium was read
      optimizer.safetensors        )
      gradients.safetensors        )  only in checkpoints to resume from; gradients where some
      state.json                   )  are pending

No file is a pickle and none is executed.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from copy import copy as copy_of
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from plait.errors import CheckpointError, DamagedCheckpointError
from plait.trainer.build import Built
from plait.trainer.files import new_folder, write_json
from plait.trainer.identity import preprocessing_of
from plait.trainer.lora import adapter_state, check_exactly, copy
from plait.trainer.manifest import MANIFEST, check_fits, verify, write_manifest
from plait.trainer.optimiser import ADAM_W, OPTIMIZERS
from plait.trainer.ranks.sharding import whole

_STATE_FILES = {"optimizer.safetensors", "gradients.safetensors"}


@dataclass(slots=True)
class State:
    """What a run needs besides weights to go on exactly: all of it plain values and tensors."""

    step: int
    optimizer: dict[str, Any]
    """torch's state_dict."""

    random: Tensor
    """What dropout draws from: a CPU generator's state in `plait train`, a run's seed and passes
    in the engine."""

    extra: dict[str, Any] = field(default_factory=dict)
    """The loader's state and whatever the caller keeps; plain JSON."""

    kind: str = ADAM_W
    """Of the optimiser, in `plait.trainer.optimiser.OPTIMIZERS`."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Those that no step has used yet, by parameter."""

    pending_weight: float = 0.0
    """What they were summed over."""

    parameters: list[str] = field(default_factory=list)
    """Names of all that trains, in the run's order."""


Weights = dict[str, dict[str, Tensor]]
"""What a run trains, by the file that holds it, and by name."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run as a checkpoint has it, in memory."""

    weights: Weights
    state: State | None
    """None where only the weights are wanted."""


def weights_of(built: Built) -> Weights:
    """Copies of all that trains, on the CPU, gathered where it is sharded; collective then."""
    return {name: _contiguous(tensors) for name, (tensors, _) in _weight_files(built).items()}


def lend_weights(built: Built) -> None:
    """Take part in `weights_of` on another rank, keeping nothing; collective where sharded."""
    for tensors, _ in _weight_files(built).values():
        for tensor in tensors.values():
            whole(tensor.detach())


def put_weights(built: Built, weights: Weights) -> None:
    """Copy what `weights_of` took from an equal model."""
    for name, (tensors, _) in _weight_files(built).items():
        copy(tensors, weights[name])


def save(
    folder: Path,
    built: Built,
    state: State | None = None,
    metadata: Mapping[str, str] | None = None,
    weights: Weights | None = None,
) -> None:
    """Write a checkpoint at `folder`, whole or not at all; arguments as of `write`.

    Raises:
        CheckpointError: it cannot be written; an earlier one at `folder` is unchanged.
    """
    with new_folder(folder) as aside:
        write(aside, built, state, metadata, weights)


def write(
    folder: Path,
    built: Built,
    state: State | None,
    metadata: Mapping[str, str] | None,
    weights: Weights | None = None,
) -> None:
    """Write a checkpoint's files into an empty folder.

    Args:
        state: With it the checkpoint can be resumed from; without, it holds weights only.
        metadata: The user's own words about it, which the manifest keeps.
        weights: `weights_of(built)`, where other ranks have taken part in it already.
    """
    _write_weights(folder, built, weights or weights_of(built))
    if state is not None:
        _write_state(folder, state)
    write_manifest(folder, built, state.step if state else None, metadata)


def load(folder: Path, built: Built, *, with_state: bool = True) -> State | None:
    """Copy a checkpoint's weights into `built` and return its state.

    Raises:
        DamagedCheckpointError, CheckpointError: as `read`. Nothing was changed.
    """
    snapshot = read(folder, built, with_state=with_state)
    put_weights(built, snapshot.weights)
    return snapshot.state


def read(folder: Path, built: Built, *, with_state: bool = True) -> Snapshot:
    """A checkpoint that fits a model, which is left as it is.

    Raises:
        DamagedCheckpointError: a file is missing or damaged.
        CheckpointError: the checkpoint is of another model.
    """
    manifest = verify(folder)
    check_fits(folder, manifest, built)
    try:
        tensors = {
            name: load_file(folder / name)
            for name in manifest["files"]
            if name.endswith(".safetensors")
        }
        state = _read_state(folder, tensors) if with_state else None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DamagedCheckpointError(
            f"checkpoint {folder} cannot be read: {error}; use another one"
        ) from error
    _check_present(folder, built, tensors)
    files = _weight_files(built)
    for name, (mine, what) in files.items():
        check_exactly(mine, tensors[name], what)
    return Snapshot({name: tensors[name] for name in files}, state)


def delete(folder: Path) -> None:
    """Remove a checkpoint, its manifest first: a half-deleted one is not taken for whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def capture(
    optimizer: torch.optim.Optimizer | None, step: int, random: Tensor, **extra: Any
) -> State:
    """The present state of a run, before its first step without an optimiser.

    Args:
        random: What dropout draws from.
    """
    if optimizer is None:
        return State(step, {"state": {}, "param_groups": []}, random, extra)
    kind = next(name for name, made in OPTIMIZERS.items() if type(optimizer) is made)
    return State(step, optimizer.state_dict(), random, extra, kind)


def check_state(
    folder: Path, state: State | None, optimizer: torch.optim.Optimizer, trains: Sequence[str]
) -> None:
    """Refuse a state that cannot be put into a run.

    Args:
        optimizer: The run's.
        trains: Names of all that trains in the run.

    Raises:
        CheckpointError: there is none, or it is of other parts or parameters.
    """
    if state is None:
        raise CheckpointError(
            f"checkpoint {folder} holds weights only: use load_state, or "
            "create_training_client_from_state"
        )
    saved, mine = (
        [(group["part"], group["decays"], len(group["params"])) for group in groups]
        for groups in (state.optimizer["param_groups"], optimizer.param_groups)
    )
    if saved and saved != mine:
        trained, training = (
            ", ".join(sorted({part for part, _, _ in groups})) for groups in (saved, mine)
        )
        raise CheckpointError(
            f"an optimiser's state must be of the parts that train; checkpoint {folder} has it for "
            f"{trained}, and here train {training}: use load_state, or train the same parts"
        )
    odd = sorted(set(trains) ^ set(state.parameters))
    if odd:
        only = "here alone" if odd[0] in trains else "only there"
        raise CheckpointError(
            f"a state must be of the parameters that train; checkpoint {folder} has it for others: "
            f"{odd[0]} trains {only}; use load_state, or train the same ones"
        )


def _write_weights(folder: Path, built: Built, weights: Weights) -> None:
    if built.lora is not None:
        config = copy_of(built.lora)
        config.inference_mode = True
        config.base_model_name_or_path = built.spec.language
        # A list, because the order of a set is another one in each process.
        config.target_modules = sorted(config.target_modules)
        config.save_pretrained(folder)
    for name, tensors in weights.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    (folder / "template.jinja").write_text(built.tokenizer.chat_template or "", encoding="utf-8")
    encoders = {name: built.model.media_encoder(name) for name in built.model.encoders}
    write_json(folder / "preprocessing.json", preprocessing_of(built.spec, encoders))


def _weight_files(built: Built) -> dict[str, tuple[dict[str, Tensor], str]]:
    """The model's own tensors by the file that holds them, and what to call them."""
    files = {"encoders.safetensors": (_encoder_state(built), "encoders")}
    if built.lora is not None:
        files["adapter_model.safetensors"] = (_adapter_state(built), "adapter")
    elif built.trains_language:
        files["language.safetensors"] = (_language_state(built), "language model")
    return files


def _adapter_state(built: Built) -> dict[str, Tensor]:
    assert built.model.adapter is not None
    return adapter_state(built.model.language, built.model.adapter)


def _encoder_state(built: Built) -> dict[str, Tensor]:
    """Projectors, buffers included, and the towers that train."""
    found: dict[str, Tensor] = {}
    for name in built.model.encoders:
        encoder = built.model.media_encoder(name)
        kept = {f"projector.{key}": value for key, value in encoder.projector.state_dict().items()}
        if encoder.trainable:
            tower = encoder.encoder.state_dict()
            kept |= {f"encoder.{key}": value for key, value in tower.items()}
        found |= {f"{name}.{key}": value for key, value in kept.items()}
    return found


def _language_state(built: Built) -> dict[str, Tensor]:
    """Every parameter once: tied weights have one name among `named_parameters`."""
    return {name: p.detach() for name, p in built.model.language.named_parameters()}


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: whole(tensor.detach()).cpu().contiguous().clone() for name, tensor in tensors.items()
    }


def _write_state(folder: Path, state: State) -> None:
    tensors: dict[str, Tensor] = {"random": state.random}
    for number, values in state.optimizer["state"].items():
        for name, value in values.items():
            tensors[f"{number}.{name}"] = value
    groups = [dict(group) for group in state.optimizer["param_groups"]]
    save_file(_contiguous(tensors), folder / "optimizer.safetensors")
    if state.gradients:
        save_file(_contiguous(state.gradients), folder / "gradients.safetensors")
    plain = {
        "step": state.step,
        "optimizer": {"kind": state.kind, "param_groups": groups},
        "pending_weight": state.pending_weight,
        "parameters": state.parameters,
        "extra": state.extra,
    }
    write_json(folder / "state.json", plain)


def _read_state(folder: Path, tensors: Mapping[str, dict[str, Tensor]]) -> State | None:
    if not (folder / "state.json").is_file():
        return None
    plain = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    held = dict(tensors["optimizer.safetensors"])
    random = held.pop("random")
    values: dict[int, dict[str, Tensor]] = {}
    for name, tensor in held.items():
        number, _, key = name.partition(".")
        values.setdefault(int(number), {})[key] = tensor
    groups = [
        {key: tuple(value) if isinstance(value, list) and key != "params" else value
         for key, value in group.items()}
        for group in plain["optimizer"]["param_groups"]
    ]  # fmt: skip
    return State(
        int(plain["step"]),
        {"state": values, "param_groups": groups},
        random,
        plain["extra"],
        plain["optimizer"]["kind"],
        dict(tensors.get("gradients.safetensors", {})),
        float(plain["pending_weight"]),
        plain["parameters"],
    )


def _check_present(folder: Path, built: Built, tensors: Mapping[str, Any]) -> None:
    """The model must take all that was trained, and find all that it trains."""
    needed, held = set(_weight_files(built)), set(tensors) - _STATE_FILES
    for name in sorted(needed ^ held):
        if name in needed:
            raise CheckpointError(
                f"checkpoint {folder} has no {name}, which this model needs; it is of another one"
            )
        raise CheckpointError(
            f"checkpoint {folder} has {name}, which this model would ignore; use the "
            "configuration it was trained with"
        )

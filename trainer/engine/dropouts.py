"""Which layers of a run draw random numbers in training."""

from collections.abc import Iterator

from torch import nn

from plait.ranges import is_number
from plait.trainer.build import Built


def _dropouts(module: nn.Module) -> Iterator[nn.Module]:
    for one in module.modules():
        if isinstance(one, nn.modules.dropout._DropoutNd) and one.p > 0:
            yield one


def adapter_dropouts(built: Built) -> list[nn.Module]:
    """Of this run's adapter, among all that the language model has."""
    mine = f".lora_dropout.{built.model.adapter}"
    named = built.model.language.named_modules()
    return [one for name, module in named if name.endswith(mine) for one in _dropouts(module)]


def _draws(module: nn.Module) -> bool:
    """Whether a module itself draws: a layer of dropout, or one that calls a function with a rate
    of its own, as transformers' models do ("dropout", "activation_dropout", "layerdrop",
    "drop_prob"). A rate that is never used costs rows of one's own and nothing else."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    rates = [value for name, value in vars(module).items() if "drop" in name]
    return any(is_number(rate) and rate > 0 for rate in rates)


def draws(built: Built) -> bool:
    """Whether anything of this run that may be in training mode has dropout."""
    if any(map(_draws, built.model.backbone.own_modules)):
        return True
    for name in built.model.encoders:
        encoder = built.model.media_encoder(name)
        parts = [encoder.projector, *([encoder.encoder] if encoder.trainable else [])]
        if any(_draws(module) for part in parts for module in part.modules()):
            return True
    return False

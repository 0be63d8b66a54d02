"""Which layers of a run draw random numbers in training."""

from collections.abc import Iterator

from torch import nn

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


def draws(built: Built) -> bool:
    """Whether anything of this run that may be in training mode has dropout."""
    shared = built.model.backbone.own_modules
    if any(isinstance(one, nn.modules.dropout._DropoutNd) and one.p > 0 for one in shared):
        return True
    for name in built.model.encoders:
        encoder = built.model.media_encoder(name)
        parts = [encoder.projector, *([encoder.encoder] if encoder.trainable else [])]
        if any(True for part in parts for _ in _dropouts(part)):
            return True
    return False

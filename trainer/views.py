"""Immutable copies of what a run has learned, over the same frozen weights, to sample from."""

from copy import copy, deepcopy
from dataclasses import replace

from torch import nn

from plait.encoders.media_encoder import MediaEncoder
from plait.trainer.backbone import Backbone
from plait.trainer.base import Base
from plait.trainer.build import Built
from plait.trainer.lora import copy_lora
from plait.trainer.model import PlaitModel


def frozen_view(built: Built, name: str) -> Built:
    """The run as it is now: what trains is copied, what is frozen is shared.

    Args:
        name: What peft's layers call the copy of the run's adapter.
    """
    encoders = {key: _frozen(built.model.media_encoder(key)) for key in built.model.encoders}
    base, adapter = built.base, built.model.adapter
    if adapter is not None:
        base.backbone.share()
        copy_lora(base.backbone.language, adapter, name)
        base.backbone.adapters_changed()
        adapter = name
    elif built.trains_language:
        base = _copied(base)
    model = PlaitModel(base.backbone, encoders, adapter)
    return replace(built, model=model, base=base)


def _frozen(encoder: MediaEncoder) -> MediaEncoder:
    tower = encoder.encoder
    if encoder.trainable:
        tower = deepcopy(tower)
        tower.requires_grad_(False)
    projector = deepcopy(encoder.projector)
    projector.requires_grad_(False)
    made = MediaEncoder(tower, encoder.pool, projector, False, encoder.limits)
    made.headers = encoder.headers
    return made


def _copied(base: Base) -> Base:
    """A base of its own, where the language model itself trains."""
    language: nn.Module = deepcopy(base.backbone.language)
    language.requires_grad_(False)
    backbone = Backbone(language)
    for fact in ("packs", "packing_difference", "packing_refusal", "attention_route"):
        setattr(backbone, fact, getattr(base.backbone, fact))
    made = copy(base)
    made.backbone = backbone
    return made

"""Immutable copies of what a run has learned, over the same frozen weights, to sample from."""

from copy import copy, deepcopy
from dataclasses import replace

from torch import nn

from plait.encoders.media_encoder import MediaEncoder
from plait.trainer.backbone import Backbone
from plait.trainer.base import Base
from plait.trainer.build import Built, load_base
from plait.trainer.lora import copy_lora
from plait.trainer.model import PlaitModel
from plait.trainer.ranks.sharding import fill, whole


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
        base = _copied(built)
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


def _copied(built: Built) -> Base:
    """A base of its own, where the language model itself trains; collective where it is sharded."""
    trained = built.base.backbone
    if trained.sharded:
        made = load_base(built.spec, trained.device)
        weights = dict(trained.language.named_parameters())
        for name, parameter in made.backbone.language.named_parameters():
            fill(parameter, whole(weights[name]))
    else:
        language: nn.Module = deepcopy(trained.language)
        made = copy(built.base)
        made.backbone = Backbone(language)
    made.backbone.language.requires_grad_(False)
    for fact in ("packs", "packing_difference", "packing_refusal", "attention_route"):
        setattr(made.backbone, fact, getattr(trained, fact))
    return made

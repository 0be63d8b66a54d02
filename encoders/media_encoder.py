"""One medium's way into the language model: tower, pool, projector.

Tower and pool together make "features", which can be cached when the tower is frozen; the
projector makes them embeddings. Shape letters: N positions of an item, C channels.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from plait.encoders.base import Encoder, Inputs, Shape
from plait.encoders.projectors import Pool, Projector
from plait.errors import DataError, ModelError, Origin
from plait.modalities import FrameSampling, Limits, MediaHeader, MediaPart, VideoHeader
from plait.stream import Encoded, ItemInputs, ItemPlan


def read_header(part: MediaPart, limits: Limits) -> MediaHeader:
    """A part's header, from its file."""
    return part.header(limits)


class MediaEncoder(nn.Module):
    """A tower, a pool without parameters, and a trained projector.

    With `trainable=False` the tower has no gradients, keeps no activations and never leaves eval
    mode. With `trainable=True` it trains, but its BatchNorm layers stay in eval mode.
    """

    def __init__(
        self,
        encoder: Encoder,
        pool: Pool,
        projector: Projector,
        trainable: bool = False,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__()
        self.encoder = encoder.set_trainable(trainable)
        self.pool = pool
        self.projector = projector
        self.limits = limits
        self.headers: Callable[[MediaPart, Limits], MediaHeader] = read_header
        """Reads headers; a run puts a cache of them here."""

    @property
    def name(self) -> str:
        return self.encoder.name

    @property
    def trainable(self) -> bool:
        """Whether the tower trains; its features can be cached only if not."""
        return self.encoder.trainable

    def plan(self, part: MediaPart, origin: Origin) -> ItemPlan:
        """The positions that a part will take, from its header.

        Raises:
            DataError: the part is of another medium, or its header cannot be read; names the row.
        """
        if part.medium != self.encoder.medium:
            raise DataError(
                f"encoder {self.name!r} reads {self.encoder.medium}; it was given {part.medium}: "
                "map each medium to an encoder of its own",
                origin,
            )
        try:
            header = self.headers(part, self.limits)
            grid = self.encoder.plan(header)
            wanted = self.encoder.wanted(header)
            shape = self.pool.plan(Shape(grid, self.encoder.seconds(header, grid)))
        except DataError as error:
            raise error.at(replace(origin, file=origin.file or part.file)) from error
        grid, seconds = self.projector.plan(shape)
        frames = 0
        if isinstance(header, VideoHeader) and isinstance(wanted, FrameSampling):
            frames = wanted.frames(header.seconds)
        return ItemPlan(
            self.name, prod(grid), grid, self.encoder.bidirectional, seconds, wanted, frames
        )

    def soundtrack(self, part: MediaPart, origin: Origin) -> tuple[MediaPart | None, bool]:
        """The sound that is read beside a film, where the sample asks for it, as the part says.

        Raises:
            DataError: the film's header cannot be read; names the row.
        """
        try:
            return part.soundtrack(self.headers(part, self.limits))
        except DataError as error:
            raise error.at(replace(origin, file=origin.file or part.file)) from error

    def features(self, inputs: Sequence[Inputs]) -> list[Encoded]:
        """Pooled features (N, C) of processed items, on the tower's device."""
        if not inputs:
            return []
        # Again at every call: a caller may have switched a part of the tower.
        self.encoder.train(self.training)
        with nullcontext() if self.trainable else torch.no_grad():
            return [self.pool(encoded) for encoded in self.encoder(inputs)]

    def project(self, features: Sequence[Encoded]) -> list[Encoded]:
        """Embeddings (N, hidden) of each item; the projector is entered once for all of them.

        `layers` pass as they are: only towers that already speak the language model's space
        have them. With no items nothing is entered; see `touch`.
        """
        if not features:
            return []
        like = next(self.projector.parameters(), None)
        rows = torch.cat([item.embeddings for item in features])
        if like is not None:
            rows = rows.to(like.device, like.dtype)
        before = [Shape(item.grid, item.seconds) for item in features]
        shapes = [self.projector.plan(shape) for shape in before]
        projected = self.projector(rows, [item.grid for item in features])
        # A projector that joins nothing keeps the features' own number, whatever was planned:
        # `MediaBatch.check` compares it and names the row.
        lengths = [
            len(item.embeddings) if shape == old else prod(shape.grid)
            for item, old, shape in zip(features, before, shapes, strict=True)
        ]
        parts = projected.split(lengths)
        return [
            replace(item, embeddings=part, grid=shape.grid, seconds=shape.seconds)
            for item, part, shape in zip(features, parts, shapes, strict=True)
        ]

    def forward(self, items: Sequence[ItemInputs]) -> list[Encoded]:
        """Embeddings of loaded items, some of which may bring cached features."""
        missing = [item.inputs for item in items if item.features is None]
        if any(inputs is None for inputs in missing):
            raise ModelError(
                f"an item for encoder {self.name!r} was loaded with neither inputs nor features"
            )
        fresh = iter(self.features([inputs for inputs in missing if inputs is not None]))
        return self.project(
            [item.features if item.features is not None else next(fresh) for item in items]
        )

    def touch(self) -> Tensor:
        """A scalar 0 with a gradient path to every trainable parameter.

        Added to the loss of a micro-batch in which nothing is read, it gives zero gradients where
        `project` would have given some, so that every rank reduces the same tensors. Empty slices
        are summed: a product with 0 would turn an infinite weight into NaN.
        """
        total = torch.zeros((), device=self.encoder.device)
        if any(p.requires_grad for p in self.projector.parameters()):
            like = next(self.projector.parameters())
            nothing = torch.zeros(0, self.encoder.width, device=like.device, dtype=like.dtype)
            total = total + self.projector(nothing, []).sum().to(total)
        for parameter in self.encoder.parameters():
            if parameter.requires_grad:
                total = total + parameter.reshape(-1)[:0].sum().to(total)
        return total

    def fingerprint(self) -> str:
        """SHA-256 of the tower, its processing and the pool: what decides the features."""
        facts = [self.encoder.fingerprint(), self.pool.describe()]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

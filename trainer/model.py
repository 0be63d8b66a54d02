"""The model: encoders scatter embeddings into a row, the language model reads it.

A plain `nn.Module` with a pure `compute(stream) -> Sums`. The engine and the Lightning run both
drive this one module; neither wraps the other.

Shape letters: T positions of a stream, P positions that are learned, H hidden size.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plait.encoders.media_encoder import MediaEncoder
from plait.errors import ModelError
from plait.kernels.interval_attention import Intervals
from plait.kernels.token_logprobs import Scored, token_logprobs, weighted_nll
from plait.stream import TokenStream
from plait.trainer.backbone import Backbone
from plait.trainer.lora import output_factors
from plait.trainer.losses import LOSSES, WEIGHTED_NLL, Loss, LossBatch
from plait.trainer.rows import Deeper, Rows
from plait.trainer.spec import TOWER_PARTS


class Objective(NamedTuple):
    """A loss, and the settings of all its keys."""

    loss: Loss
    config: Mapping[str, float]


LEARN = Objective(LOSSES[WEIGHTED_NLL], {})
"""To learn texts as they are."""


@dataclass(slots=True)
class Sums:
    """What one stream adds: a loss SUM and the weight it was taken over.

    `logprobs` (P,) or (P, K) are those at stream positions `index` (P,), detached. `documents`
    holds each document's own (loss, weight), in stream order, and `metrics` what its loss says
    besides, (D,) by name.
    """

    loss: Tensor
    weight: float
    logprobs: Tensor
    index: Tensor
    documents: list[tuple[float, float]]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class PlaitModel(nn.Module):
    """A language model with its media encoders.

    Args:
        language: A transformers causal language model whose attention is "plait", or a backbone
            that other runs use too.
        encoders: By encoder name, as spans name them.
        adapter: This run's among peft's adapters on the language model; None for the base alone.
    """

    def __init__(
        self,
        language: Any,
        encoders: Mapping[str, MediaEncoder],
        adapter: str | None = "default",
    ) -> None:
        super().__init__()
        self.backbone = language if isinstance(language, Backbone) else Backbone(language)
        self.language = self.backbone.language
        self.encoders = nn.ModuleDict(encoders)
        self.adapter = adapter

    @property
    def packs(self) -> bool:
        """False where packing would change results; each document then runs alone."""
        return self.backbone.packs

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def output_weight(self) -> Tensor:
        """(V, H): maps hidden states to logits."""
        return self.backbone.output_weight

    def media_encoder(self, name: str) -> MediaEncoder:
        encoder = self.encoders[name]
        assert isinstance(encoder, MediaEncoder)
        return encoder

    def embed(self, stream: TokenStream) -> tuple[Rows, Tensor]:
        """The stream ready for the language model, and a zero that touches encoders.

        Every encoder with something to train is entered exactly once, whatever the stream holds,
        so that ranks with different media still reduce the same gradients.
        """
        rows = self.backbone.embed_tokens(stream.token_ids)
        touched = torch.zeros((), device=self.device)
        deeper: list[tuple[Tensor, tuple[Tensor, ...]]] = []
        for name in self.encoders:
            encoder = self.media_encoder(name)
            batch = stream.media.get(name)
            if batch is None:
                touched = touched + encoder.touch()
                continue
            encoded = encoder(batch.items)
            batch.check(encoded)
            source = batch.sources.to(self.device)
            features = torch.cat([item.embeddings for item in encoded])[source]
            index = batch.index.to(self.device)
            rows = rows.index_put((index,), features.to(rows.dtype))
            if encoded[0].layers:
                stacks = zip(*(item.layers for item in encoded), strict=True)
                deeper.append((index, tuple(torch.cat(stack)[source] for stack in stacks)))
        unknown = set(stream.media) - set(self.encoders.keys())
        if unknown:
            raise ModelError(
                f"the stream has spans for encoder {sorted(unknown)[0]!r}, which this model lacks; "
                f"it has: {', '.join(self.encoders.keys()) or 'none'}"
            )
        visible = Intervals(*stream.visible)
        adapters = [self.adapter] * len(stream.bounds)
        joined = Deeper.joined(len(rows), deeper)
        return Rows(rows, stream.positions, visible, stream.bounds, adapters, joined), touched

    def hidden(self, stream: TokenStream) -> tuple[Tensor, Tensor]:
        """(T, H) last hidden states, and the zero of `embed`."""
        rows, touched = self.embed(stream)
        pieces = [rows] if self.packs else rows.apart()
        hidden = []
        for piece in pieces:
            with self.backbone.adapters_of(piece):
                hidden.append(self.backbone.read(piece))
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden), touched

    def logprobs_at(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden (P, H), targets (P,) -> logprobs (P,) in float32."""
        return self.scored(hidden, targets).logprobs

    def logits(self, hidden: Tensor) -> Tensor:
        """(P, H) -> (P, V) in float32; for the few positions that are sampled from."""
        return self.backbone.logits(hidden, [self.adapter] * len(hidden))

    def compute(
        self, stream: TokenStream, objective: Objective = LEARN, everywhere: bool = False
    ) -> Sums:
        """The loss sum of a stream; never normalised.

        Args:
            everywhere: Compute logprobs also at the text positions that the loss does not read.
        """
        hidden, touched = self.hidden(stream)
        return self.score(stream, hidden, touched, objective, everywhere)

    def score(
        self,
        stream: TokenStream,
        hidden: Tensor,
        touched: Tensor,
        objective: Objective = LEARN,
        everywhere: bool = False,
    ) -> Sums:
        """What `compute` does, from the stream's hidden states (T, H)."""
        inputs = {"weights": stream.weights, **stream.loss_inputs}
        learned = objective.loss.learned(inputs, objective.config)
        chosen = learned
        if everywhere:  # the last position of a media item may be learned: it predicts a text
            chosen = learned | ~stream.is_media
        index = chosen.nonzero()[:, 0]
        read = learned[index].to(self.device)
        targets = stream.targets[index].to(self.device)
        states = hidden[index.to(self.device)]
        if objective.loss.function is LEARN.loss.function:
            loss, losses, logprobs = self._weighted_nll(stream, index, states, targets)
            metrics: dict[str, Tensor] = {}
        else:
            entropy = objective.loss.needs_entropy(objective.config)
            scored = self.scored(states, targets, entropy=entropy)
            logprobs = scored.logprobs
            batch = _loss_batch(stream, index[learned[index]], objective, scored, read)
            losses = objective.loss.function(batch)
            _check_losses(losses, objective.loss.name, len(stream.bounds))
            loss, metrics = losses.sum(), objective.loss.metrics(batch)
        weights = _weights(stream)
        return Sums(
            loss=loss + touched,
            weight=sum(weights),
            logprobs=logprobs.detach(),
            index=index,
            documents=list(zip(losses.tolist(), weights, strict=True)),
            metrics=metrics,
        )

    def _weighted_nll(
        self, stream: TokenStream, index: Tensor, hidden: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sum, each document's, and the logprobs: cross entropy's gradient by logprobs is
        known beforehand, so that the logits are looked at once.
        """
        weights = stream.weights[index].to(self.device, torch.float32)
        head = self.output_weight
        total, logprobs = weighted_nll(
            hidden.to(head.dtype), head, targets, weights,
            softcap=self.backbone.softcap, adapter=self._output_adapter(hidden),
        )  # fmt: skip
        each = -logprobs.double() * weights
        if each.ndim == 2:
            each = each.sum(-1)
        losses = torch.segment_reduce(each, "sum", lengths=_lengths(stream, index).to(each.device))
        return total, losses, logprobs

    def scored(
        self, hidden: Tensor, targets: Tensor, *, entropy: bool = False, top_k: int = 0
    ) -> Scored:
        """hidden (P, H), targets (P,) or (P, K) -> what the model thinks of them; see
        `token_logprobs`."""
        weight = self.output_weight
        return token_logprobs(
            hidden.to(weight.dtype), weight, targets, softcap=self.backbone.softcap,
            entropy=entropy, top_k=top_k, adapter=self._output_adapter(hidden),
        )  # fmt: skip

    def _output_adapter(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        return output_factors(self.backbone.output_layer, self.adapter, hidden)

    def trainable(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(part, name, parameter) of all that trains, in a stable order.

        An adapter's parameters have the names that they would have if it were the only one.
        """
        mine = f".{self.adapter}."
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            if ".lora_" not in name:
                yield self.part_of(name), name, parameter
            elif mine in name:
                yield self.part_of(name), name.replace(mine, ".default."), parameter

    def part_of(self, name: str) -> str:
        """The part ("language", "projector", "vision", ...) that a parameter's name belongs to."""
        owner, rest = name.split(".", 1)
        if owner == "language":
            return "language"
        encoder, inner = rest.split(".", 1)
        if inner.startswith("projector."):
            return "projector"
        return TOWER_PARTS[self.media_encoder(encoder).encoder.medium]


def _loss_batch(
    stream: TokenStream, index: Tensor, objective: Objective, scored: Scored, read: Tensor
) -> LossBatch:
    """What a loss reads: the positions `index`, which are those of `scored` where `read`."""
    device = scored.logprobs.device
    return LossBatch(
        logprobs=scored.logprobs[read],
        weights=stream.weights[index].to(device, torch.float32),
        inputs={
            name: values[index].to(device, torch.float32)
            for name, values in stream.loss_inputs.items()
        },
        lengths=_lengths(stream, index).to(device),
        config=objective.config,
        entropy=None if scored.entropy is None else scored.entropy[read],
    )


def _check_losses(losses: Any, name: str, documents: int) -> None:
    """
    Raises:
        ModelError: they are not one number of each document.
    """
    shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if shape != (documents,):
        raise ModelError(
            f"a loss must return one number per document, shape ({documents},); {name!r} returned "
            f"{shape}: sum its values with batch.per_document"
        )


def _lengths(stream: TokenStream, index: Tensor) -> Tensor:
    """(D,): how many of the positions `index` are each document's."""
    ends = torch.tensor([stop for _, stop in stream.bounds])
    before = torch.searchsorted(index, ends)
    return before.diff(prepend=before.new_zeros(1))


def _weights(stream: TokenStream) -> list[float]:
    """The summed weights of each document."""
    return [float(stream.weights[start:stop].double().sum()) for start, stop in stream.bounds]

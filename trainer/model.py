"""The model: encoders scatter embeddings into a row, the language model reads it.

A plain `nn.Module` with a pure `compute(stream) -> Sums`. The engine and the Lightning run both
drive this one module; neither wraps the other.

Shape letters: T positions of a stream, P positions that are learned, H hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plait.encoders.media_encoder import MediaEncoder
from plait.errors import ModelError
from plait.kernels.interval_attention import Intervals
from plait.kernels.token_logprobs import token_logprobs, weighted_nll
from plait.stream import TokenStream
from plait.trainer.losses import WEIGHTED_NLL, loss_named
from plait.trainer.spec import TOWER_PARTS


@dataclass(slots=True)
class Sums:
    """What one stream adds: a loss SUM and the weight it was taken over.

    `logprobs` (P,) are those at stream positions `index` (P,), detached. `documents` holds each
    document's own (loss, weight), in stream order.
    """

    loss: Tensor
    weight: float
    logprobs: Tensor
    index: Tensor
    documents: list[tuple[float, float]]


class PlaitModel(nn.Module):
    """A language model with its media encoders.

    Args:
        language: A transformers causal language model whose attention is "plait".
        encoders: By encoder name, as spans name them.
    """

    def __init__(self, language: Any, encoders: Mapping[str, MediaEncoder]) -> None:
        super().__init__()
        self.language = language
        self.encoders = nn.ModuleDict(encoders)
        self.packs = True
        """False where packing would change results; each document then runs alone."""
        self.attention_route = "auto"
        """How the language model's attention is computed: "auto" or a name in
        `plait.kernels.interval_attention.ROUTES`."""
        self._softcap = _output_softcap(language.config)
        _refuse_chunks(language.config)

    @property
    def device(self) -> torch.device:
        return self.output_weight.device

    @property
    def output_weight(self) -> Tensor:
        """(V, H): maps hidden states to logits."""
        weight: Tensor = self.language.get_output_embeddings().weight
        return weight

    @property
    def decoder(self) -> Any:
        """The language model without its output layer."""
        return self.language.get_decoder()

    def media_encoder(self, name: str) -> MediaEncoder:
        encoder = self.encoders[name]
        assert isinstance(encoder, MediaEncoder)
        return encoder

    def embed(self, stream: TokenStream) -> tuple[Tensor, dict[str, Any], Tensor]:
        """(T, H) input embeddings, keywords for deeper layers, and a zero that touches encoders.

        Every encoder with something to train is entered exactly once, whatever the stream holds,
        so that ranks with different media still reduce the same gradients.
        """
        ids = stream.token_ids.to(self.device)
        rows = self.decoder.get_input_embeddings()(ids.clamp(min=0))
        touched = torch.zeros((), device=self.device)
        deeper: dict[str, Any] = {}
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
            rows = rows.index_put((batch.index.to(self.device),), features.to(rows.dtype))
            if encoded[0].layers:
                deeper = _deeper_layers(stream, [item.layers for item in encoded], source)
        unknown = set(stream.media) - set(self.encoders.keys())
        if unknown:
            raise ModelError(
                f"the stream has spans for encoder {sorted(unknown)[0]!r}, which this model lacks; "
                f"it has: {', '.join(self.encoders.keys()) or 'none'}"
            )
        return rows, deeper, touched

    def hidden(self, stream: TokenStream, cache: Any = None, visible: Intervals | None = None
               ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(T, H) last hidden states, and the zero of `embed`.

        Args:
            cache: A transformers cache that receives the row's keys and values.
            visible: Key intervals where they are not the stream's own (with a cache).
        """
        rows, deeper, touched = self.embed(stream)
        if self.packs or cache is not None or len(stream.bounds) == 1:
            visible = visible or Intervals(*stream.visible)
            deeper |= _document_bounds(stream.bounds, self.device)
            return self._decode(rows, stream.positions, visible, deeper, cache), touched
        if deeper:
            raise ModelError("a model with deeper media layers must pack; its packing check failed")
        parts = []
        for start, stop in stream.bounds:
            visible = Intervals(*(stream.visible[:, start:stop] - start))
            positions = stream.positions[..., start:stop]
            parts.append(self._decode(rows[start:stop], positions, visible, {}, None))
        return torch.cat(parts), touched

    def _decode(
        self,
        rows: Tensor,
        positions: Tensor,
        visible: Intervals,
        keywords: dict[str, Any],
        cache: Any,
    ) -> Tensor:
        positions = positions.to(self.device)
        visible.route = self.attention_route
        output: Tensor = self.decoder(
            inputs_embeds=rows[None],
            position_ids=positions[None] if positions.ndim == 1 else positions[:, None],
            past_key_values=cache,
            use_cache=cache is not None,
            visible=visible.to(self.device),
            **keywords,
        ).last_hidden_state[0]
        return output

    def logprobs_at(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden (P, H), targets (P,) -> logprobs (P,) in float32."""
        weight = self.output_weight
        hidden = hidden.to(weight.dtype)
        return token_logprobs(hidden, weight, targets, softcap=self._softcap).logprobs

    def logits(self, hidden: Tensor) -> Tensor:
        """(P, H) -> (P, V) in float32; for the few positions that are sampled from."""
        logits = nn.functional.linear(hidden.to(self.output_weight.dtype), self.output_weight)
        logits = logits.float()
        return logits if self._softcap is None else self._softcap * (logits / self._softcap).tanh()

    def compute(self, stream: TokenStream, everywhere: bool = False) -> Sums:
        """The loss sum of a stream; never normalised.

        Args:
            everywhere: Compute logprobs also at the text positions without weight.
        """
        hidden, touched = self.hidden(stream)
        chosen = stream.weights != 0
        if everywhere:  # the last position of a media item may be learned: it predicts a text
            chosen |= ~stream.is_media
        index = chosen.nonzero()[:, 0]
        loss, losses, logprobs = self._losses(stream, index, hidden[index.to(self.device)])
        return Sums(
            loss=loss + touched,
            weight=float(stream.weights.double().sum()),
            logprobs=logprobs.detach(),
            index=index,
            documents=_per_document(stream, index, losses.detach()),
        )

    def _losses(
        self, stream: TokenStream, index: Tensor, hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of losses at `index` (P,) with hidden states (P, H), each of them, the logprobs.

        Where all are weighted nll, their gradient is known as soon as the logits are.
        """
        targets = stream.targets[index].to(self.device)
        weights = stream.weights[index].to(self.device, torch.float32)
        if set(stream.loss) <= {WEIGHTED_NLL}:
            head = self.output_weight
            total, logprobs = weighted_nll(
                hidden.to(head.dtype), head, targets, weights, softcap=self._softcap
            )
            return total, -logprobs * weights, logprobs
        logprobs = self.logprobs_at(hidden, targets)
        losses = self._losses_by_name(stream, index, logprobs, weights)
        return losses.sum(), losses, logprobs

    def _losses_by_name(
        self, stream: TokenStream, index: Tensor, logprobs: Tensor, weights: Tensor
    ) -> Tensor:
        document = torch.zeros(stream.length, dtype=torch.long)
        for number, (start, stop) in enumerate(stream.bounds):
            document[start:stop] = number
        losses = torch.zeros_like(logprobs)
        inputs = {name: values[index].to(logprobs) for name, values in stream.loss_inputs.items()}
        for name in dict.fromkeys(stream.loss):
            mine = torch.tensor([loss == name for loss in stream.loss])[document[index]]
            mine = mine.to(logprobs.device)
            values = loss_named(name)(logprobs, weights, inputs)
            losses = torch.where(mine, values, losses)
        return losses

    def trainable(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(part, name, parameter) of all that trains, in a stable order."""
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                yield self.part_of(name), name, parameter

    def part_of(self, name: str) -> str:
        """The part ("language", "projector", "vision", ...) that a parameter's name belongs to."""
        owner, rest = name.split(".", 1)
        if owner == "language":
            return "language"
        encoder, inner = rest.split(".", 1)
        if inner.startswith("projector."):
            return "projector"
        return TOWER_PARTS[self.media_encoder(encoder).encoder.medium]


def _deeper_layers(
    stream: TokenStream, layers: list[tuple[Tensor, ...]], source: Tensor
) -> dict[str, Any]:
    """Deepstack: features added to the hidden states after the first layers."""
    stacked = [torch.cat(parts)[source] for parts in zip(*layers, strict=True)]
    return {
        "visual_pos_masks": stream.is_media[None].to(source.device),
        "deepstack_visual_embeds": stacked,
    }


def _document_bounds(bounds: Sequence[tuple[int, int]], device: torch.device) -> dict[str, Any]:
    """Where documents begin, for layers that are not attention and read transformers' keywords.

    A family whose layers read none of them mixes documents; the packing check finds it.
    """
    if len(bounds) == 1:
        return {}
    lengths = torch.tensor([stop - start for start, stop in bounds])
    ends = torch.tensor([0, *(stop for _, stop in bounds)], dtype=torch.int32, device=device)
    number = torch.arange(len(bounds), dtype=torch.int32).repeat_interleave(lengths)
    longest = int(lengths.max())
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": number[None].to(device),
    }


def _per_document(stream: TokenStream, index: Tensor, losses: Tensor) -> list[tuple[float, float]]:
    sums = torch.zeros(stream.length, dtype=torch.float64)
    sums[index] = losses.double().cpu()
    return [
        (float(sums[start:stop].sum()), float(stream.weights[start:stop].double().sum()))
        for start, stop in stream.bounds
    ]


_SCALES_LOGITS = ("logit_scale", "logits_scaling", "lm_head_multiplier")


def _output_softcap(config: Any) -> float | None:
    text = config.get_text_config()
    for name in _SCALES_LOGITS:
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise ModelError(
                f"this language model scales its logits ({name}={getattr(text, name)}), which is "
                "not supported yet; choose another family"
            )
    softcap: float | None = getattr(text, "final_logit_softcapping", None)
    return softcap


def _refuse_chunks(config: Any) -> None:
    """Such layers keep their chunks in a mask, which interval attention does not read."""
    if "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        raise ModelError(
            "this language model attends in chunks (layer type 'chunked_attention'), which is not "
            "supported yet; choose another family"
        )

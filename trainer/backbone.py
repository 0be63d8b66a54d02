"""The language model that many runs share: one copy of its weights, any number of adapters.

Shape letters: T positions of a row, P some of them, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from plait.errors import ModelError
from plait.kernels.interval_attention import Intervals
from plait.kernels.token_logprobs import output_logits
from plait.trainer.grouped_lora import GroupedLora
from plait.trainer.lora import output_factors
from plait.trainer.ranks.group import Group, OutOfStepError
from plait.trainer.ranks.sharding import Guard
from plait.trainer.rows import Rows


class Backbone:
    """A transformers causal language model whose attention is "plait", as rows run through it.

    Args:
        language: Runs add their adapters to it; its own weights belong to all of them.

    Raises:
        ModelError: its logits, or its attention, are of a kind that is not computed here.
    """

    def __init__(self, language: Any) -> None:
        self.softcap = _output_softcap(language.config)
        _refuse_chunks(language.config)
        self.language = language
        self.packs = True
        """False where packing would change results; each document then runs alone."""

        self.packing_difference: float | None = None
        """How far packing changes gradients, relatively; None before it was measured."""

        self.packing_refusal: str | None = None
        """What the model says where it refuses a packed row."""

        self.attention_route = "auto"
        """How attention is computed: "auto" or a name in
        `plait.kernels.interval_attention.ROUTES`."""

        self.shared: GroupedLora | None = None
        """Chooses adapters by document, once several runs share this model; until then peft's
        layers use the one that is active."""

        self.guard: Guard | None = None
        """Keeps ranks in step, where the layers are cut into shards."""

        self.before_read: Callable[[], None] = _nothing
        """Called before each reading: other ranks may have to lend their shards."""

        self.own_modules = list(language.modules())
        """All that the language model had before it had adapters."""

    @property
    def sharded(self) -> bool:
        """Whether the layers are cut into shards, one on each rank."""
        return self.guard is not None

    def shard(self, group: Group) -> None:
        """Cut the layers into shards; collective.

        Raises:
            ModelError: the model cannot read several documents in one row.
        """
        if not self.packs:
            raise ModelError(
                "strategy 'fsdp' needs a model that can be packed, which this one cannot: use 'ddp'"
            )
        self.guard = Guard(self.language)  # before the hooks that gather shards
        group.shard(self.language)

    @property
    def device(self) -> torch.device:
        return self.output_weight.device

    @property
    def output_weight(self) -> Tensor:
        """(V, H): maps hidden states to logits."""
        weight: Tensor = self.output_layer.weight
        return weight

    @property
    def output_layer(self) -> Any:
        """Adapters may stand on it, as on any linear layer."""
        return self.language.get_output_embeddings()

    @property
    def decoder(self) -> Any:
        """The language model without its output layer."""
        return self.language.get_decoder()

    @property
    def layers(self) -> int:
        """Layers, as many as a cache of keys has."""
        count: int = self.language.config.get_text_config().num_hidden_layers
        return count

    @property
    def context(self) -> int | None:
        """Positions that the model was made for; None where its configuration does not say."""
        config = self.language.config.get_text_config()
        positions: int | None = getattr(config, "max_position_embeddings", None)
        return positions

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end a text, as `generation_config.json` names them; none where there is no
        such file: a chat model may have several, of which its tokenizer knows one."""
        config = getattr(self.language, "generation_config", None)
        if config is None or getattr(config, "_from_model_config", False):
            return ()
        ends = config.eos_token_id
        return tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (ends,)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one position's keys and values, from the configuration."""
        text = self.language.config.get_text_config()
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        groups = getattr(text, "num_key_value_heads", None) or heads
        element = self.output_weight.element_size()
        return int(2 * text.num_hidden_layers * groups * size * element)

    def share(self) -> GroupedLora:
        """From now on documents choose their adapters; idempotent."""
        if self.shared is None:
            self.shared = GroupedLora(self.language)
        return self.shared

    def adapters_changed(self) -> None:
        """To be called when an adapter was added or removed."""
        if self.shared is not None:
            self.shared.refresh()

    def train(self, mode: bool) -> None:
        """Switch the model between training and evaluation, if it is not there already.

        What belongs to adapters is left alone: there may be many, most of them idle.
        """
        if self.language.training != mode:
            for module in self.own_modules:
                module.training = mode

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """(T,) -> (T, H); ids below 0, where media stand, give the first token's."""
        rows: Tensor = self.decoder.get_input_embeddings()(token_ids.to(self.device).clamp(min=0))
        return rows

    @contextmanager
    def adapters_of(self, rows: Rows) -> Iterator[None]:
        """Inside, the rows' documents have their adapters.

        A backward pass belongs inside too: gradient checkpointing computes layers again in it.
        """
        if self.shared is None:
            with nullcontext():
                yield
            return
        with self.shared.on(rows.adapters, rows.bounds, rows.length):
            yield

    def read(self, rows: Rows, cache: Any = None) -> Tensor:
        """(T, H) last hidden states. Call it inside of `adapters_of(rows)`.

        Args:
            cache: A transformers cache that receives the rows' keys and values.
        """
        positions = rows.positions.to(self.device)
        rows.visible.route = self.attention_route
        self.before_read()
        with self._in_step():
            output: Tensor = self.decoder(
                inputs_embeds=rows.embeddings[None],
                position_ids=positions[None] if positions.ndim == 1 else positions[:, None],
                past_key_values=cache,
                use_cache=cache is not None,
                visible=rows.visible.to(self.device),
                **_document_bounds(rows.bounds, self.device),
                **(rows.deeper.keywords() if rows.deeper else {}),
            ).last_hidden_state[0]
        return output

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """An error of a layer is raised when all layers are through, on all ranks.

        Raises:
            OutOfStepError: it was none of a layer, so that other ranks wait.
        """
        if self.guard is None:
            with nullcontext():
                yield
            return
        try:
            yield
        except Exception as error:
            raise OutOfStepError(f"reading a row over shards failed: {error}") from error
        self.guard.check()

    def without_gradients(self) -> AbstractContextManager[Any]:
        """For reading alone; shards that were gathered in inference mode could never train."""
        return torch.no_grad() if self.sharded else torch.inference_mode()

    def spare(self) -> Rows:
        """A row of one position, for a rank that has nothing to read."""
        width = self.language.get_input_embeddings().weight.shape[1]
        embeddings = torch.zeros(1, width, dtype=self.output_weight.dtype, device=self.device)
        visible = Intervals(torch.tensor([0]), torch.tensor([1]))
        return Rows(embeddings, torch.zeros(1, dtype=torch.long), visible, [(0, 1)], [None])

    def logits(self, hidden: Tensor, adapters: Sequence[str | None] = ()) -> Tensor:
        """(P, H) -> (P, V) in float32; for the few positions that are sampled from.

        Args:
            adapters: Each position's; none of them where it is empty.
        """
        weight, added = self.output_weight, None
        for adapter in dict.fromkeys(adapters):
            rows = torch.tensor([i for i, name in enumerate(adapters) if name == adapter])
            rows = rows.to(hidden.device)
            factors = output_factors(self.output_layer, adapter, hidden[rows])
            if factors is not None:
                if added is None:
                    shape = (len(hidden), len(weight))
                    added = torch.zeros(shape, dtype=torch.float32, device=hidden.device)
                added = added.index_copy(0, rows, factors[0] @ factors[1].T)
        return output_logits(hidden.to(weight.dtype), weight, softcap=self.softcap, added=added)


def _nothing() -> None:
    """The other ranks need not know."""


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

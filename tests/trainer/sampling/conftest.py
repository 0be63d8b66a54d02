"""A model of whole numbers, whose tokens show whatever is read wrongly, and a desk for requests."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plait.kernels.interval_attention import Intervals
from plait.modalities import Image
from plait.stream import Document, Encoded, Item, ItemInputs, ItemPlan, Span, TokenStream, pack
from plait.trainer.rows import Rows
from plait.trainer.sampling.choosing import Draws, choose
from plait.trainer.sampling.memory import KeyMemory
from plait.trainer.sampling.requests import Generated, PromptScores, Request
from plait.trainer.sampling.sampler import Sampler
from plait.trainer.sampling.settings import SamplerSettings

MODULUS = 10_007
VOCABULARY = 48
PICTURE = -1
"""Positions of a picture have its placeholder as token; see `Whole.prompt`."""


class WholeBackbone:
    """Two layers that add up what each position sees, in whole numbers below MODULUS.

    A key that is read twice, not at all, at another place or with another's content changes what
    comes out, and nothing is ever rounded.
    """

    layers, softcap, device = 2, None, torch.device("cpu")
    end_tokens = ()
    without_gradients = staticmethod(torch.inference_mode)

    def __init__(self, packs: bool = True, window: bool = False, context: int | None = None):
        text = SimpleNamespace(sliding_window=4 if window else None)
        self.language = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
        self.packs, self.context = packs, context
        self.output_weight = torch.zeros(VOCABULARY, 1)
        self.adapters_of = lambda rows: nullcontext()  # noqa: ARG005

    def train(self, mode: bool) -> None:
        """It has no modes."""

    def embed_tokens(self, ids: Tensor) -> Tensor:
        return ((ids + 2) * 7919 % MODULUS).double()[:, None]

    def read(self, rows: Rows, cache: Any = None) -> Tensor:
        x = rows.embeddings[:, 0]
        names = [
            sum(map(ord, name or ""))
            for name, (start, stop) in zip(rows.adapters, rows.bounds, strict=True)
            for _ in range(stop - start)
        ]
        for layer in range(self.layers):
            keys = (x * (31 * rows.positions + 17) + torch.tensor(names)) % MODULUS
            held = keys
            if cache is not None:
                held, _ = cache.layers[layer].update(*[keys[None, None, :, None]] * 2)
            x = (x + _seen(held.flatten(), rows.visible)) % MODULUS
        return x[:, None]

    def logits(self, hidden: Tensor, _: Any = ()) -> Tensor:
        odd = 2 * torch.arange(VOCABULARY, dtype=torch.float64) + 1
        return (hidden * odd * 48_271 % 997 / 120).float()


def _seen(keys: Tensor, visible: Intervals) -> Tensor:
    """The sum of the keys that each query sees."""
    sums = torch.cat([keys.new_zeros(1), keys.cumsum(0)])
    found = sums[visible.hi] - sums[visible.lo]
    for queries, more in visible.links:
        found = found.index_add(0, queries, sums[more.hi] - sums[more.lo])
    return found


class WholeModel:
    """As much of a `PlaitModel` as the sampler uses; media are read from features."""

    def __init__(self, backbone: WholeBackbone, adapter: str | None = None) -> None:
        self.backbone, self.adapter = backbone, adapter
        self.output_weight = backbone.output_weight
        self.encoders = nn.ModuleDict()

    def embed(self, stream: TokenStream) -> tuple[Rows, Tensor]:
        embeddings = self.backbone.embed_tokens(stream.token_ids)
        for batch in stream.media.values():
            features = [item.features.embeddings for item in batch.items if item.features]
            embeddings[batch.index] = torch.cat(features)[batch.sources]
        visible, adapters = Intervals(*stream.visible), [self.adapter] * len(stream.bounds)
        rows = Rows(embeddings, stream.positions, visible, stream.bounds, adapters)
        return rows, torch.zeros(())


class Tokens:
    """A tokenizer whose token n is the letter n of the alphabet, in small and large letters."""

    eos_token_id = 0

    def __len__(self) -> int:
        return VOCABULARY

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        del options
        return "".join(chr(ord("A") + token) for token in tokens)


class Whole:
    """Makes models of whole numbers, and requests for them."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], list[int]] = {}
        """What samples were expected to be."""

    def model(self, adapter: str | None = None, **options: Any) -> Any:
        return WholeModel(WholeBackbone(**options), adapter)

    def beside(self, model: Any, adapter: str) -> Any:
        """Another run of the same language model."""
        return WholeModel(model.backbone, adapter)

    def prompt(self, *parts: int | Sequence[int]) -> Document:
        """Texts of token ids, and pictures by their seeds, of six positions that see one another
        both ways; an odd seed's are causal."""
        ids: list[int] = []
        spans, items = [], []
        for part in parts:
            if not isinstance(part, int):
                ids += part
                continue
            both = part % 2 == 0
            pixels = np.full((2, 3, 3), part % 256, dtype=np.uint8)
            plan = ItemPlan("picture", 6, (1, 2, 3), bidirectional=both)
            group = len(items) if both else None
            spans.append(Span(len(ids), 6, "picture", len(items), group=group))
            items.append(Item(Image(pixels), plan))
            ids += 6 * [PICTURE]
        return _document(ids, tuple(spans), tuple(items))

    def random(self, generator: np.random.Generator, length: int) -> list[int]:
        ids: list[int] = generator.integers(1, VOCABULARY, length).tolist()
        return ids

    def inputs(self, prompt: Document) -> list[ItemInputs]:
        seeds = [int(item.part.decode()[0, 0, 0]) for item in prompt.items]
        return [
            ItemInputs(features=Encoded((1000 * seed + torch.arange(6.0).double() + 1)[:, None]))
            for seed in seeds
        ]

    def request(
        self, model: Any, prompt: Document, samples: int = 1, owner: str = "", **options: Any
    ) -> Request:
        """Options are those of `Request` and `SamplerSettings`."""
        own = {n: options.pop(n) for n in list(options) if n in Request.__dataclass_fields__}
        settings = SamplerSettings(**{"max_tokens": 6, "stop": ()} | options)
        layout: Any = SimpleNamespace(
            banned_ids=frozenset(), decode_position=lambda positions: int(positions[-1]) + 1
        )
        return Request(
            model, Tokens(), layout, prompt, self.inputs(prompt), settings, samples, owner, **own
        )

    def expected(self, request: Request) -> list[list[int]]:
        """The tokens of each sample, each step reading the whole row again without a cache."""
        seeds = tuple(int(item.part.decode()[0, 0, 0]) for item in request.prompt.items)
        facts = request.prompt.token_ids.tobytes(), seeds, request.settings, request.model.adapter
        for number in range(request.samples):
            if (*facts, number) not in self._known:
                self._known[*facts, number] = self._sampled(request, number)
        return [self._known[*facts, number] for number in range(request.samples)]

    def _sampled(self, request: Request, number: int) -> list[int]:
        settings, backbone = request.settings, request.model.backbone
        draws, tokens = Draws(settings.seed, number), list[int]()
        while len(tokens) < (settings.max_tokens or 0):
            ids = [*request.prompt.token_ids.tolist(), *tokens]
            document = _document(ids, request.prompt.spans, request.prompt.items)
            rows, _ = request.model.embed(pack([document], [request.inputs]))
            logits = backbone.logits(backbone.read(rows)[-1:])
            tokens += choose(logits, [settings], [draws], torch.empty(0, dtype=torch.long)).tokens
            if settings.stop and tokens[-1] in settings.stop:
                break
        return tokens


def _document(ids: list[int], spans: tuple[Span, ...], items: tuple[Item, ...]) -> Document:
    nothing = np.zeros(len(ids), dtype=np.int64)
    ids_array = np.array(ids, dtype=np.int64)
    weights = nothing.astype(np.float32)
    return Document(ids_array, nothing, weights, np.arange(len(ids)), spans, items)


@dataclass
class Outcome:
    """What became of a request."""

    rows: list[Generated] | None = None
    scores: PromptScores | None = None
    error: BaseException | None = None
    job: Any = None
    order: int = -1
    """Which one it was to end."""

    @property
    def tokens(self) -> list[list[int]]:
        assert self.rows is not None, self.error
        return [row.tokens for row in self.rows]

    @property
    def over(self) -> bool:
        return self.order >= 0


class Desk:
    """Puts requests to a sampler and keeps what becomes of them."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.outcomes: list[Outcome] = []
        self.steps = 0
        self.lengths: list[list[int]] = []
        """How many positions each piece of each row has."""

        read = sampler.memory.read

        def counted(pieces: Any) -> Any:
            self.lengths.append([piece.length for piece in pieces])
            return read(pieces)

        sampler.memory.read = counted  # type: ignore[method-assign]

    @property
    def positions(self) -> int:
        """All positions read."""
        return sum(map(sum, self.lengths))

    def ask(self, request: Request) -> Outcome:
        outcome = Outcome()

        def end() -> None:
            assert not outcome.over, "a request ends once"
            outcome.order = sum(other.over for other in self.outcomes)

        def done(rows: list[Generated], scores: PromptScores | None) -> None:
            end()
            outcome.rows, outcome.scores = rows, scores

        def failed(error: BaseException) -> None:
            end()
            outcome.error = error

        self.outcomes.append(outcome)
        outcome.job = self.sampler.add(request, done, failed)
        return outcome

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.steps += 1
            self.sampler.step()

    def finish(self, most: int = 3000) -> None:
        """Step until nothing is left, which must not take forever."""
        for _ in range(most):
            if not self.sampler.busy:
                return
            self.step()
        raise AssertionError(f"still busy after {most} steps")

    def answer(self, *requests: Request) -> list[Outcome]:
        """What becomes of requests that come at once."""
        outcomes = [self.ask(request) for request in requests]
        self.finish()
        return outcomes


def poison(memory: Any) -> None:
    """Fill slots that nobody has written, or that were given back, with what must not be read."""
    assert isinstance(memory, KeyMemory)
    give = memory.arena.give

    @torch.inference_mode()
    def fill(start: int, stop: int) -> None:
        for layer in memory.cache.layers:
            if layer.is_initialized:
                layer.keys[:, :, start:stop] = layer.values[:, :, start:stop] = 1e4

    def poisoning(start: int, length: int) -> None:
        give(start, length)
        fill(start, start + length)

    def initial(layer: Any) -> Callable[..., None]:
        prepare = layer.lazy_initialization

        def poisoned(*args: Any) -> None:
            prepare(*args)
            layer.keys.fill_(1e4)
            layer.values.fill_(1e4)

        return poisoned

    memory.arena.give = poisoning  # type: ignore[method-assign]
    for layer in memory.cache.layers:
        layer.lazy_initialization = initial(layer)


def is_whole(sampler: Sampler) -> bool:
    """Whether nobody holds a slot, once what is remembered is given up."""
    while sampler.rooms.prefixes.drop():
        pass
    memory = sampler.memory
    assert isinstance(memory, KeyMemory)
    return memory.arena.free == memory.arena.size and len(memory.arena._free) <= 1


@pytest.fixture(scope="session")
def whole() -> Whole:
    return Whole()


@pytest.fixture(scope="session")
def desk() -> type[Desk]:
    return Desk


@pytest.fixture(scope="session")
def poisoned() -> Callable[[Sampler], Sampler]:
    """Makes a sampler's free slots unreadable."""

    def apply(sampler: Sampler) -> Sampler:
        poison(sampler.memory)
        return sampler

    return apply


@pytest.fixture(scope="session")
def emptied() -> Callable[[Sampler], bool]:
    return is_whole

"""Continuous batching: every step reads one row of whatever is next, for all requests at once.

A step's row holds the last token of each sample that grows, and chunks of the prompts that are
still read. Requests come and go between steps; weights, settings and media may all differ.

Shape letters: T positions of a prompt, H hidden size, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from itertools import count, groupby
from math import isnan
from typing import Any

import torch
from torch import Tensor

from plait.errors import DataError, ModelError
from plait.ranges import check_number
from plait.trainer.backbone import Backbone
from plait.trainer.model import PlaitModel
from plait.trainer.sampling.choosing import Draws, Turn, choose
from plait.trainer.sampling.memory import KeyMemory, Memory, Piece, RowMemory
from plait.trainer.sampling.prefixes import next_cut
from plait.trainer.sampling.reading import chunk, embed, next_token, planned
from plait.trainer.sampling.requests import (
    Continuation,
    Generated,
    Job,
    Prompt,
    PromptScores,
    Request,
)
from plait.trainer.sampling.rooms import Rooms
from plait.trainer.sampling.scoring import score_prompt
from plait.trainer.sampling.settings import MOST_TOKENS
from plait.trainer.sampling.stopping import Stops
from plait.trainer.sampling.turns import Queues, Turns

SLOTS = 16_384
"""Positions that a sampler keeps where nobody says how many."""

CHUNK = 512
"""Positions of a step's row, but for samples that grow: a longer prompt is read in several steps,
beside which the others go on."""

MOST_RUNNING = 256
"""Samples that grow at a time."""


class Sampler:
    """Samples from all models that share one language model. Not thread-safe.

    Args:
        slots: Positions kept at most; a request waits until there is room for all that it may
            become.
        chunk: Positions of prompts that a step reads; None reads each in one.
        share: Whether prompts that begin alike are read once.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        slots: int = SLOTS,
        chunk: int | None = CHUNK,
        share: bool = True,
    ) -> None:
        self.backbone = backbone
        self._slots = slots
        self._share = share and backbone.packs
        self.rooms = self._new_rooms()
        self.chunk = chunk if backbone.packs else None
        self._waiting = Queues()
        self._jobs: dict[Job, None] = {}
        """Those that have room, in the order in which they got it."""

        self._cancelled: list[Job] = []
        self._arrivals = count()
        self._bans: dict[tuple[int, ...], Tensor] = {}
        """Token ids that are never chosen, as tensors on the device: few, of many requests."""

        self._entries, self._rows, self._starts = Turns(), Turns(), Turns()

    def _new_rooms(self) -> Rooms:
        memory = (KeyMemory if self.backbone.packs else RowMemory)(self.backbone, self._slots)
        return Rooms(memory, share=self._share)

    @property
    def memory(self) -> Memory:
        """Where the keys of all requests are."""
        return self.rooms.memory

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._waiting or self._jobs)

    def add(
        self,
        request: Request,
        done: Callable[[list[Generated], PromptScores | None], None],
        failed: Callable[[BaseException], None],
    ) -> Job:
        """Queue a request; one of the two functions is called when it ends, from `step`.

        Raises:
            DataError: its prompt is empty, or it is larger than the model's context, or than the
                room there is.
            ConfigError: it asks for neither samples nor scores, or for more likeliest tokens at a
                position than there are.
        """
        _check(request)
        prompt, most = request.prompt, most_tokens(self.backbone, request)
        least = self.memory.needed(prompt.length, most - 1, request.samples, at_once=1)
        if least > self.memory.slots:
            raise DataError(
                f"a prompt and what is sampled must fit into the sampler's cache, which holds "
                f"{self.memory.slots} positions; {prompt.length} tokens and {most} new ones need "
                f"{least}: lower max_tokens, or give the engine more memory for sampling",
                prompt.origin,
            )
        first = request.layout.decode_position(prompt.positions)
        stops = Stops(request.tokenizer, request.settings.stop, self.backbone.end_tokens)
        banned, number = self._banned(request), next(self._arrivals)
        job = Job(request, stops, most, banned, first, done, failed, number)
        if request.prompt_logprobs or request.top_prompt_logprobs:
            job.scores = PromptScores()
        self._waiting.add(job)
        return job

    def _banned(self, request: Request) -> Tensor:
        """Media ids, and rows of a padded vocabulary that no token has."""
        size = request.model.output_weight.shape[0]
        ids = tuple(sorted({*request.layout.banned_ids, *range(len(request.tokenizer), size)}))
        if ids not in self._bans:
            self._bans[ids] = torch.tensor(ids, dtype=torch.long, device=self.backbone.device)
        return self._bans[ids]

    def cancel(self, job: Job) -> None:
        """End a request at the beginning of the next step; harmless for one that is done."""
        if job in self._jobs or job in self._waiting:
            self._cancelled.append(job)

    def fail(self, error: BaseException) -> None:
        """End every request with an error."""
        for job in (*self._waiting, *self._jobs):
            self._fail(job, error)

    def release(self) -> bool:
        """Give the memory of keys back, prompts that were kept for later ones too; False where
        requests need it, or there is none."""
        if self.busy or not self.memory.held:
            return False
        self.rooms = self._new_rooms()
        return True

    def forget(self, model: PlaitModel) -> None:
        """Give up what was read with a model's weights."""
        self.rooms.prefixes.forget(model)

    def step(self) -> None:
        """Admit what there is room for, read one row, choose tokens."""
        with self.backbone.without_gradients():
            self._step()

    def _step(self) -> None:
        self.backbone.train(False)
        self._drop_cancelled()
        self._admit()
        work = list(self._work())
        if work:
            self._advance(work, self._read(work))
        elif self._waiting and not self._jobs:  # never, while `add` counts as `Rooms` does
            error = ModelError("the sampler's cache has no room for this")
            self._fail(next(iter(self._waiting)), error)
        self._start_samples()

    def run(self) -> None:
        """Step until nothing is left."""
        while self.busy:
            self.step()

    def _drop_cancelled(self) -> None:
        cancelled, self._cancelled = self._cancelled, []
        for job in cancelled:
            if job in self._jobs or job in self._waiting:
                self._fail(job, CancelledError("the request was cancelled"))

    def _fail(self, job: Job, error: BaseException) -> None:
        self._release(job)
        job.failed(error)

    def _release(self, job: Job) -> None:
        self._waiting.discard(job)
        self._jobs.pop(job, None)
        self.rooms.close(job)

    def _admit(self) -> None:
        """Give room to those that wait, owner by owner, until one finds none."""
        for job in self._entries.order_of(self._waiting.by_owner):
            try:
                if job.prompt is None:
                    job.prompt = planned(job.request)
                admitted = self.rooms.open(job, job.prompt, first=not self._jobs)
                if admitted:
                    embed(job.request, job.prompt)
            except Exception as error:
                self._fail(job, error)
                continue
            if admitted is None:  # what it begins with is being read for another
                continue
            if not admitted:
                return
            self._entries.serve(job)
            self._waiting.discard(job)
            self._jobs[job] = None

    def _work(self) -> Iterator[tuple[Job, Continuation | None, Piece]]:
        """The pieces of the next row: samples that grow, then chunks of prompts."""
        grown = 0
        for job in self._jobs:
            for sample in job.running:
                grown += 1
                yield job, sample, next_token(job, sample)
        left = None if self.chunk is None else max(1, self.chunk - grown)
        for job in self._rows.order([job for job in self._jobs if job.reads]):
            prompt = job.prompt
            if prompt is None or left == 0:
                break
            hi = prompt.hi.numpy()
            stop = len(hi) if left is None else next_cut(hi, prompt.read, left)
            yield job, None, chunk(job, prompt, stop)
            self._rows.serve(job)
            if left is not None:
                left = max(0, left - (stop - prompt.read))

    def _read(self, work: Sequence[tuple[Job, Any, Piece]]) -> list[Tensor | None]:
        """The hidden states of each piece; None for those whose request failed."""
        try:
            return list(self.memory.read([piece for *_, piece in work]))
        except Exception as error:
            if len({id(job) for job, *_ in work}) == 1:
                self._fail(work[0][0], error)
                return [None] * len(work)
        # One of several is at fault: each for itself.
        hidden: list[Tensor | None] = []
        for job, group in groupby(work, key=lambda one: one[0]):
            pieces = list(group)
            hidden += self._read(pieces) if job in self._jobs else [None] * len(pieces)
        return hidden

    def _advance(
        self, work: Sequence[tuple[Job, Continuation | None, Piece]], hidden: list[Tensor | None]
    ) -> None:
        """Note what was read, and choose the next token of each sample that grows."""
        growing: list[tuple[Job, Continuation, Tensor]] = []
        for (job, sample, piece), states in zip(work, hidden, strict=True):
            if states is None:
                continue
            if sample is not None:
                growing.append((job, sample, states[-1]))
            elif job.prompt is not None:
                try:
                    self._note_chunk(job, job.prompt, piece, states)
                except Exception as error:  # scores need memory of their own: the others go on
                    self._fail(job, error)
        self._choose(growing)

    def _note_chunk(self, job: Job, prompt: Prompt, piece: Piece, states: Tensor) -> None:
        if not bool(states.isfinite().all()):
            raise _diverged(job)
        if job.scores is not None:
            score_prompt(job.request, job.scores, prompt.read, states)
        prompt.read += piece.length
        if prompt.read == len(prompt.hi):
            # Copies: views would keep the whole row, and the prompt's embeddings, while it grows.
            prompt.end = states[-1].clone()
            prompt.embeddings, prompt.deeper = None, None
            if not job.request.samples:
                self._end(job)

    def _start_samples(self) -> None:
        """Begin the samples of prompts that are read, as many as there is room for."""
        running: Counter[str] = Counter()
        for job in self._jobs:
            running[job.request.owner] += len(job.running)
        left = MOST_RUNNING - running.total()
        waiting = self._waiting.owners
        beginning: list[tuple[Job, Continuation, Tensor]] = []
        for job in self._starts.order([job for job in self._jobs if job.starts], running):
            prompt = job.prompt
            while prompt and prompt.end is not None and job.starts and len(beginning) < left:
                # One at a time while another's request waits: room that comes free is for that.
                yields = bool(job.running and waiting - {job.request.owner})
                sample = None if yields else self._begun(job, prompt)
                if sample is None:
                    break
                self._starts.serve(job)
                job.running.append(sample)
                beginning.append((job, sample, prompt.end))
        self._choose(beginning)

    def _begun(self, job: Job, prompt: Prompt) -> Continuation | None:
        """The next sample of a job; None where there is no room for it now."""
        try:
            place = self.rooms.of_sample(job, prompt)
        except Exception as error:  # the device has no more memory, whatever there may be room for
            if not any(one.running for one in self._jobs):
                self._fail(job, error)
            return None
        if place is None:
            return None
        number, job.started = job.started, job.started + 1
        draws = Draws(job.request.settings.seed, number)
        return Continuation(number, draws, place, owns_place=job.request.samples > 1)

    def _choose(self, growing: Sequence[tuple[Job, Continuation, Tensor]]) -> None:
        by_vocabulary: dict[int, list[tuple[Job, Continuation, Tensor]]] = {}
        for one in growing:
            by_vocabulary.setdefault(id(one[0].banned), []).append(one)
        for some in by_vocabulary.values():
            turns = [Turn(sample.draws) for _, sample, _ in some]
            for (job, sample, _), chosen in zip(some, self._chosen(some, turns), strict=True):
                if isinstance(chosen, Exception):
                    self._fail(job, chosen)
                elif job in self._jobs:  # not one that another of its samples has ended
                    self._append(job, sample, *chosen)

    def _chosen(
        self, some: Sequence[tuple[Job, Continuation, Tensor]], turns: Sequence[Turn]
    ) -> list[tuple[int, float] | Exception]:
        """Each sample's token and its logprob, or why it has none: where memory does not suffice
        for all of them, and where one is at fault, they are chosen in halves."""
        try:
            adapters = [job.request.model.adapter for job, *_ in some]
            logits = self.backbone.logits(torch.stack([hidden for *_, hidden in some]), adapters)
            settings = [job.request.settings for job, *_ in some]
            return list(zip(*choose(logits, settings, turns, some[0][0].banned), strict=True))
        except Exception as error:
            if len(some) == 1:
                return [error]
        half = len(some) // 2
        return [
            *self._chosen(some[:half], turns[:half]),
            *self._chosen(some[half:], turns[half:]),
        ]

    def _append(self, job: Job, sample: Continuation, token: int, logprob: float) -> None:
        if isnan(logprob):
            self._fail(job, _diverged(job))
            return
        made = sample.made
        made.tokens.append(token)
        made.logprobs.append(logprob)
        if job.request.on_token is not None:
            try:
                job.request.on_token(sample.number, token, logprob)
            except Exception as error:  # the caller's own: the others go on
                self._fail(job, error)
                return
        made.stopped = job.stops.reached(made.tokens)
        if not made.stopped and len(made.tokens) < job.most:
            return
        job.running.remove(sample)
        self.rooms.leave(sample)
        job.finished[sample.number] = made
        if len(job.finished) == job.request.samples:
            self._end(job)

    def _end(self, job: Job) -> None:
        self._release(job)
        job.done([job.finished[number] for number in range(len(job.finished))], job.scores)


def _check(request: Request) -> None:
    scores = request.prompt_logprobs or request.top_prompt_logprobs
    least = "[0, inf)" if scores else "[1, inf)"
    check_number("samples", request.samples, least, whole=True)
    size = request.model.output_weight.shape[0]
    check_number("top_prompt_logprobs", request.top_prompt_logprobs, f"[0, {size}]", whole=True)
    if request.prompt.length == 0:
        raise DataError("a prompt must hold a position at least", request.prompt.origin)


def _diverged(job: Job) -> ModelError:
    """The cache keeps no NaN, for its neighbours' sake: what was read then is not what is there."""
    adapter = job.request.model.adapter
    name = "the base" if adapter is None else f"adapter {adapter!r}"
    return ModelError(
        f"weights must give numbers; those of {name} "
        "gave NaN or infinity: they have diverged, sample from an earlier state"
    )


def most_tokens(backbone: Backbone, request: Request) -> int:
    """Tokens that each sample may have.

    Raises:
        DataError: the prompt, or it and what is asked for, is longer than the model's context.
    """
    asked, length, context = request.settings.max_tokens, request.prompt.length, backbone.context
    if not request.samples and (context is None or length <= context):
        return 1
    if context is None:
        return asked or MOST_TOKENS
    if length + (asked or 1) > context:
        wanted = f" and {asked} new ones" if asked else ""
        raise DataError(
            f"a prompt and what is sampled must fit into the model's context of {context} tokens; "
            f"this asks for {length}{wanted}: shorten it, or lower max_tokens",
            request.prompt.origin,
        )
    return asked or min(MOST_TOKENS, context - length)

"""One rank's half of the engine: owns the models, the gradients, the optimisers, the sampler."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from plait.datasets.decoding import Decoder
from plait.encoders import weights
from plait.errors import UnknownNameError
from plait.modalities import Limits
from plait.trainer import checkpoint
from plait.trainer.base import Base
from plait.trainer.build import Built, attach, load_base, trains_language
from plait.trainer.engine import commands
from plait.trainer.engine.ahead import Ahead
from plait.trainer.engine.computing import Slice, compute
from plait.trainer.engine.dropouts import adapter_dropouts
from plait.trainer.engine.idle import Idle
from plait.trainer.engine.run_state import check, restore, state_of
from plait.trainer.engine.runs import Run
from plait.trainer.lora import remove_lora
from plait.trainer.ranks.group import ALONE, Group, OutOfStepError
from plait.trainer.ranks.sharding import refuse_unsharded
from plait.trainer.sampling.requests import Generated, Job, PromptScores, Request
from plait.trainer.sampling.sampler import Sampler
from plait.trainer.source import Source
from plait.trainer.spec import ModelSpec
from plait.trainer.views import frozen_view


class View:
    """Weights that only sample, and how many requests still need them."""

    def __init__(self, built: Built) -> None:
        for dropout in adapter_dropouts(built):  # switched with its run, and it has none
            dropout.training = False
        self.built = built
        self.sampling = 0
        self.dropped = False


class Executor:
    """Executes commands one at a time, in the order given.

    A command that fails leaves weights, gradients and optimisers as they were.

    Args:
        sampler_bytes: Memory for the keys and values of what is sampled, on each language model.
        group: The ranks that do the same commands.
    """

    def __init__(self, sampler_bytes: int, group: Group = ALONE) -> None:
        self.runs: dict[str, Run] = {}
        self.views: dict[str, View] = {}
        self.bases: dict[commands.BaseKey, Base] = {}
        """Language models that several runs may share; each goes with the last of its users."""

        self.forgotten: list[commands.BaseKey] = []
        """Bases that the other ranks still have."""

        self.lend: Callable[[commands.BaseKey], None] = lambda _: None
        """Is called before a sharded base is read."""

        self.group = group
        self._sampler_bytes = sampler_bytes
        self._decoder = Decoder()
        self.ahead = Ahead(self._decoder)
        self.idle = Idle()
        self._samplers: dict[int, Sampler] = {}
        """By the identity of the language model's backbone."""

        self._jobs: dict[str, tuple[Sampler, Job]] = {}
        """Requests that may be cancelled, by name."""

    def execute(self, command: commands.Command) -> Any:
        """Do what is not sampled."""
        return _HANDLERS[type(command)](self, command)

    def run(self, name: str) -> Run:
        """
        Raises:
            UnknownNameError: it was dropped, or never was.
        """
        if name not in self.runs:
            raise UnknownNameError("run", name, self.runs)
        self.idle.used(self.runs[name])
        return self.runs[name]

    def view(self, name: str) -> View:
        """
        Raises:
            UnknownNameError: it was dropped, or never was.
        """
        if name not in self.views or self.views[name].dropped:
            raise UnknownNameError("snapshot", name, self.views)
        return self.views[name]

    def create_run(self, command: commands.CreateRun) -> Built:
        built = self._built(command.spec, command.seed, command.limits, command.run, trains=True)
        self.runs[command.run] = Run(command.run, built, self.group)
        return built

    def create_view(self, command: commands.CreateView) -> Built:
        built = self._built(command.spec, 0, command.limits, command.view, trains=False)
        self.views[command.view] = View(built)
        return built

    def load_view(self, name: str, source: Source) -> None:
        """Give a view the weights of a checkpoint."""
        with source.reading() as folder:
            checkpoint.load(folder, self.view(name).built, with_state=False)

    def _built(
        self, spec: ModelSpec, seed: int, limits: Limits, name: str, *, trains: bool
    ) -> Built:
        alone = trains_language(spec)
        if self.group.sharded:
            refuse_unsharded(spec)
        base = load_base(spec, self.group.device) if alone else self._base(spec)
        adapter = "default" if alone else name
        with self._released_if_it_fails(base, adapter):
            built = attach(base, spec, seed, limits, trains=trains, adapter=adapter)
            backbone = built.model.backbone
            if self.group.sharded and not backbone.sharded and (trains or not alone):
                backbone.shard(self.group)
                if alone:
                    self.bases[(name,)] = base
                if self.group.rank == 0:
                    key = next(key for key, held in self.bases.items() if held is base)
                    backbone.before_read = partial(self.lend, key)
        for encoder in built.model.encoders:
            built.model.media_encoder(encoder).headers = self._decoder.header
        return built

    @contextmanager
    def _released_if_it_fails(self, base: Base, adapter: str) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._release(base, adapter)
            raise

    def _base(self, spec: ModelSpec) -> Base:
        """The language model, which runs of equal settings share."""
        again = "language" if "language" in spec.checkpointing else ""
        language, quantize = str(weights.resolve(spec.language)), spec.quantize or ""
        key = (language, spec.dtype, quantize, spec.attention, again)
        if key not in self.bases:
            self.bases[key] = load_base(spec, self.group.device)
        return self.bases[key]

    def drop_run(self, command: commands.DropRun) -> None:
        run = self.runs.pop(command.run, None)
        self.idle.forget(command.run)
        if run is not None:
            self._release(run.built.base, run.model.adapter)

    def take_view(self, command: commands.TakeView) -> Built:
        built = frozen_view(self.run(command.run).built, command.view)
        self.views[command.view] = View(built)
        return built

    def save_view(self, command: commands.SaveView) -> str:
        built = self.view(command.view).built
        return command.store.save(
            command.place, lambda folder: checkpoint.write(folder, built, None, {}), overwrite=True
        )

    def drop_view(self, command: commands.DropView) -> None:
        view = self.views.get(command.view)
        if view is not None:
            view.dropped = True
            self._forget_if_idle(command.view, view)

    def _forget_if_idle(self, name: str, view: View) -> None:
        if view.dropped and not view.sampling:
            self.views.pop(name, None)
            backbone = view.built.model.backbone
            sampler = self._samplers.get(id(backbone))
            if sampler is not None:
                sampler.forget(view.built.model)
            self._release(view.built.base, view.built.model.adapter)

    def _release(self, base: Base, adapter: str | None) -> None:
        """Take an adapter off the language model that others go on with."""
        backbone = base.backbone
        if adapter is not None and backbone.shared is not None:
            remove_lora(backbone.language, adapter)
            backbone.adapters_changed()
        models = [run.model for run in self.runs.values()]
        models += [view.built.model for view in self.views.values()]
        if all(model.backbone is not backbone for model in models):
            self._samplers.pop(id(backbone), None)
            if self.group.rank == 0:  # the other ranks are told
                keys = [key for key, held in self.bases.items() if held is base]
                self.forget(commands.Forget(keys))
                self.forgotten += keys

    def forget(self, command: commands.Forget) -> None:
        for key in command.bases:
            self.bases.pop(key, None)

    def begin(self, command: commands.Begin) -> None:
        self.run(command.run).begin(command.passes)

    def compute(self, command: commands.Compute) -> list[list[commands.DocumentResult]]:
        """One row of micro-batches; see `computing`."""
        slices = [
            Slice(
                self.run(one.run),
                one.documents,
                one.objective,
                one.backward,
                one.place,
                one.inputs,
                one.behind,
                one.everywhere,
            )
            for one in command.row
        ]
        beside = self.run(command.beside) if self.group.sharded else None
        self.idle.row_done()
        return compute(
            slices, self.ahead.load, self.group, backward=command.backward, beside=beside
        )

    def finish(self, command: commands.Finish) -> None:
        self.run(command.run).finish()

    def abandon(self, command: commands.Abandon) -> None:
        self.run(command.run).abandon(command.reason)

    def optim_step(self, command: commands.OptimStep) -> dict[str, float]:
        return self.run(command.run).step(command.settings, command.divide_by_weight)

    def gather(self, command: commands.Gather, cursor: Any = None) -> checkpoint.Snapshot:
        """A run as it is, in memory, on rank 0 alone; collective."""
        run = self.run(command.run)
        state = None if command.weights_only else state_of(run, cursor=cursor)
        if self.group.rank == 0:
            return checkpoint.Snapshot(checkpoint.weights_of(run.built), state)
        if run.sharded:
            checkpoint.lend_weights(run.built)
        return checkpoint.Snapshot({}, None)

    def write_state(self, command: commands.SaveState, snapshot: checkpoint.Snapshot) -> str:
        """Keep what was gathered; its digest."""
        built = self.run(command.run).built
        return command.store.save(
            command.place,
            lambda folder: checkpoint.write(
                folder, built, snapshot.state, command.metadata, snapshot.weights
            ),
            overwrite=command.overwrite,
            ttl_seconds=command.ttl_seconds,
        )

    def restore(self, command: commands.Restore) -> None:
        run = self.run(command.run)
        checkpoint.put_weights(run.built, command.snapshot.weights)
        run.clear()
        run.failure = None
        if run.spoilt is not None:  # so are what its optimiser remembers
            run.spoilt, run.optimizer = None, None
        if command.snapshot.state is not None:
            restore(run, command.snapshot.state)

    @torch.no_grad()
    def lend_shards(self, command: commands.Lend) -> None:
        backbone = self.bases[command.base].backbone
        rows = backbone.spare()
        with backbone.adapters_of(rows):
            backbone.read(rows)

    def read_state(self, command: commands.LoadState) -> checkpoint.Snapshot:
        """What `restore` will put into the run; refused where it does not fit."""
        run, with_state = self.run(command.run), command.with_optimizer
        with command.source.reading() as folder:
            snapshot = checkpoint.read(folder, run.built, with_state=with_state)
            if with_state:
                check(run, folder, snapshot.state)
        return snapshot

    def sample(self, command: commands.Sample, future: "Future[Any]") -> None:
        """Hand a request to the sampler; its future is done in a later step."""
        view = self.view(command.view)
        built = view.built
        request = Request(
            built.model,
            built.tokenizer,
            built.layout,
            command.prompt,
            self.ahead.load(command.prompt, built),
            command.settings,
            command.samples,
            owner=command.view,
            prompt_logprobs=command.prompt_logprobs,
            top_prompt_logprobs=command.top_prompt_logprobs,
            on_token=command.on_token,
        )

        def ended() -> None:
            self._jobs.pop(command.request, None)
            view.sampling -= 1
            self._forget_if_idle(command.view, view)

        def done(rows: list[Generated], scores: PromptScores | None) -> None:
            ended()
            future.set_result(commands.Sampled(rows, scores))

        def failed(error: BaseException) -> None:
            ended()
            future.set_exception(error)

        sampler = self._sampler(built)
        job = sampler.add(request, done, failed)
        view.sampling += 1
        if command.request:
            self._jobs[command.request] = sampler, job

    def cancel_sample(self, command: commands.CancelSample) -> None:
        if command.request in self._jobs:
            sampler, job = self._jobs[command.request]
            sampler.cancel(job)

    def _sampler(self, built: Built) -> Sampler:
        backbone = built.model.backbone
        if id(backbone) not in self._samplers:
            slots = max(1, self._sampler_bytes // backbone.slot_bytes)
            self._samplers[id(backbone)] = Sampler(backbone, slots=slots)
        return self._samplers[id(backbone)]

    @property
    def sampling(self) -> bool:
        """Whether `sample_step` has something to do."""
        return any(sampler.busy for sampler in self._samplers.values())

    def sample_step(self) -> None:
        """One step of each language model's sampler."""
        for sampler in list(self._samplers.values()):
            if sampler.busy:
                try:
                    sampler.step()
                except Exception as error:  # what nobody foresaw: its requests end, runs go on
                    sampler.fail(error)
                    if isinstance(error, OutOfStepError):
                        raise

    def release_memory(self) -> bool:
        """Take back what samplers keep and do not need: training and sampling share one memory."""
        found = [sampler.release() for sampler in self._samplers.values()]
        if any(found) and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return any(found)

    def fail_samples(self, error: BaseException) -> None:
        """End all requests that are under way."""
        for sampler in self._samplers.values():
            sampler.fail(error)

    def prepare(self, command: commands.Command) -> None:
        """Decode a command's media before its turn; from any thread.

        Rows that several ranks share out are decoded where they are computed.
        """
        holder: Run | View | None = None
        if isinstance(command, commands.Sample):
            holder = self.views.get(command.view)
        elif isinstance(command, commands.ForwardBackward) and self.group.size == 1:
            holder = self.runs.get(command.run)
        if holder is not None:
            self.ahead.queue(command, holder.built)


_HANDLERS: dict[type, Callable[[Executor, Any], Any]] = {
    commands.CreateRun: Executor.create_run,
    commands.DropRun: Executor.drop_run,
    commands.Begin: Executor.begin,
    commands.Compute: Executor.compute,
    commands.Finish: Executor.finish,
    commands.Abandon: Executor.abandon,
    commands.OptimStep: Executor.optim_step,
    commands.TakeView: Executor.take_view,
    commands.CreateView: Executor.create_view,
    commands.SaveView: Executor.save_view,
    commands.DropView: Executor.drop_view,
    commands.CancelSample: Executor.cancel_sample,
    commands.Gather: Executor.gather,
    commands.Restore: Executor.restore,
    commands.Lend: Executor.lend_shards,
    commands.Forget: Executor.forget,
}

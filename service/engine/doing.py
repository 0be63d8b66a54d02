"""What the engine's process does for each message; started by the server.

python -m plait.service.engine.doing DESCRIPTOR
"""

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch

from plait.errors import ConfigError
from plait.modalities import Limits
from plait.primitives.custom import weighted_by
from plait.primitives.documents import documents_of, prompt_of
from plait.primitives.objectives import objective_of
from plait.primitives.sampling import sample_response, settings_of
from plait.primitives.training import forward_backward_output
from plait.service.engine import answering
from plait.service.engine.frames import Channel, Header
from plait.service.engine.graphs import Graph
from plait.service.engine.worker import Answer, Apart, Does, Hosted, Worker, then, told
from plait.service.wire import sampling as wire_sampling
from plait.service.wire import training as wire_training
from plait.trainer.build import Built, parameter_counts
from plait.trainer.engine import commands
from plait.trainer.optimiser import StepSettings
from plait.trainer.places import Place
from plait.trainer.source import Source
from plait.trainer.store import Store
from plait.trainer.strict import spec_from


def create(worker: Worker, header: Header, _: bytes) -> Answer:
    """A run, with the weights of a checkpoint where one is named, those that its model is offered
    with, or the state that was kept."""
    scope, spec = header["scope"], spec_from(header["spec"])
    name, built = worker.engine.create_run(spec, header["seed"], Limits())
    more: Header = {}
    try:
        if header.get("kept") is not None:
            source = Source(worker.kept, Place(scope, "weights", header["kept"]).path)
            worker.engine.submit(commands.LoadState(name, source, True)).result()
        elif header.get("weights") is not None:
            source = Source(worker.store, header["weights"])
            worker.engine.submit(commands.LoadState(name, source, False)).result()
        elif header.get("path") is not None:
            source = Source(worker.store, header["path"])
            loading = commands.LoadState(name, source, header["optimizer"])
            more = {"path": header["path"], "cursor": worker.engine.submit(loading).result()}
    except BaseException:
        worker.engine.finish(commands.DropRun(name))
        raise
    worker.hosted[scope] = Hosted(name, built)
    kind = "load_weights" if more else "create_model"
    return {"result": {"type": kind, "model_id": scope, **more, **facts(built)}}, b""


def facts(built: Built) -> Header:
    backbone = built.base.backbone
    lora = built.spec.lora if built.lora is not None else None
    return {
        "arch": backbone.language.config.model_type,
        "tokenizer_id": built.tokenizer.name_or_path,
        "context": backbone.context,
        "is_lora": lora is not None,
        "lora_rank": lora.rank if lora is not None else None,
        "trainable": {
            part: number["trainable"] for part, number in parameter_counts(built.model).items()
        },
    }


def drop(worker: Worker, header: Header, _: bytes) -> Answer:
    hosted = worker.hosted.pop(header["scope"], None)
    if hosted is not None:
        view = header.get("what") == "sampler"
        command = commands.DropView(hosted.name) if view else commands.DropRun(hosted.name)
        worker.engine.finish(command)
    return {"result": {}}, b""


def forward_backward(
    worker: Worker, header: Header, body: bytes
) -> "Answer | Future[Answer] | Apart":
    """Where it cannot begin, the next step refuses once, as where it fails on its way."""
    hosted = worker.held(header["scope"])

    def begin() -> "Future[Answer]":
        try:
            return _forward_backward(worker, header, body, hosted)
        except Exception as error:
            if not header["forward"]:
                worker.engine.submit(commands.Abandon(hosted.name, told(error)))
            raise

    return Apart(begin) if "graph" in header else begin()


def _forward_backward(
    worker: Worker, header: Header, body: bytes, hosted: Hosted
) -> "Future[Answer]":
    call = wire_training.call_of(wire_training.parsed(body), worker.uploaded(header))
    if call.loss == wire_training.CUSTOM:
        return _custom(worker, header, hosted, call)
    numbers = {name: value for name, value in call.config.items() if not isinstance(value, str)}
    if len(numbers) < len(call.config):
        odd = next(name for name in call.config if name not in numbers)
        raise ConfigError(f"the setting {odd!r} of loss {call.loss!r} must be a number")
    objective = objective_of(call.loss, numbers)
    documents = list(documents_of(call.data, hosted.built, objective))
    future = worker.engine.forward_backward(
        hosted.name, documents, objective, backward=call.backward, everywhere=True
    )
    return then(future, lambda done: _trained(forward_backward_output(done)))


def _trained(output: Any) -> Answer:
    return {"kind": "proto"}, wire_training.answer_to(output)


def _custom(
    worker: Worker, header: Header, hosted: Hosted, call: wire_training.Call
) -> "Future[Answer]":
    """A forward pass, the uploaded graph, and the cross entropy that has its gradient."""
    graph = Graph.of(header["graph"])
    objective = objective_of("cross_entropy", None)
    plain = graph.plain(call)
    documents = list(documents_of(plain, hosted.built, objective))
    rows = worker.engine.forward_backward(hosted.name, documents, objective, backward=False)
    read = forward_backward_output(rows.result())
    logprobs = [row["logprobs"].to_torch() for row in read.loss_fn_outputs]
    if not call.backward:
        loss, metrics, _ = graph.losses(call, logprobs)
        read.metrics.update({**metrics, "loss:sum": loss})
        done: Future[Answer] = Future()
        done.set_result(_trained(read))
        return done
    loss, metrics, derivatives = graph.losses(call, logprobs)
    weighted = weighted_by(plain, derivatives)
    documents = list(documents_of(weighted, hosted.built, objective))
    future = worker.engine.forward_backward(hosted.name, documents, objective)

    def told_of(results: Any) -> Answer:
        output = replace(forward_backward_output(results), loss_fn_outputs=read.loss_fn_outputs)
        surrogate = output.metrics["loss:sum"]
        output.metrics.update({**metrics, "loss:sum": loss, "surrogate_loss:sum": surrogate})
        return _trained(output)

    return then(future, told_of)


def optim_step(worker: Worker, header: Header, _: bytes) -> "Future[Answer]":
    hosted = worker.held(header["scope"])
    settings = StepSettings(**header["params"])
    command = commands.OptimStep(hosted.name, settings, header.get("divide_by_weight", False))
    return then(
        worker.engine.submit(command),
        lambda metrics: ({"result": {"metrics": _named(metrics)}}, b""),
    )


def _named(metrics: dict[str, float]) -> dict[str, float]:
    """With a reduction in each name, as clients require."""
    return {name if ":" in name else f"{name}:mean": value for name, value in metrics.items()}


def abandon(worker: Worker, header: Header, _: bytes) -> "Future[Answer]":
    """What a failed forward_backward leaves: the next step refuses once."""
    command = commands.Abandon(worker.held(header["scope"]).name, header["reason"])
    return then(worker.engine.submit(command), lambda _: ({"result": {}}, b""))


def save(worker: Worker, header: Header, _: bytes) -> "Future[Answer]":
    """A checkpoint that the user names."""
    hosted, place = worker.held(header["scope"]), Place.of(header["path"])
    metadata = {**header["metadata"], OPERATION: header["operation"]}
    command = commands.SaveState(
        hosted.name,
        worker.store,
        place,
        weights_only=place.kind != "weights",
        overwrite=header["overwrite"] or _is_of(worker.store, place, header["operation"]),
        ttl_seconds=header.get("ttl_seconds"),
        metadata=metadata,
        cursor=header.get("cursor"),
    )
    return then(
        worker.engine.submit(command),
        lambda digest: (
            {"result": {"path": place.path, "digest": digest}, **_entry(worker.store, place)},
            b"",
        ),
    )


OPERATION = "plait_operation"
"""In a manifest: which operation saved it, so that it may be done again after a crash."""


def _is_of(store: Store, place: Place, operation: str) -> bool:
    entry = store.entry(place)
    if entry is None:
        return False
    return bool(entry.manifest.get("user_metadata", {}).get(OPERATION) == operation)


def _entry(store: Store, place: Place) -> Header:
    entry = store.entry(place)
    assert entry is not None, "it was written just now"
    return {"size": entry.size, "expires_at": entry.lifetime.expires_at}


def load(worker: Worker, header: Header, _: bytes) -> "Future[Answer]":
    source = Source(worker.store, header["path"])
    command = commands.LoadState(
        worker.held(header["scope"]).name, source, header.get("optimizer", False)
    )
    return then(
        worker.engine.submit(command),
        lambda cursor: ({"result": {"path": header["path"], "cursor": cursor}}, b""),
    )


def keep(worker: Worker, header: Header, _: bytes) -> "Future[Answer]":
    """A state to go on from after a crash."""
    place = Place(header["scope"], "weights", header["name"])
    hosted = worker.held(header["scope"])
    command = commands.SaveState(hosted.name, worker.kept, place, overwrite=True)
    return then(worker.engine.submit(command), lambda _: ({"result": {}}, b""))


def forget(worker: Worker, header: Header, _: bytes) -> Answer:
    """States that newer ones have replaced, and weights of samplers that are closed."""
    paths = [*header["paths"], *_older(worker, header["scope"], header.get("below", 0))]
    for path in paths:
        try:
            worker.kept.delete(Place.of(path))
        except ConfigError:  # it is gone already
            continue
    return {"result": {}}, b""


def _older(worker: Worker, run: str, number: int) -> list[str]:
    """Kept states of a run before that of an operation's number."""
    if not number:
        return []
    folder = Place(run, "weights", str(number)).under(worker.kept.root).parent
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    older = [name for name in names if name.isdigit() and int(name) < number]
    return [Place(run, "weights", name).path for name in older]


def take_view(worker: Worker, header: Header, _: bytes) -> Answer:
    """A sampler of the run as it is now."""
    view = worker.engine.new_name("view")
    hosted = worker.held(header["scope"])
    built = worker.engine.submit(commands.TakeView(hosted.name, view)).result()
    worker.hosted[header["sampler"]] = Hosted(view, built)
    return {"result": {"sampling_session_id": header["sampler"]}}, b""


def open_view(worker: Worker, header: Header, _: bytes) -> Answer:
    """A sampler of a model that is offered, of a checkpoint, or of weights that were kept."""
    scope = header["scope"]
    if scope in worker.hosted:
        return {"result": {}}, b""
    store = worker.kept if header.get("kept") else worker.store
    path = header.get("path") or header.get("weights")
    source = None if path is None else Source(store, path)
    spec = header.get("spec") or {}
    if not spec and source is not None:
        with source.reading() as folder:
            spec = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["spec"]
    view, built = worker.engine.create_view(spec_from(spec), source, Limits())
    worker.hosted[scope] = Hosted(view, built)
    return {"result": facts(built)}, b""


def keep_view(worker: Worker, header: Header, _: bytes) -> "Future[Answer]":
    """A sampler's weights, on the disk."""
    place = Place.of(header["path"])
    command = commands.SaveView(worker.held(header["scope"]).name, worker.kept, place)
    return then(worker.engine.submit(command), lambda _: ({"result": {}}, b""))


def sample(worker: Worker, header: Header, body: bytes) -> "Future[Answer]":
    hosted = worker.held(header["scope"])
    call = wire_sampling.call_from_json(json.loads(body), worker.uploaded(header))
    tokens = _tokens_of(worker, header) if header.get("stream") else None
    command = commands.Sample(
        hosted.name,
        prompt_of(call.prompt, hosted.built),
        settings_of(call.params, header["seed"], hosted.built),
        call.samples,
        call.prompt_logprobs or call.top_prompt_logprobs > 0,
        call.top_prompt_logprobs,
        on_token=tokens,
        request=header["operation"],
    )
    top = call.top_prompt_logprobs > 0
    return then(
        worker.engine.submit(command),
        lambda done: (
            {"kind": "proto"},
            wire_sampling.answer_to(sample_response(done, top), call),
        ),
    )


def _tokens_of(worker: Worker, header: Header) -> Callable[[int, int, float], None]:
    def tell(sequence: int, token: int, logprob: float) -> None:
        worker.send(
            {"event": "token", "of": header["id"], "sequence": sequence, "token": token,
             "logprob": logprob}
        )  # fmt: skip

    return tell


def cancel(worker: Worker, header: Header, _: bytes) -> Answer:
    hosted = worker.hosted.get(header["sampler"])
    if hosted is not None:
        worker.engine.discard(commands.CancelSample(hosted.name, header["operation"]))
    return {"result": {}}, b""


def check_loss(worker: Worker, header: Header, _: bytes) -> Answer:
    """Whether a traced loss has allowed operations alone."""
    del worker
    Graph.of(header["graph"])
    return {"result": {"type": "create_custom_loss", "loss_id": header["loss_id"]}}, b""


def delete(worker: Worker, header: Header, _: bytes) -> Answer:
    """A checkpoint; one that is gone already is as it should be."""
    with contextlib.suppress(ConfigError):
        worker.store.delete(Place.of(header["path"]))
    return {"result": {}}, b""


def set_ttl(worker: Worker, header: Header, _: bytes) -> Answer:
    place = Place.of(header["path"])
    worker.store.set_ttl(place, header["ttl_seconds"])
    return {"result": _entry(worker.store, place)}, b""


DOES: Does = {
    "create": create,
    "drop": drop,
    "forward_backward": forward_backward,
    "optim_step": optim_step,
    "abandon": abandon,
    "save": save,
    "load": load,
    "keep": keep,
    "forget": forget,
    "take_view": take_view,
    "open_view": open_view,
    "keep_view": keep_view,
    "sample": sample,
    "cancel": cancel,
    "chat": answering.chat,
    "context": answering.context,
    "check_media": answering.check_media,
    "render": answering.render_sample,
    "tokenizer": answering.tokenizer,
    "check_loss": check_loss,
    "delete": delete,
    "set_ttl": set_ttl,
}


def main() -> None:
    # systemd tells all processes of a service, and the server ends this one when all is done. Not
    # SIG_IGN, which processes of its own would inherit.
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: None)
    connection = socket.socket(fileno=int(sys.argv[1]))
    channel = Channel(connection)
    message = channel.receive()
    if message is None:
        return
    options, _ = message
    if options.get("threads"):
        torch.set_num_threads(options["threads"])
    Worker(channel, options, DOES).run()
    os._exit(0)  # nothing here may keep a process alive whose server is gone


if __name__ == "__main__":
    main()

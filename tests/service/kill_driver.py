"""Clients that train several runs at once over plain HTTP while their server is killed.

What each run is asked depends on its number and on the operation's number alone, so that another
server, which nobody kills, can be asked the same.
"""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from plait.service.wire import tinker_pb2 as pb
from plait.service.wire.sampling import answer_of as samples_of
from plait.service.wire.training import answer_of, request_of
from plait.types import TensorData

ROUND = 8
"""Operations of a round: two forward_backward, a step, another pair of them, a sampler, a forward
pass without a backward one, and a checkpoint in each second round."""

WINDOW = 12
"""Promises of a run that are waited for at once."""

VOCABULARY = 300
ADAM = {"learning_rate": 1e-4, "eps": 1e-2, "grad_clip_norm": 0.0}
"""Small steps, and `eps` far above round-off in the gradients: rows that are shared with other runs
add up in another order, which larger steps would blow up within a few rounds."""

AGAIN = (429, 500, 502, 503, 504)
UNACKNOWLEDGED = (429, 503)


@dataclass(frozen=True)
class Asked:
    """One operation of a run."""

    kind: str
    path: str
    body: Any


Given = tuple[list[Any], dict[str, TensorData]]
"""Chunks, and what the loss reads."""


def data_of(run: int, seq: int) -> list[Given]:
    drawn = np.random.default_rng([run, seq])
    data: list[Given] = []
    for _ in range(int(drawn.integers(1, 4))):
        tokens = drawn.integers(3, VOCABULARY, int(drawn.integers(6, 20)))
        inputs = {
            "target_tokens": TensorData.from_numpy(tokens[1:].astype(np.int64)),
            "weights": TensorData.from_numpy(np.ones(len(tokens) - 1, np.float32)),
        }
        text = pb.EncodedTextChunk(tokens=tokens[:-1].astype("<i4").tobytes())
        data.append(([pb.Chunk(encoded_text=text)], inputs))
    return data


def asked_of(model: str, run: int, seq: int) -> Asked:
    """What `seq` of a run is; 0 is its creation."""
    number, place = divmod(seq - 1, ROUND)
    if place in (0, 1, 3, 6):
        message = request_of(
            model, seq, data_of(run, seq), "cross_entropy", {}, backward=place != 6
        )
        return Asked("forward" if place == 6 else "learn", "forward_backward",
                     message.SerializeToString())  # fmt: skip
    if place in (2, 4):
        return Asked("step", "optim_step", {"model_id": model, "seq_id": seq, "adam_params": ADAM})
    if place == 5 or number % 2:
        body = {"model_id": model, "seq_id": seq, "sampling_session_seq_id": run * 100_000 + seq}
        return Asked("view", "save_weights_for_sampler", body)
    body = {"model_id": model, "seq_id": seq, "path": f"s{seq}"}
    return Asked("save", "save_weights", body)


@dataclass
class Told:
    """What came of everything that was promised."""

    promises: dict[tuple[str, int], str] = field(default_factory=dict)
    results: dict[str, bytes] = field(default_factory=dict)
    """By request."""

    kinds: dict[str, str] = field(default_factory=dict)
    rounds: list[int] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    last: list[bytes] = field(default_factory=list)
    """Of each run, a forward pass of a run that was made from its last checkpoint."""


class Clients:
    """Several runs on one server.

    Args:
        rounds: Of each run; None until `stop` is set.
    """

    def __init__(self, url: str, runs: int, rounds: list[int] | None = None, seed: int = 0) -> None:
        self._rounds, self._runs = rounds, runs
        self._random = random.Random(seed)
        limits = httpx.Limits(max_connections=400)
        self._http = httpx.AsyncClient(
            base_url=f"{url}/api/v1/", timeout=40, trust_env=False, limits=limits
        )
        self.told = Told(rounds=[0] * runs, models=[""] * runs, last=[b""] * runs)
        self.stop = asyncio.Event()
        self.doing: Counter[str] = Counter()
        self.resent = 0

    async def run(self) -> Told:
        async with self._http:
            session = (await self.post("create_session", {"sdk_version": "0.38.0"}))["session_id"]
            await asyncio.gather(*(self._train(session, run) for run in range(self._runs)))
            await self._check_again()
            return self.told

    # One run

    async def _train(self, session: str, run: int) -> None:
        model = f"{session}:train:{run}"
        self.told.models[run] = model
        lora = {"rank": 4, "seed": run}
        create = {"session_id": session, "model_seq_id": run, "base_model": "tiny",
                  "lora_config": lora}  # fmt: skip
        await self._result(await self._promise(model, 0, Asked("create", "create_model", create)))
        window, collecting, number = asyncio.Semaphore(WINDOW), set[asyncio.Task[None]](), 0
        while number < self._rounds[run] if self._rounds is not None else not self.stop.is_set():
            order = list(range(1, ROUND + 1))
            if self._random.random() < 0.5:  # chunks come in any order
                order[0], order[1] = order[1], order[0]
            for place in order:
                await window.acquire()
                seq = number * ROUND + place
                asked = asked_of(model, run, seq)
                name = await self._promise(model, seq, asked)
                task = asyncio.create_task(self._collect(window, session, run, seq, asked, name))
                collecting.add(task)
            number += 1
            for task in [task for task in collecting if task.done()]:
                collecting.discard(task)
                task.result()
        await asyncio.gather(*collecting)
        self.told.rounds[run] = number
        await self._end(session, run, model, number * ROUND + 1)

    async def _collect(
        self, window: asyncio.Semaphore, session: str, run: int, seq: int, asked: Asked, name: str
    ) -> None:
        try:
            await self._result(name)
        finally:
            window.release()
        if asked.kind == "save":
            self.told.saved.append(f"tinker://{session}:train:{run}/weights/s{seq}")
        if asked.kind == "view":
            sampler = f"{session}:sample:{run * 100_000 + seq}"
            await self._sample(sampler, 0, run)
            # Much later, when the run has gone on, it still has the weights that it had.
            await asyncio.sleep(self._random.random() * 4)
            await self._sample(sampler, 1, run)

    async def _sample(self, sampler: str, seq: int, run: int) -> None:
        body = {
            "sampling_session_id": sampler, "seq_id": seq, "num_samples": 1,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(range(5, 20 + run))}]},
            "sampling_params": {"max_tokens": 4, "temperature": 1.0}, "prompt_logprobs": True,
        }  # fmt: skip
        await self._result(await self._promise(sampler, seq, Asked("sample", "asample", body)))

    async def _end(self, session: str, run: int, model: str, seq: int) -> None:
        """The last checkpoint, and what a run that is made from it computes."""
        body = {"model_id": model, "seq_id": seq, "path": "last"}
        await self._result(await self._promise(model, seq, Asked("save", "save_weights", body)))
        self.told.saved.append(f"tinker://{model}/weights/last")
        self.told.last[run] = await self.loaded(session, 1000 + run, self.told.saved[-1])

    async def loaded(self, session: str, number: int, path: str) -> bytes:
        body = {"session_id": session, "model_seq_id": number, "path": path, "optimizer": True}
        model = f"{session}:train:{number}"
        await self._result(await self._promise(model, 0, Asked("load", "load_weights", body)))
        message = request_of(model, 1, data_of(7, 7), "cross_entropy", {}, backward=False)
        asked = Asked("last", "forward_backward", message.SerializeToString())
        return await self._result(await self._promise(model, 1, asked))

    # Requests

    async def post(self, path: str, body: Any) -> Any:
        """Until the server takes it."""
        while True:
            self.doing["accepting"] += 1
            try:
                if isinstance(body, bytes):
                    headers = {"content-type": "application/x-protobuf"}
                    response = await self._http.post(path, content=body, headers=headers)
                else:
                    response = await self._http.post(path, json=body)
            except httpx.TransportError:
                self.resent += 1
                await asyncio.sleep(0.25)
                continue
            finally:
                self.doing["accepting"] -= 1
            if response.status_code not in UNACKNOWLEDGED:
                assert response.is_success, f"{path}: {response.status_code} {response.text}"
                return response.json()
            await asyncio.sleep(0.2)

    async def _promise(self, scope: str, seq: int, asked: Asked) -> str:
        name: str = (await self.post(asked.path, asked.body))["request_id"]
        known = self.told.promises.setdefault((scope, seq), name)
        assert known == name, f"{scope} {seq} was promised twice"
        self.told.kinds[name] = asked.kind
        if self._random.random() < 0.05:  # as a client does whose answer was lost on the way
            again = (await self.post(asked.path, asked.body))["request_id"]
            assert again == name, f"{scope} {seq} was promised again under another name"
        return name

    async def _result(self, name: str) -> bytes:
        self.doing["computing"] += 1
        try:
            content = await self._retrieved(name)
        finally:
            self.doing["computing"] -= 1
        before = self.told.results.setdefault(name, content)
        assert before == content, f"request {name} has two results"
        return content

    async def _retrieved(self, name: str) -> bytes:
        while True:
            try:
                request = self._http.build_request(
                    "POST", "retrieve_future", json={"request_id": name}
                )
                response = await self._http.send(request, stream=True)
                self.doing["delivering"] += 1
                try:
                    content = await response.aread()
                finally:
                    self.doing["delivering"] -= 1
                    await response.aclose()
            except httpx.TransportError:
                await asyncio.sleep(0.25)
                continue
            if response.status_code in (408, *AGAIN):
                await asyncio.sleep(0.25)
                continue
            kind = self.told.kinds[name]
            assert response.is_success, f"{kind}: {response.status_code} {content[:500]!r}"
            if response.headers["content-type"] == "application/json":
                assert "error" not in response.json(), f"{kind} {name}: {content[:500]!r}"
            return content

    async def _check_again(self) -> None:
        """Each result is there still, and is the same."""
        names = list(self.told.results)
        for start in range(0, len(names), 50):
            await asyncio.gather(*(self._result(name) for name in names[start : start + 50]))


def differences(one: Told, other: Told) -> dict[str, float]:
    """The largest relative difference of each kind's numbers, of all that both computed."""
    found: dict[str, float] = {}
    session, same = (told.models[0].split(":")[0] for told in (one, other))
    assert len(one.promises) == len(other.promises)
    for (scope, seq), name in one.promises.items():
        kind = one.kinds[name]
        mine = one.results[name]
        theirs = other.results[other.promises[scope.replace(session, same), seq]]
        for a, b in zip(_numbers(kind, mine), _numbers(kind, theirs), strict=True):
            apart = abs(a - b) / max(abs(a), abs(b), 1e-2)
            found[kind] = max(found.get(kind, 0.0), apart)
    return found


def _numbers(kind: str, content: bytes) -> list[float]:
    if kind in ("learn", "forward", "last"):
        output = answer_of(content)
        rows = [row["logprobs"].to_numpy().ravel() for row in output.loss_fn_outputs]
        return [output.metrics["loss:sum"], *np.concatenate(rows).tolist()]
    if kind == "sample":
        scores = samples_of(content).prompt_logprobs
        assert scores is not None
        return [score for score in scores if score is not None]
    if kind == "step":
        metrics: dict[str, float] = httpx.Response(200, content=content).json()["metrics"]
        return [metrics["grad_norm:mean"]]
    return []

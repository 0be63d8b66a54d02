"""A server under load: what one step costs beside forty runs, and that nothing is lost.

    python -m benchmarks.service --json

One `plait serve` with a tiny model, on loopback, and clients in this process.

- `step_ms`: a pipelined forward_backward and optim_step, sent and waited for, beside 40 runs;
  p50 of 200. `sample_ms`: a sample of four tokens; p50 of 200.
- `heartbeat_ms`: a heartbeat while 2,000 requests for results wait; p50 of 200.
- `load`: 20,000 samples from 64 clients. Each has one promise and one result, and the result is the
  token that the model gives that prompt; `growth` is how much more memory the server and its engine
  take after the second 10,000 than after the first.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch

from benchmarks.timing import machine
from plait.service.wire import sampling as wire_sampling
from plait.service.wire import training as wire
from plait.service.wire.chunks import text_to_proto
from plait.types import EncodedTextChunk, TensorData

RUNS, STEPS, WAITING, CLIENTS, REQUESTS = 40, 200, 2000, 64, 20_000
PROMPTS = 50
"""Different ones, whose first token is known."""

PORT = 8765


class Client:
    """The protocol, plainly."""

    def __init__(self, url: str, session: str = "") -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.url, self.session = url, session
        self.http = httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False)

    def another(self) -> "Client":
        """With connections of its own: httpx looks at all of a pool's for each request."""
        return Client(self.url, self.session)

    async def post(self, path: str, **options: Any) -> Any:
        while True:
            response = await self.http.post(f"/api/v1{path}", **options)
            if response.status_code not in (408, 429):
                response.raise_for_status()
                return response
            if response.status_code == 429:
                await asyncio.sleep(0.5)

    async def begin(self) -> None:
        self.session = (await self.post("/create_session", json={})).json()["session_id"]

    async def result(self, promise: Any) -> Any:
        body = {"request_id": promise["request_id"]}
        response = await self.post("/retrieve_future", json=body)
        if "json" in response.headers["content-type"] and "error" in response.json():
            raise AssertionError(response.text)
        return response

    async def new_run(self, number: int) -> str:
        body = {
            "session_id": self.session, "model_seq_id": number, "base_model": "tiny",
            "lora_config": {"rank": 4, "train_unembed": False},
        }  # fmt: skip
        promise = (await self.post("/create_model", json=body)).json()
        await self.result(promise)
        run: str = promise["model_id"]
        return run

    async def train(self, run: str, seq: int) -> Any:
        chunks = [text_to_proto(EncodedTextChunk((5, 6, 7, 8)))]
        inputs = {"target_tokens": TensorData(np.array([6, 7, 8, 9]), "int64")}
        message = wire.request_of(run, seq, [(chunks, inputs)], "cross_entropy", {}, backward=True)
        headers = {"content-type": "application/x-protobuf"}
        body = message.SerializeToString()
        return (await self.post("/forward_backward", content=body, headers=headers)).json()

    async def step(self, run: str, seq: int) -> Any:
        body = {"model_id": run, "seq_id": seq, "adam_params": {"learning_rate": 1e-4}}
        return (await self.post("/optim_step", json=body)).json()

    async def sampler(self, number: int) -> str:
        body = {
            "session_id": self.session, "sampling_session_seq_id": number, "base_model": "tiny",
        }  # fmt: skip
        said = (await self.post("/create_sampling_session", json=body)).json()
        name: str = said["sampling_session_id"]
        return name

    async def sample(self, sampler: str, seq: int, prompt: list[int], tokens: int) -> list[int]:
        body = {
            "sampling_session_id": sampler, "seq_id": seq, "num_samples": 1,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt}]},
            "sampling_params": {"max_tokens": tokens, "temperature": 0.0, "stop": []},
        }  # fmt: skip
        response = await self.result((await self.post("/asample", json=body)).json())
        return wire_sampling.answer_of(response.content).sequences[0].tokens


async def times(work: Callable[[int], Awaitable[Any]], count: int) -> float:
    """Median milliseconds of doing it so often, one after another."""
    found = []
    for number in range(count):
        begun = time.perf_counter()
        await work(number)
        found.append(1000 * (time.perf_counter() - begun))
    return round(float(np.median(found[count // 10 :])), 2)


async def steps(client: Client) -> dict[str, float]:
    runs = [await client.new_run(number) for number in range(RUNS)]

    async def one(number: int) -> None:
        run = runs[0]
        trained = await client.train(run, 2 * number + 1)
        stepped = await client.step(run, 2 * number + 2)
        await asyncio.gather(client.result(trained), client.result(stepped))

    sampler = await client.sampler(0)
    step_ms = await times(one, STEPS)
    sample_ms = await times(lambda n: client.sample(sampler, n, [5, 6, 7], 4), STEPS)
    return {"existing_runs": RUNS, "step_ms": step_ms, "sample_ms": sample_ms}


async def heartbeats(client: Client) -> dict[str, Any]:
    """2,000 requests wait for a run whose first operation does not come."""
    run = await client.new_run(RUNS)
    promises = [await client.step(run, seq) for seq in range(2, WAITING + 2)]
    crowd = client.another()
    waiting = [asyncio.create_task(crowd.result(promise)) for promise in promises]
    await asyncio.sleep(5)
    beat = {"session_id": client.session}
    p50 = await times(lambda _: client.post("/session_heartbeat", json=beat), STEPS)
    still = sum(not task.done() for task in waiting)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await crowd.http.aclose()
    return {"waiting": still, "heartbeat_ms": p50}


async def load(client: Client, memory: Callable[[], float]) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    prompts = [generator.integers(5, 200, 8).tolist() for _ in range(PROMPTS)]
    sampler = await client.sampler(1)
    right = [await client.sample(sampler, n, prompt, 1) for n, prompt in enumerate(prompts)]
    numbers = iter(range(REQUESTS))
    wrong = 0

    async def worker(name: int) -> int:
        nonlocal wrong
        own = client.another()
        mine, done = await own.sampler(2 + name), 0
        for number in numbers:
            which = number % PROMPTS
            wrong += await own.sample(mine, done, prompts[which], 1) != right[which]
            done += 1
            if number == REQUESTS // 2:
                halves.append(memory())
        await own.http.aclose()
        return done

    halves: list[float] = []
    begun = time.perf_counter()
    done = await asyncio.gather(*(worker(name) for name in range(CLIENTS)))
    seconds = time.perf_counter() - begun
    halves.append(memory())
    return {
        "requests": sum(done), "clients": CLIENTS, "lost": REQUESTS - sum(done), "wrong": wrong,
        "requests_a_second": round(REQUESTS / seconds, 1), "memory_mb": halves,
        "growth": round(halves[1] / halves[0] - 1, 4),
    }  # fmt: skip


def doubled(folder: Path) -> int:
    """Operations of the log that are not done exactly once."""
    import sqlite3

    with sqlite3.connect(folder / "plait.db") as database:
        (odd,) = database.execute(
            "select count(*) from operations where kind = 'sample' and "
            "(state not in ('done', 'gone') or attempts > 0)"
        ).fetchone()
    return int(odd)


async def measured(url: str, process: "subprocess.Popen[bytes]", folder: Path) -> dict[str, Any]:
    client = Client(url)
    await client.begin()
    server = psutil.Process(process.pid)

    def memory() -> float:
        every = [server, *server.children(recursive=True)]
        return round(sum(one.memory_info().rss for one in every) / 1e6, 1)

    found = {**await steps(client), **await heartbeats(client), "load": await load(client, memory)}
    found["load"]["not_done_once"] = doubled(folder)
    await client.http.aclose()
    return found


def save_tiny(folder: Path) -> str:
    """A random Llama of two layers, so that what is measured is the server."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{number}": number for number in range(256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)
    return str(folder)


def serve(folder: Path, model: str) -> "subprocess.Popen[bytes]":
    command = [
        sys.executable, "-P", "-m", "plait.cli", "serve", "--model", f"tiny={model}",
        "--data-dir", str(folder), "--port", str(PORT), "--threads", "1",
        "--set", "gap_seconds=3600",
    ]  # fmt: skip
    log = (folder.parent / "server.log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ})
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            if httpx.get(f"http://127.0.0.1:{PORT}/readyz", trust_env=False).is_success:
                return process
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise AssertionError((folder.parent / "server.log").read_text()[-2000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        process = serve(root / "data", save_tiny(root / "model"))
        try:
            found = asyncio.run(measured(f"http://127.0.0.1:{PORT}", process, root / "data"))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    broken = found["load"]["lost"] or found["load"]["wrong"] or found["load"]["not_done_once"]
    if broken or found["waiting"] < WAITING:
        raise SystemExit(f"the server is wrong, so that its speed says nothing: {found}")
    print(json.dumps({"benchmark": "service", **found, "machine": machine()}))


if __name__ == "__main__":
    main()

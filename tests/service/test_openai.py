"""OpenAI's API: the answers are those of Plait's own client, and nothing is fetched by accident."""

import base64
import hashlib
import io
import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as PILImage

import plait
from plait.service.catalog import offer_of_argument, sampled
from plait.service.errors import ServiceError
from plait.service.fetching import Fetcher, Together
from plait.trainer.strict import spec_from


def png(colour: int = 200) -> bytes:
    written = io.BytesIO()
    PILImage.fromarray(np.full((20, 20, 3), colour, np.uint8)).save(written, "PNG")
    return written.getvalue()


def address(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def asking(url: str, text: str = "what is this: ") -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": parts}]


def chat(server: Any, **body: Any) -> httpx.Response:
    answer: httpx.Response = server.post("/v1/chat/completions", {"model": "seeing", **body})
    return answer


def test_answers_are_those_of_the_in_process_client(seeing: Any, seeing_recipe: Path) -> None:
    """Of a base model, with a picture; greedy, so that both must say the same."""
    said = chat(seeing, messages=asking(address(png())), max_tokens=6, temperature=0.0,
                logprobs=True).json()  # fmt: skip
    spec = spec_from(sampled(offer_of_argument(str(seeing_recipe))[1])["spec"])
    with plait.ServiceClient() as service:
        view, built = service._engine.create_view(spec, None, service.limits)
        client = plait.SamplingClient(service._engine, built, view)
        prompt = client.prompt("what is this: ", plait.Image(png()))
        greedy = plait.SamplingParams(max_tokens=6, temperature=0.0)
        right = client.sample(prompt, 1, greedy).result().sequences[0]
        text = client.get_tokenizer().decode(right.tokens, skip_special_tokens=True)
    (choice,) = said["choices"]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    told = [one["logprob"] for one in choice["logprobs"]["content"]]
    np.testing.assert_allclose(told, right.logprobs, atol=1e-5)
    assert said["usage"]["prompt_tokens"] == prompt.length
    assert said["usage"]["completion_tokens"] == len(right.tokens)


def events(server: Any, path: str, body: dict[str, Any]) -> list[Any]:
    with httpx.stream("POST", f"{server.url}{path}", json={**body, "stream": True}, timeout=60,
                      trust_env=False) as response:  # fmt: skip
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_streamed_texts_are_the_whole_ones(seeing: Any) -> None:
    body = {"model": "seeing", "messages": asking(address(png())), "max_tokens": 8, "seed": 3,
            "n": 3}  # fmt: skip
    whole = seeing.post("/v1/chat/completions", body).json()["choices"]
    told = events(seeing, "/v1/chat/completions",
                  {**body, "stream_options": {"include_usage": True}})  # fmt: skip
    assert told[-1]["choices"] == [] and told[-1]["usage"]["completion_tokens"] == 24
    for choice in whole:
        mine = [c for one in told for c in one["choices"] if c["index"] == choice["index"]]
        text = "".join(c["delta"].get("content", "") for c in mine)
        assert text == choice["message"]["content"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]


def test_stops_are_cut_off_also_while_they_are_streamed(seeing: Any) -> None:
    body = {"model": "seeing", "prompt": "a red", "max_tokens": 12, "seed": 1}
    text = seeing.post("/v1/completions", body).json()["choices"][0]["text"]
    stop = text[4:7]
    body["stop"] = [stop]
    cut = seeing.post("/v1/completions", body).json()["choices"][0]
    assert cut["text"] == text[: text.index(stop)] and cut["finish_reason"] == "stop"
    told = events(seeing, "/v1/completions", body)
    assert "".join(c["text"] for one in told for c in one["choices"]) == cut["text"]


def test_runs_and_snapshots_answer_with_what_they_learned(seeing: Any) -> None:
    with plait.ServiceClient(seeing.url) as service:
        client = service.create_lora_training_client("seeing", rank=4)
        learned = client.datum(
            plait.Sample((plait.Message("user", "which"), plait.Message("assistant", "a red disc")))
        )
        for _ in range(30):
            client.forward_backward([learned])
            client.optim_step(plait.AdamParams(learning_rate=2e-2))
        path = client.save_state("learned").result().path
        sampler = client.save_weights_and_get_sampling_client()
        greedy = plait.SamplingParams(max_tokens=8, temperature=0.0)
        drawn = sampler.sample(sampler.prompt("which"), 1, greedy).result().sequences[0]
        right = sampler.get_tokenizer().decode(drawn.tokens, skip_special_tokens=True)
        names = [one["id"] for one in seeing.get("/v1/models").json()["data"]]
        assert {"seeing", client.run_id, path} <= set(names)
        told = []
        for model in (client.run_id, path, "seeing"):
            body = {"model": model, "messages": [{"role": "user", "content": "which"}],
                    "temperature": 0.0, "max_tokens": 8}  # fmt: skip
            said = seeing.post("/v1/chat/completions", body).json()
            told.append(said["choices"][0]["message"]["content"])
        assert told[:2] == [right, right] and told[2] != right


def test_an_upload_is_named_by_its_hash(seeing: Any) -> None:
    data = png(77)
    sha256 = hashlib.sha256(data).hexdigest()
    path, half = f"/api/v1/media/{sha256}", len(data) // 2
    params = {"sha256": sha256, "size": len(data)}
    assert seeing.get(path).status_code == 404
    first = seeing.ask("POST", "/api/v1/media", params=params, content=data[:half]).json()
    assert first == {"sha256": sha256, "received": half, "complete": False}
    assert seeing.get(path).json()["received"] == half
    wrong = seeing.ask("POST", "/api/v1/media", params=params, content=data[half:])
    assert wrong.status_code == 409 and f"{half} bytes of this upload are here" in wrong.text
    rest = seeing.ask(
        "POST", "/api/v1/media", params={**params, "offset": half}, content=data[half:]
    ).json()
    assert rest["complete"] and rest["medium"] == "image"
    direct = chat(seeing, messages=asking(address(data)), max_tokens=3, temperature=0.0).json()
    named = chat(seeing, messages=asking(f"sha256:{sha256}"), max_tokens=3, temperature=0.0).json()
    assert named["choices"] == direct["choices"]
    assert seeing.ask("DELETE", path).status_code == 204
    gone = chat(seeing, messages=asking(f"sha256:{sha256}"))
    assert gone.status_code == 400 and "there is no upload" in gone.json()["error"]["message"]


def test_an_upload_that_is_not_what_it_says_is_thrown_away(seeing: Any) -> None:
    for data, claimed in ((b"no picture", b"no picture"), (png(), b"another")):
        sha256 = hashlib.sha256(claimed).hexdigest()
        params = {"sha256": sha256, "size": len(data)}
        said = seeing.ask("POST", "/api/v1/media", params=params, content=data)
        assert said.status_code == 400
        assert seeing.get(f"/api/v1/media/{sha256}").status_code == 404


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "a text or a list of parts"),
        ({"messages": [{"role": "king", "content": "x"}]}, "a message's role is one of"),
        ({"messages": asking("http://127.0.0.1/a.png")}, "media come as data: addresses"),
        ({"messages": asking("file:///etc/hostname")}, "media come as data: addresses"),
        ({"messages": asking("/etc/hostname")}, "media come as data: addresses"),
        ({"messages": asking("data:image/png;base64,@@@")}, "does not hold base64"),
        ({"messages": asking(address(b"no picture"))}, "picture"),
        ({"model": "nobody"}, "there is no model 'nobody'"),
        ({"tools": [{"type": "function"}]}, "tools: "),
        ({"presence_penalty": 0.5}, "presence_penalty: "),
        ({"response_format": {"type": "json_object"}}, "response_format is not a field"),
        ({"n": 0}, "n: "),
        ({"temperature": "hot"}, "temperature: "),
    ],
)
def test_what_cannot_be_answered_is_refused(seeing: Any, change: Any, told: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **change}
    answer = chat(seeing, **body)
    assert 400 <= answer.status_code < 500
    error = answer.json()["error"]
    assert told in error["message"] and error["type"] == "invalid_request_error"


def test_texts_that_cannot_fit_are_refused_at_once(seeing: Any) -> None:
    """Before they are made into tokens, which takes long."""
    text = "a" * 200_000
    for path, body in (("chat/completions", {"messages": [{"role": "user", "content": text}]}),
                       ("completions", {"prompt": text})):  # fmt: skip
        answer = seeing.post(f"/v1/{path}", {"model": "seeing", "max_tokens": 2, **body})
        assert answer.status_code == 400
        assert "cannot be the 512 tokens" in answer.json()["error"]["message"]


class _Site(BaseHTTPRequestHandler):
    """A picture, and ways that lead elsewhere."""

    def do_GET(self) -> None:
        ways = {"/away": "http://127.0.0.1:1/", "/round": "/round", "/near": "/picture"}
        if self.path in ways:
            self.send_response(302)
            self.send_header("Location", ways[self.path])
            self.end_headers()
            return
        self.send_response(200 if self.path in ("/picture", "/large") else 404)
        self.end_headers()
        self.wfile.write(png() if self.path == "/picture" else bytes(200_000))

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A web server on loopback that is called `site.test`, whose address is said to be public."""
    server = HTTPServer(("127.0.0.1", 0), _Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


def fetcher(monkeypatch: pytest.MonkeyPatch, addresses: dict[str, str]) -> Fetcher:
    """One whose names lead where the test says, and that takes 127.0.0.1 for public."""
    made = Fetcher(list(addresses), 100_000)

    async def resolved(host: str, port: int, **_: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (addresses[host], port))]

    import asyncio

    loop: Callable[[], Any] = asyncio.get_running_loop

    class Loop:
        def __getattr__(self, name: str) -> Any:
            return resolved if name == "getaddrinfo" else getattr(loop(), name)

    monkeypatch.setattr("plait.service.fetching.asyncio.get_running_loop", Loop)
    return made


async def fetched(made: Fetcher, url: str) -> Any:
    return await made.bytes_of(url)


PRIVATE = (
    "127.0.0.1", "10.0.0.1", "169.254.169.254", "192.0.0.8", "0.0.0.0", "::1", "fd00::1",
    "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
)  # fmt: skip


def test_only_hosts_that_are_allowed_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    for address_of in PRIVATE:
        made = fetcher(monkeypatch, {"inner.test": address_of})
        with pytest.raises(ServiceError, match="is not a public host"):
            asyncio.run(fetched(made, "http://inner.test/x"))
    made = fetcher(monkeypatch, {"inner.test": "8.8.8.8"})
    for url in ("http://other.test/", "http://inner.test.evil.test/", "http://8.8.8.8/"):
        with pytest.raises(ServiceError, match="may not be fetched from"):
            asyncio.run(fetched(made, url))
    for url in ("http://[", "http://inner.test:x/", "https://\u2100/"):
        with pytest.raises(ServiceError):
            asyncio.run(fetched(made, url))
    for url in ("ftp://inner.test/", "gopher://inner.test/"):
        with pytest.raises(ServiceError, match="hosts that the operator allows"):
            asyncio.run(fetched(made, url))


def test_media_of_a_request_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    async def several() -> None:
        together = Together(Fetcher((), 1000))
        for _ in range(2):
            await together.bytes_of(address(bytes(400)))
        await together.bytes_of("sha256:" + 64 * "a")
        with pytest.raises(ServiceError, match="up to 1000 bytes"):
            await together.bytes_of(address(bytes(400)))

    asyncio.run(several())


def test_redirects_are_looked_at_like_first_addresses(
    monkeypatch: pytest.MonkeyPatch, site: int
) -> None:
    import asyncio

    made = fetcher(monkeypatch, {"site.test": "127.0.0.1"})

    monkeypatch.setattr("plait.service.fetching._is_public", lambda _: True)
    at = f"http://site.test:{site}"
    assert asyncio.run(fetched(made, f"{at}/picture")) == png()
    assert asyncio.run(fetched(made, f"{at}/near")) == png()
    for path, told in (
        ("/away", "may not be fetched from"),
        ("/round", "more often"),
        ("/large", "a file has up to 100000 bytes"),
        ("/none", "answers 404"),
    ):
        with pytest.raises(ServiceError, match=told):
            asyncio.run(fetched(made, f"{at}{path}"))

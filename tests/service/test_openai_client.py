"""The official `openai` client, unchanged, speaks with a server of Plait."""

import asyncio
import base64
import io
import wave
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from tests.service.test_openai import address, png


@pytest.fixture(scope="module")
def client(seeing: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def sound() -> str:
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((8000 * np.sin(np.arange(16_000) / 20)).astype("<i2").tobytes())
    return base64.b64encode(written.getvalue()).decode()


def user(*parts: Any) -> Any:
    return [{"role": "user", "content": [{"type": "text", "text": "what is this: "}, *parts]}]


PICTURE = {"type": "image_url", "image_url": {"url": address(png())}}
SOUND = {"type": "input_audio", "input_audio": {"data": sound(), "format": "wav"}}


@pytest.mark.parametrize("part", [PICTURE, SOUND], ids=["picture", "sound"])
def test_what_is_streamed_is_what_is_answered(client: openai.OpenAI, part: Any) -> None:
    asked: Any = {"model": "seeing", "messages": user(part), "max_tokens": 8, "seed": 5, "n": 2}
    whole = client.chat.completions.create(**asked, logprobs=True)
    texts = [choice.message.content for choice in whole.choices]
    assert len(texts) == 2 and texts[0] != texts[1]
    assert whole.usage is not None and whole.usage.completion_tokens == 16
    for choice in whole.choices:
        assert choice.finish_reason == "length" and choice.logprobs is not None
        assert len(choice.logprobs.content or []) == 8
    grown, usage = ["", ""], None
    for chunk in client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        for delta in chunk.choices:
            grown[delta.index] += delta.delta.content or ""
        usage = chunk.usage or usage
    assert grown == texts
    assert usage is not None and usage.total_tokens == whole.usage.total_tokens


def test_the_asynchronous_client(seeing: Any, client: openai.OpenAI) -> None:
    """Several at once; each gets its own answer."""
    asked: Any = {"model": "seeing", "messages": user(PICTURE), "max_tokens": 4, "logprobs": True}

    async def several() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{seeing.url}/v1", api_key="none") as made:
            many = [made.chat.completions.create(**asked, seed=seed) for seed in range(6)]
            return await asyncio.gather(*many)

    for seed, answer in enumerate(asyncio.run(several())):
        alone = client.chat.completions.create(**asked, seed=seed)
        assert answer.choices[0].message.content == alone.choices[0].message.content


def test_texts_and_models(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="seeing", prompt="a red", max_tokens=5, seed=1)
    parts = client.completions.create(
        model="seeing", prompt="a red", max_tokens=5, seed=1, stream=True
    )
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text != ""
    assert "seeing" in [model.id for model in client.models.list()]
    assert client.models.retrieve("seeing").id == "seeing"


def test_what_asks_for_nothing_is_fine(client: openai.OpenAI) -> None:
    said = client.chat.completions.create(
        model="seeing", messages=user(), max_tokens=2, tools=[], presence_penalty=0.0,
        frequency_penalty=0, logit_bias={},
    )  # fmt: skip
    assert said.choices[0].finish_reason == "length"


def test_errors_are_of_the_client_s_own_kinds(client: openai.OpenAI, new_server: Any) -> None:
    hello: Any = [{"role": "user", "content": "x"}]
    with pytest.raises(openai.NotFoundError, match="there is no model 'nobody'"):
        client.chat.completions.create(model="nobody", messages=hello)
    with pytest.raises(openai.NotFoundError, match="there is no model 'nobody'"):
        client.models.retrieve("nobody")
    with pytest.raises(openai.BadRequestError, match="addresses"):
        remote: Any = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}
        client.chat.completions.create(model="seeing", messages=user(remote))
    with pytest.raises(openai.APIStatusError, match="tools: "):
        tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
        client.chat.completions.create(model="seeing", messages=hello, tools=[tool])
    guarded = new_server().start()
    guarded.new_key("anna")
    stranger = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="odd", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()

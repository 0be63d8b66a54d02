"""OpenAI's requests, to what the engine renders and samples."""

import base64
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from plait.service.errors import ServiceError
from plait.service.fetching import Fetcher, Together

MOST_CHOICES = 128
_ENDED = {"stop": "stop", "length": "length"}


class Asked(BaseModel):
    """What both kinds of request have. A field that is not here is refused by name."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: Annotated[str, Field(min_length=1, max_length=800)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Plait's own, as `min_p`."""

    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    """As those below: clients say that they want nothing of it, which is fine."""

    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    user: Annotated[str, Field(max_length=200)] | None = None
    """Stands in the server's log."""

    def sampling_params(self) -> dict[str, Any]:
        """In the Tinker API's words."""
        given: dict[str, Any] = {
            "max_tokens": self.most(), "temperature": self.temperature, "top_p": self.top_p,
            "top_k": self.top_k, "min_p": self.min_p, "seed": self.seed,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop or None,
        }  # fmt: skip
        return {name: value for name, value in given.items() if value is not None}

    def most(self) -> int | None:
        """Tokens at most."""
        return self.max_tokens


class ChatAsked(Asked):
    """`/v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False

    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextAsked(Asked):
    """`/v1/completions`."""

    prompt: str
    logprobs: Literal[0] | None = None
    """0: those of the tokens themselves."""

    echo: Literal[False] = False


async def messages_of(given: list[dict[str, Any]], fetcher: Fetcher) -> list[dict[str, Any]]:
    """Messages whose media are at hand.

    Raises:
        ServiceError: a message has another form, or its media cannot be had.
    """
    together = Together(fetcher)
    return [await _message(number, one, together) for number, one in enumerate(given)]


async def _message(number: int, given: dict[str, Any], fetcher: Together) -> dict[str, Any]:
    unknown = sorted(set(given) - {"role", "content", "name"})
    if unknown:
        raise ServiceError(f"messages.{number} has no {unknown[0]!r} here")
    content = given.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ServiceError(f"messages.{number}.content is a text or a list of parts")
    parts = [await _part(f"messages.{number}", part, fetcher) for part in content]
    return {"role": given.get("role"), "parts": parts}


async def _part(where: str, given: dict[str, Any], fetcher: Together) -> dict[str, Any]:
    kind = given.get("type")
    if kind == "text" and isinstance(given.get("text"), str):
        return {"type": "text", "text": given["text"]}
    if kind == "input_audio" and isinstance(given.get("input_audio"), dict):
        return {"type": "audio", "data": given["input_audio"].get("data")}
    for name, medium in (("image_url", "image"), ("video_url", "video"), ("audio_url", "audio")):
        if kind == name:
            named = given.get(name)
            url = named.get("url") if isinstance(named, dict) else named
            if not isinstance(url, str):
                raise ServiceError(f"{where}: {name} has an url")
            found = await fetcher.bytes_of(url)
            if isinstance(found, str):
                return {"type": medium, "sha256": found}
            return {"type": medium, "data": base64.b64encode(found).decode()}
    raise ServiceError(
        f"{where}: a part is text, image_url, input_audio, audio_url or video_url; it is {kind!r}"
    )


def chat_choice(number: int, choice: dict[str, Any], logprobs: bool) -> dict[str, Any]:
    """One answer in OpenAI's form."""
    return {
        "index": number,
        "message": {"role": "assistant", "content": choice["text"], "refusal": None},
        "logprobs": {"content": [_logprob(one) for one in choice["tokens"]]} if logprobs else None,
        "finish_reason": _ENDED[choice["finish"]],
    }


def text_choice(number: int, choice: dict[str, Any], logprobs: bool) -> dict[str, Any]:
    """One continuation in OpenAI's form."""
    told = None
    if logprobs:
        told = {
            "tokens": [one["token"] for one in choice["tokens"]],
            "token_logprobs": [one["logprob"] for one in choice["tokens"]],
            "top_logprobs": None,
        }
    return {
        "index": number,
        "text": choice["text"],
        "logprobs": told,
        "finish_reason": _ENDED[choice["finish"]],
    }


def _logprob(one: dict[str, Any]) -> dict[str, Any]:
    return {
        "token": one["token"],
        "logprob": one["logprob"],
        "bytes": list(one["token"].encode()),
        "top_logprobs": [],
    }


def usage(answer: dict[str, Any]) -> dict[str, int]:
    """How many tokens were read and written."""
    read, written = answer["prompt_tokens"], answer["completion_tokens"]
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

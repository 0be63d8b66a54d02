"""The client that makes clients, over HTTP."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime
from itertools import count
from typing import Any, Self
from urllib.parse import quote

from plait.client.futures import AsyncNames
from plait.client.remote.sampling import RemoteSamplingClient
from plait.client.remote.training import RemoteTrainingClient
from plait.client.remote.transport import HEARTBEAT, Transport
from plait.errors import ConfigError
from plait.trainer.places import Place
from plait.types import Checkpoint, LoadWeightsResponse

VERSION = "plait-1"


class RemoteServiceClient(AsyncNames):
    """Runs and samplers on a server; `plait.ServiceClient` is this where it is given an address.

    Args:
        url: The server's address.
        key: Of the caller; `$PLAIT_API_KEY` is used where it is not given.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self._transport = Transport(url, key)
        self._runs, self._samplers = count(), count()
        self._lock = threading.Lock()
        body = {"tags": [], "sdk_version": VERSION}
        said = self._transport.call("POST", "/api/v1/create_session", json=body)
        self.session_id: str = said["session_id"]
        self._beat: Future[None] = self._transport.run(
            self._transport.repeating(
                HEARTBEAT, "/api/v1/session_heartbeat", {"session_id": self.session_id}
            )
        )

    def next_sampler(self) -> int:
        """The number of the session's next sampler."""
        return next(self._samplers)

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = False,
        user_metadata: Mapping[str, str] | None = None,
        *,
        alpha: float | None = None,
        dropout: float | None = None,
        train: Sequence[str] | None = None,
        **more: Any,
    ) -> RemoteTrainingClient:
        """A run with a LoRA adapter; see `plait.ServiceClient.create_lora_training_client`.

        Args:
            base_model: As the server offers it; encoders and template are those of its recipe.

        Raises:
            ConfigError: an option that is the server's to choose, or that it refuses.
        """
        if more:
            raise ConfigError(
                f"{next(iter(more))} is chosen by the server's recipe, not by clients"
            )
        lora = {
            "rank": rank, "seed": seed, "train_mlp": train_mlp, "train_attn": train_attn,
            "train_unembed": train_unembed, "alpha": alpha, "dropout": dropout,
            "train": None if train is None else list(train),
        }  # fmt: skip
        body = {
            "base_model": base_model,
            "lora_config": {name: value for name, value in lora.items() if value is not None},
            "user_metadata": dict(user_metadata or {}),
        }
        return self._made("/api/v1/create_model", body)[0]

    def create_training_client_from_state(
        self, path: str, *, user_metadata: Mapping[str, str] | None = None
    ) -> RemoteTrainingClient:
        """A run that begins with saved weights, and a new optimiser."""
        return self._from_state(path, user_metadata, optimizer=False)

    def create_training_client_from_state_with_optimizer(
        self, path: str, *, user_metadata: Mapping[str, str] | None = None
    ) -> RemoteTrainingClient:
        """A run that goes on exactly where the saved one was."""
        return self._from_state(path, user_metadata, optimizer=True)

    def _from_state(
        self, path: str, user_metadata: Mapping[str, str] | None, *, optimizer: bool
    ) -> RemoteTrainingClient:
        body = {"path": path, "optimizer": optimizer, "user_metadata": dict(user_metadata or {})}
        client, said = self._made("/api/v1/load_weights", body)
        client.restored = LoadWeightsResponse(path, said.get("cursor"))
        return client

    def _made(self, path: str, body: dict[str, Any]) -> tuple[RemoteTrainingClient, Any]:
        number = next(self._runs)
        given = {**body, "session_id": self.session_id, "model_seq_id": number}

        async def make() -> tuple[Any, Any]:
            promise = await self._transport.ask("POST", path, json=given)
            said = (await self._transport.result(promise)).json()
            named = {"model_id": said["model_id"]}
            info = await self._transport.ask("POST", "/api/v1/get_info", json=named)
            return said, info

        said, info = self._transport.run(make()).result()
        return RemoteTrainingClient(self._transport, said["model_id"], self, info), said

    def create_sampling_client(
        self, model_path: str | None = None, base_model: str | None = None
    ) -> RemoteSamplingClient:
        """A client that samples from saved weights, or from a model that the server offers."""
        if (model_path is None) == (base_model is None):
            raise ConfigError("give either model_path or base_model")
        body = {"session_id": self.session_id, "sampling_session_seq_id": self.next_sampler()}
        named = {"base_model": base_model} if model_path is None else {"model_path": model_path}
        made = self._transport.call(
            "POST", "/api/v1/create_sampling_session", json={**body, **named}
        )
        about = self._transport.call("GET", f"/api/v1/samplers/{made['sampling_session_id']}")
        return RemoteSamplingClient(
            self._transport, made["sampling_session_id"], about["base_model"]
        )

    def list_checkpoints(self) -> list[Checkpoint]:
        """All checkpoints of this caller, the oldest first."""
        found: list[Any] = []
        while True:
            params = {"limit": 1000, "offset": len(found)}
            page = self._transport.call("GET", "/api/v1/checkpoints", params=params)
            found += page["checkpoints"]
            if not page["checkpoints"] or len(found) >= page["cursor"]["total_count"]:
                return [_checkpoint(one) for one in reversed(found)]

    def delete_checkpoint(self, path: str) -> None:
        """Remove a checkpoint."""
        self._transport.call("DELETE", _address(path))

    def set_checkpoint_ttl(self, path: str, ttl_seconds: float | None) -> None:
        """Let a checkpoint expire so many seconds from now; None keeps it."""
        self._transport.call("PUT", f"{_address(path)}/ttl", json={"ttl_seconds": ttl_seconds})

    def close(self) -> None:
        """End the session; runs and checkpoints stay on the server."""
        if not self._transport.end.alive:
            return
        self._beat.cancel()
        body = {"reason": {"type": "success"}}
        self._transport.call("POST", f"/api/v1/sessions/{self.session_id}/finish", json=body)
        self._transport.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


def _address(path: str) -> str:
    place = Place.of(path)
    run, name = quote(place.run, safe=":"), quote(place.name, safe="")
    return f"/api/v1/training_runs/{run}/checkpoints/{place.kind}/{name}"


def _checkpoint(told: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(
        path=told["tinker_path"],
        saved_at=datetime.fromisoformat(told["time"]).timestamp(),
        expires_at=_seconds(told["expires_at"]),
        size_bytes=told["size_bytes"] or 0,
        digest="",
        base_model="",
        step=None,
        user_metadata=told["user_metadata"] or {},
    )


def _seconds(time: str | None) -> float | None:
    return None if time is None else datetime.fromisoformat(time).timestamp()

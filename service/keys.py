"""Keys: who may do what. A key is shown once, when it is made; only its hash is kept."""

import asyncio
import hashlib
import hmac
import secrets
import time
import uuid
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, create_engine, func, insert, select, update

from plait.errors import ConfigError, UnknownNameError
from plait.service.audit import OPERATOR, entry
from plait.service.database.database import Database, driver
from plait.service.database.migrate import migrate
from plait.service.database.tables import audit, keys
from plait.service.errors import ServiceError
from plait.service.settings import ServiceSettings, make_folder

Role = Literal["admin", "user", "read-only"]
ROLES: tuple[Role, ...] = ("admin", "user", "read-only")
_LONGEST = 200
PREFIX = "tml-plait-"
"""The official client takes keys that begin with tml- alone."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks."""

    owner: str
    role: Role = "user"
    key_id: str = ""

    def may_write(self) -> bool:
        return self.role != "read-only"


ANYBODY = Caller("local", "admin")
"""Where no key was ever made, and only this machine can reach the server."""


class Keys:
    """Keys in the database; those that were checked are remembered for a while."""

    _REMEMBERED_SECONDS = 10.0
    _LOOK_SECONDS = 1.0
    """Within which another process's first key is noticed."""
    _REMEMBERED = 10_000

    def __init__(self, database: Database) -> None:
        self._database = database
        self._checked: dict[str, tuple[Caller, float]] = {}
        self._any, self._look_again = False, 0.0
        self._looking = asyncio.Lock()

    async def create(
        self, owner: str, role: str, label: str, now: float, by: str = OPERATOR
    ) -> tuple[str, str]:
        """A new key, and its id; the audit log says who made it.

        Raises:
            UnknownNameError: there is no such role.
            ConfigError: there is no owner, or a word is too long.
        """
        if role not in ROLES:
            raise UnknownNameError("role", role, ROLES)
        for word, text in (("owner", owner), ("label", label)):
            if len(text) > _LONGEST or not text.isprintable() or (word == "owner" and not text):
                raise ConfigError(f"{word} has up to {_LONGEST} letters; it is {text[:80]!r}")
        name, secret = uuid.uuid4().hex[:12], secrets.token_urlsafe(32)
        key = f"{PREFIX}{name}-{secret}"
        values = {"id": name, "owner": owner, "role": role, "label": label,
                  "hash": _hash(key), "created_at": now}  # fmt: skip
        noted = entry("keys create", name, now, owner=by)

        def work(connection: Connection) -> None:
            connection.execute(insert(keys).values(**values))
            connection.execute(insert(audit).values(**noted))

        await self._database.write(work)
        self._any = True
        return key, name

    async def revoke(self, name: str, now: float, by: str = OPERATOR) -> bool:
        """Whether there was such a key; it is refused from now on, and the audit log says so."""

        def work(connection: Connection) -> int:
            done = connection.execute(
                update(keys)
                .where((keys.c.id == name) & keys.c.revoked_at.is_(None))
                .values(revoked_at=now)
            )
            if done.rowcount:
                connection.execute(
                    insert(audit).values(**entry("keys revoke", name, now, owner=by))
                )
            return done.rowcount

        found = bool(await self._database.write(work))
        self._checked.clear()
        return found

    async def every(self) -> list[Row[Any]]:
        return await self._database.read(
            lambda connection: list(
                connection.execute(select(keys).order_by(keys.c.created_at)).all()
            )
        )

    async def any(self) -> bool:
        """Whether a key was ever made: from then on one is needed.

        Who asks while it is looked up waits for the answer: until then nobody may be let in.
        """
        if self._any:
            return True
        async with self._looking:
            if not self._any and time.monotonic() >= self._look_again:
                count = await self._database.read(
                    lambda connection: connection.execute(
                        select(func.count()).select_from(keys)
                    ).scalar()
                )
                self._any = bool(count)
                self._look_again = time.monotonic() + self._LOOK_SECONDS
        return self._any

    async def check(self, key: str, now: float) -> Caller:
        """
        Raises:
            ServiceError: it is no key, or was revoked.
        """
        hashed = _hash(key)
        caller, since = self._checked.get(hashed, (None, 0.0))
        # A clock that is set back must not keep a revoked key alive.
        if caller is not None and 0 <= now - since < self._REMEMBERED_SECONDS:
            return caller
        name = key.removeprefix(PREFIX).partition("-")[0]
        row = await self._database.read(
            lambda connection: connection.execute(
                select(keys).where((keys.c.id == name) & keys.c.revoked_at.is_(None))
            ).one_or_none()
        )
        if row is None or not hmac.compare_digest(row.hash, hashed):
            raise ServiceError("this key is not known here, or was revoked", 401)
        caller = Caller(row.owner, row.role, row.id)
        if len(self._checked) >= self._REMEMBERED:
            self._checked.clear()
        self._checked[hashed] = caller, now
        return caller


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def has_keys(settings: ServiceSettings) -> bool:
    """Whether a key was ever made, asked before the server is there."""
    make_folder(settings.data_dir)
    migrate(settings.database_url)
    engine = create_engine(driver(settings.database_url))
    with engine.connect() as connection:
        count = connection.execute(select(func.count(keys.c.id))).scalar_one()
    engine.dispose()
    return bool(count)

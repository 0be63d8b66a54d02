"""A database of an earlier version becomes this version's, and keeps what it holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from plait.service.database.database import driver
from plait.service.database.migrate import migrate
from plait.service.database.tables import METADATA

FIRST = "0001"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'plait.db'}"
    address: str = request.getfixturevalue("postgresql")
    return address


def of_other_type(context: Any, inspected: Any, column: Any, found: Any, meant: Any) -> bool:
    """A `Words` without a length may be TEXT as well, in which both databases keep the same."""
    del context, inspected, column
    meant = getattr(meant, "impl", meant)
    length = getattr(found, "length", None) != getattr(meant, "length", None)
    return length or found._type_affinity is not meant._type_affinity


def test_a_first_database_is_brought_up_to_date(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: Callable[..., None] = command.upgrade
    with monkeypatch.context() as patch:
        patch.setattr(command, "upgrade", lambda config, _: whole(config, FIRST))
        migrate(url)
    engine = create_engine(driver(url))
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO sessions (id, owner, about_json, created_at, seen_at) "
                "VALUES ('a', 'anna', '{}', 1, 1)"
            )
        )
    for _ in range(2):
        migrate(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": of_other_type})
        assert compare_metadata(context, METADATA) == []
        assert connection.execute(text("SELECT owner FROM sessions")).scalar_one() == "anna"
    engine.dispose()

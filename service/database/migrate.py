"""Bring a database to this version's tables."""

from pathlib import Path

from alembic import command
from alembic.config import Config


def migrate(url: str) -> None:
    """Apply the migrations that are missing; harmless where none is."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.attributes["url"] = url
    command.upgrade(config, "head")

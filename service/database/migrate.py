"""Bring a database to this version's tables."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy.exc import SQLAlchemyError

from plait.errors import ConfigError


def migrate(url: str) -> None:
    """Apply the migrations that are missing; harmless where none is.

    Raises:
        ConfigError: there is no such database, or it does not answer.
    """
    if not url.startswith(("sqlite:", "postgresql:", "postgres:", "postgresql+")):
        raise ConfigError(
            f"a database is postgresql://... or the embedded SQLite; got {_shown(url)}"
        )
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.attributes["url"] = url
    try:
        command.upgrade(config, "head")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed, which PostgreSQL needs: pip install -c "
            "constraints.txt -e '.[postgres]'"
        ) from error
    except SQLAlchemyError as error:
        said = str(getattr(error, "orig", None) or error).strip().splitlines()
        raise ConfigError(
            f"the database {_shown(url)} cannot be used: {said[0] if said else error!r}"
        ) from error


def _shown(url: str) -> str:
    """Without what is between its user and its host: a password, perhaps."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"

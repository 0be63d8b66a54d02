"""Alembic's entry: applies the versions beside it to the database that `migrate` names."""

from alembic import context
from sqlalchemy import create_engine

from plait.service.database.database import driver
from plait.service.database.tables import METADATA


def run() -> None:
    engine = create_engine(driver(context.config.attributes["url"]))
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=METADATA, render_as_batch=True)
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()


run()

"""The tables. Times are seconds since the epoch; texts that end in `_json` are JSON."""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    TypeDecorator,
    UniqueConstraint,
)


class Words(TypeDecorator[str]):
    """Any text. Characters that no database takes are kept as others: zero as "␀", half of one as
    "?". What is looked for under a name with them is not there, since none is given to anything.
    """

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        del dialect
        if value is None or (value.isascii() and "\0" not in value):
            return value
        return value.replace("\0", "␀").encode("utf-8", "replace").decode()


METADATA = MetaData()

keys = Table(
    "keys",
    METADATA,
    Column("id", Words(32), primary_key=True),
    Column("owner", Words(200), nullable=False, index=True),
    Column("role", Words(20), nullable=False),
    Column("label", Words(200), nullable=False, default=""),
    Column("hash", Words(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("used_at", Float),
    Column("revoked_at", Float),
)

sessions = Table(
    "sessions",
    METADATA,
    Column("id", Words(64), primary_key=True),
    Column("owner", Words(200), nullable=False, index=True),
    Column("about_json", Words(), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("seen_at", Float, nullable=False),
    Column("finished_at", Float),
    Column("finish_json", Words()),
)

runs = Table(
    "runs",
    METADATA,
    Column("id", Words(160), primary_key=True),
    Column("session_id", ForeignKey("sessions.id"), nullable=False, index=True),
    Column("owner", Words(200), nullable=False, index=True),
    Column("base_model", Words(400), nullable=False),
    Column("spec_json", Words(), nullable=False),
    Column("seed", BigInteger, nullable=False, default=0),
    Column("metadata_json", Words(), nullable=False, default="{}"),
    Column("info_json", Words()),
    Column("created_at", Float, nullable=False),
    Column("used_at", Float, nullable=False),
    Column("next_seq", BigInteger, nullable=False, default=0),
    Column("kept_seq", BigInteger, nullable=False, default=-1),
)
"""`next_seq`: all operations below it are done. `kept_seq`: the state after this one is on the
disk, so that later ones alone are repeated after a crash; -1 is none."""

samplers = Table(
    "samplers",
    METADATA,
    Column("id", Words(160), primary_key=True),
    Column("session_id", ForeignKey("sessions.id"), nullable=False, index=True),
    Column("owner", Words(200), nullable=False, index=True),
    Column("base_model", Words(400), nullable=False),
    Column("model_path", Words(800)),
    Column("spec_json", Words()),
    Column("weights", Words()),
    Column("run_id", Words(160), index=True),
    Column("run_seq", BigInteger),
    Column("kept_path", Words(800)),
    Column("joined", Integer, nullable=False, default=0),
    Column("created_at", Float, nullable=False),
    Column("closed_at", Float),
)
"""`run_id` and `run_seq`: whose weights, after which operation. `kept_path`: where they lie.
`weights`: the folder that a model is offered with."""

operations = Table(
    "operations",
    METADATA,
    Column("id", Words(64), primary_key=True),
    Column("owner", Words(200), nullable=False, index=True),
    Column("scope", Words(160), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("kind", Words(40), nullable=False),
    Column("options_json", Words(), nullable=False),
    Column("digest", Words(64), nullable=False),
    Column("body", Words(80)),
    Column("state", Words(10), nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("result", Words(80)),
    Column("result_kind", Words(10)),
    Column("error", Words()),
    Column("category", Words(10)),
    Column("created_at", Float, nullable=False),
    Column("finished_at", Float),
    Column("delivered_at", Float),
    UniqueConstraint("scope", "seq", name="operations_once"),
)
"""`scope` is a run or a sampler. `body` and `result` name places in the payload files."""

Index("operations_state", operations.c.state, operations.c.scope, operations.c.seq)

checkpoints = Table(
    "checkpoints",
    METADATA,
    Column("path", Words(800), primary_key=True),
    Column("owner", Words(200), nullable=False, index=True),
    Column("run_id", Words(160), nullable=False, index=True),
    Column("kind", Words(20), nullable=False),
    Column("name", Words(400), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("size_bytes", BigInteger),
    Column("public", Boolean, nullable=False, default=False),
    Column("metadata_json", Words(), nullable=False, default="{}"),
)

losses = Table(
    "losses",
    METADATA,
    Column("id", Words(64), primary_key=True),
    Column("session_id", ForeignKey("sessions.id"), nullable=False, index=True),
    Column("owner", Words(200), nullable=False),
    Column("name", Words(200), nullable=False),
    Column("graph_json", Words(), nullable=False),
    Column("created_at", Float, nullable=False),
)

media = Table(
    "media",
    METADATA,
    Column("owner", Words(200), primary_key=True),
    Column("sha256", Words(64), primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("medium", Words(10), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("used_at", Float, nullable=False),
)

audit = Table(
    "audit",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False, index=True),
    Column("owner", Words(200), nullable=False),
    Column("key_id", Words(32), nullable=False),
    Column("action", Words(100), nullable=False),
    Column("target", Words(800), nullable=False),
    Column("status", Integer, nullable=False),
    Column("request_id", Words(64), nullable=False),
)

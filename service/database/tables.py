"""The tables. Times are seconds since the epoch; texts that end in `_json` are JSON."""

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
    Text,
    UniqueConstraint,
)

METADATA = MetaData()

keys = Table(
    "keys",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("owner", String(200), nullable=False, index=True),
    Column("role", String(20), nullable=False),
    Column("label", String(200), nullable=False, default=""),
    Column("hash", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("used_at", Float),
    Column("revoked_at", Float),
)

sessions = Table(
    "sessions",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("owner", String(200), nullable=False, index=True),
    Column("about_json", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("seen_at", Float, nullable=False),
    Column("finished_at", Float),
    Column("finish_json", Text),
)

runs = Table(
    "runs",
    METADATA,
    Column("id", String(160), primary_key=True),
    Column("session_id", ForeignKey("sessions.id"), nullable=False, index=True),
    Column("owner", String(200), nullable=False, index=True),
    Column("base_model", String(400), nullable=False),
    Column("spec_json", Text, nullable=False),
    Column("seed", BigInteger, nullable=False, default=0),
    Column("metadata_json", Text, nullable=False, default="{}"),
    Column("info_json", Text),
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
    Column("id", String(160), primary_key=True),
    Column("session_id", ForeignKey("sessions.id"), nullable=False, index=True),
    Column("owner", String(200), nullable=False, index=True),
    Column("base_model", String(400), nullable=False),
    Column("model_path", String(800)),
    Column("spec_json", Text),
    Column("run_id", String(160), index=True),
    Column("run_seq", BigInteger),
    Column("kept_path", String(800)),
    Column("joined", Integer, nullable=False, default=0),
    Column("created_at", Float, nullable=False),
    Column("closed_at", Float),
)
"""`run_id` and `run_seq`: whose weights, after which operation. `kept_path`: where they lie."""

operations = Table(
    "operations",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("owner", String(200), nullable=False, index=True),
    Column("scope", String(160), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("options_json", Text, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("body", String(80)),
    Column("state", String(10), nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("result", String(80)),
    Column("result_kind", String(10)),
    Column("error", Text),
    Column("category", String(10)),
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
    Column("path", String(800), primary_key=True),
    Column("owner", String(200), nullable=False, index=True),
    Column("run_id", String(160), nullable=False, index=True),
    Column("kind", String(20), nullable=False),
    Column("name", String(400), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("size_bytes", BigInteger),
    Column("public", Boolean, nullable=False, default=False),
    Column("metadata_json", Text, nullable=False, default="{}"),
)

losses = Table(
    "losses",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("session_id", ForeignKey("sessions.id"), nullable=False, index=True),
    Column("owner", String(200), nullable=False),
    Column("name", String(200), nullable=False),
    Column("graph_json", Text, nullable=False),
    Column("created_at", Float, nullable=False),
)

media = Table(
    "media",
    METADATA,
    Column("owner", String(200), primary_key=True),
    Column("sha256", String(64), primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("medium", String(10), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("used_at", Float, nullable=False),
)

audit = Table(
    "audit",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False, index=True),
    Column("owner", String(200), nullable=False),
    Column("key_id", String(32), nullable=False),
    Column("action", String(100), nullable=False),
    Column("target", String(800), nullable=False),
    Column("status", Integer, nullable=False),
    Column("request_id", String(64), nullable=False),
)

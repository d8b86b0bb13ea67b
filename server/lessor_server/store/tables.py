"""The schema as SQLAlchemy Core tables.

The migrations are the truth; a test compares these tables with a migrated
database: names, types, nullability. Contended statements are written in SQL
(see ``sql/``), everything else is built from these.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Identity,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP
from sqlalchemy.types import TypeEngine, UserDefinedType


class Xid8(UserDefinedType[int]):
    """A transaction id with its epoch: it never wraps around. A Python int."""

    cache_ok = True
    # Without a cast Postgres would take the parameter for a bigint, which xid8 is not compared with.
    render_bind_cast = True

    def get_col_spec(self, **_: Any) -> str:
        """Returns the type's name in DDL and casts."""
        return "xid8"


_Timestamp: TypeEngine[datetime] = TIMESTAMP(timezone=True)

metadata = MetaData()


def _table(name: str, *columns: Column[Any]) -> Table:
    return Table(name, metadata, *columns)


def _required(name: str, kind: TypeEngine[Any] | type[TypeEngine[Any]], *, key: bool = False) -> Column[Any]:
    return Column(name, kind, nullable=False, primary_key=key, autoincrement=False)


def _identity(name: str, kind: type[TypeEngine[int]]) -> Column[int]:
    return Column(name, kind, Identity(always=True), nullable=False, primary_key=True)


def _optional(name: str, kind: TypeEngine[Any] | type[TypeEngine[Any]]) -> Column[Any]:
    return Column(name, kind, nullable=True)


queue = _table(
    "queue",
    _identity("id", Integer),
    _required("name", Text),
    _required("paused", Boolean),
    _optional("max_running", Integer),
    _optional("max_gpus", Integer),
    _required("created_at", _Timestamp),
)

shape = _table(
    "shape",
    _identity("id", BigInteger),
    _required("digest", LargeBinary),
    _required("spec", JSONB),
)

agent = _table(
    "agent",
    _required("id", Text, key=True),
    _required("name", Text),
    _required("version", Text),
    _required("labels", JSONB),
    _required("runtimes", JSONB),
    _required("cpu_millis", BigInteger),
    _required("memory_bytes", BigInteger),
    _required("heartbeat_ms", Integer),
    _required("hostname", Text),
    _required("boot_id", Text),
    _required("hardware_id", Text),
    _optional("session_id", BigInteger),
    _required("connected_at", _Timestamp),
    _required("drained", Boolean),
)

gpu = _table(
    "gpu",
    _required("agent_id", Text, key=True),
    _required("uuid", Text, key=True),
    _required("index", Integer),
    _required("model", Text),
    _required("memory_bytes", BigInteger),
    _required("utilization_percent", Integer),
    _required("memory_used_bytes", BigInteger),
)

leader = _table(
    "leader",
    _required("id", Boolean, key=True),
    _required("epoch", BigInteger),
    _required("holder", Text),
    _required("clock", BigInteger),
    _required("beat", BigInteger),
    _required("stood_ms", BigInteger),
)

session = _table(
    "session",
    _identity("id", BigInteger),
    _required("agent_id", Text),
    _required("epoch", Integer),
    _required("renewed_at", BigInteger),
    _required("heartbeat_ms", Integer),
    _required("replica", Text),
    _required("host_gone", Boolean),
    _required("drained", Boolean),
)

request = _table(
    "request",
    _required("principal", Text, key=True),
    _required("request_id", Text, key=True),
    _required("fingerprint", LargeBinary),
    _required("job_ids", ARRAY(BigInteger)),
    _required("created_at", _Timestamp),
)

dedupe = _table(
    "dedupe",
    _required("queue_id", Integer, key=True),
    _required("key", Text, key=True),
    _required("job_id", BigInteger),
)

checkpoint = _table(
    "checkpoint",
    _required("job_id", BigInteger, key=True),
    _required("lease_id", BigInteger),
    _required("cursor", Text),
)

job = _table(
    "job",
    _required("id", BigInteger, key=True),
    _required("queue_id", Integer),
    _required("shape_id", BigInteger),
    _required("priority", Integer),
    _required("name", Text),
    _required("labels", JSONB),
    _required("spec", LargeBinary),
    _required("ttl_ms", BigInteger),
    _optional("start_timeout_ms", BigInteger),
    _required("max_failures", Integer),
    _required("max_losses", Integer),
    _required("backoff_initial_ms", BigInteger),
    _required("backoff_max_ms", BigInteger),
    _optional("dedupe_key", Text),
    _optional("retry_of", BigInteger),
    _required("submitted_at", _Timestamp),
)

ready = _table(
    "ready",
    _required("job_id", BigInteger, key=True),
    _required("queue_id", Integer),
    _required("shape_id", BigInteger),
    _required("priority", Integer),
    _required("attempts", Integer),
    _required("failures", Integer),
    _required("losses", Integer),
    _optional("last_lease_id", BigInteger),
    _optional("queue_deadline", _Timestamp),
)

delayed = _table(
    "delayed",
    _required("job_id", BigInteger, key=True),
    _required("queue_id", Integer),
    _required("shape_id", BigInteger),
    _required("priority", Integer),
    _required("attempts", Integer),
    _required("failures", Integer),
    _required("losses", Integer),
    _optional("last_lease_id", BigInteger),
    _required("not_before", _Timestamp),
)

lease = _table(
    "lease",
    _required("job_id", BigInteger, key=True),
    _required("member", SmallInteger, key=True),
    _required("lease_id", BigInteger),
    _required("session_id", BigInteger),
    _required("agent_id", Text),
    _required("attempt", Integer),
    _required("phase", SmallInteger),
    _required("queue_id", Integer),
    _required("shape_id", BigInteger),
    _required("priority", Integer),
    _required("failures", Integer),
    _required("losses", Integer),
    _required("max_failures", Integer),
    _required("max_losses", Integer),
    _required("backoff_initial_ms", BigInteger),
    _required("backoff_max_ms", BigInteger),
    Column("dedupe_key", Text),
    _required("ttl_ms", BigInteger),
    _required("gpu_uuids", ARRAY(Text)),
    _required("offered_at", BigInteger),
    _required("granted_at", _Timestamp),
    _optional("start_deadline", _Timestamp),
    _optional("started_at", _Timestamp),
    _required("cancel_requested", Boolean),
    _optional("revoke", SmallInteger),
    _optional("outcome", SmallInteger),
    _optional("exit_code", Integer),
    _required("signal", Integer),
    _optional("error", LargeBinary),
    _required("retryable", Boolean),
    _optional("result", LargeBinary),
    _optional("final_log_offset", BigInteger),
    _optional("ended_at", _Timestamp),
)

lease_gpu = _table(
    "lease_gpu",
    _required("agent_id", Text, key=True),
    _required("gpu_uuid", Text, key=True),
    _required("lease_id", BigInteger),
    _required("job_id", BigInteger),
)

attempt = _table(
    "attempt",
    _required("job_id", BigInteger, key=True),
    _required("lease_id", BigInteger, key=True),
    _required("attempt", Integer),
    _optional("agent_id", Text),
    _required("gpu_uuids", ARRAY(Text)),
    _required("outcome", SmallInteger),
    _optional("exit_code", Integer),
    _required("signal", Integer),
    _optional("error", LargeBinary),
    _optional("result", LargeBinary),
    _required("failures", Integer),
    _required("losses", Integer),
    _optional("final_state", SmallInteger),
    _optional("granted_at", _Timestamp),
    _optional("started_at", _Timestamp),
    _required("ended_at", _Timestamp),
    _required("log_bytes", BigInteger),
    _optional("logs_truncated_at", BigInteger),
)

progress = _table(
    "progress",
    _required("lease_id", BigInteger, key=True),
    _required("job_id", BigInteger),
    _optional("fraction", Double),
    _required("message", Text),
    _required("metrics", JSONB),
    _required("updated_at", _Timestamp),
)

log_head = _table(
    "log_head",
    _required("lease_id", BigInteger, key=True),
    _required("end_offset", BigInteger),
    _required("stdout_bytes", BigInteger),
    _required("stderr_bytes", BigInteger),
)

log_chunk = _table(
    "log_chunk",
    _required("lease_id", BigInteger, key=True),
    _required("start_offset", BigInteger, key=True),
    _required("stream", SmallInteger),
    _required("data", LargeBinary),
    _required("read_at", _Timestamp),
)

event = _table(
    "event",
    _required("id", BigInteger),
    _required("xid", Xid8()),
    _required("at", _Timestamp),
    _required("job_ids", ARRAY(BigInteger)),
    _required("states", ARRAY(SmallInteger)),
    _required("attempts", ARRAY(Integer)),
)

event_floor = _table(
    "event_floor",
    _required("one", Boolean, key=True),
    _required("xid", Xid8()),
    _required("id", BigInteger),
)

schema_floor = _table(
    "schema_floor",
    _required("one", Boolean, key=True),
    _required("revision", Text),
)

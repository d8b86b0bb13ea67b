"""Making a rewound database safe to serve: after a fail-over that lost commits, or a restored backup.

Such a database has forgotten its latest numbers and would hand them out again: a
lease number that an agent still holds for another job, a session another agent
believes to be its own, a term that an old leader thinks it leads in. What was
handed out in the lost stretch is not known, but how fast it can have been is. So
each of these numbers is moved onto a line that time draws and that normal
operation always stays below, an hour ahead of now:

* lease numbers: a day's range of 2**32, spread evenly over the day. Each day begins
  at the start of its range, so numbers stay below the line while fewer than 49,710
  leases a second are granted;
* session numbers and terms: milliseconds since 1970, while fewer than a thousand a
  second begin.

Later numbers grow more slowly than the line, so the next recovery is above them too,
whatever this database has forgotten by then, an earlier recovery included. An hour is
far more than the clocks of two database hosts differ. Source: docs/adr/0008.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import asyncpg

from lessor import timing
from lessor_server.domain.errors import DatabaseUnavailable
from lessor_server.store import migrate
from lessor_server.store.database import SESSION_SETTINGS, plain_url
from lessor_server.store.partitions import ensure_partitions, lease_number_at, submitted_at

AHEAD = timedelta(hours=1)
"""How far ahead of now numbers are moved."""

CLOCK_SLACK = timedelta(minutes=5)
"""A job submitted so much later than now shows that the database's clock was set back."""

WATCH = 2 * timing.LEADER_TAKEOVER
"""A server that can reach the database ticks within this time, as leader or by taking over."""

_JOB_NUMBERS = 1 << 21
_JOB_LEAP = 1_296_111
"""The golden section of the job numbers of one millisecond: no few leaps come near each other."""

# No agent believes any of these sessions to be its own, so none can resume what this
# database does not know. They are as old as sessions get without being fresh.
_BEGIN_ANEW = """
WITH made AS (
    INSERT INTO session (agent_id, epoch, renewed_at, heartbeat_ms, replica, drained)
    SELECT a.id, 1, l.clock - 2 * a.heartbeat_ms - 1, a.heartbeat_ms, '', a.drained
    FROM agent AS a CROSS JOIN leader AS l
    RETURNING id, agent_id
)
UPDATE agent AS a SET session_id = m.id FROM made AS m WHERE m.agent_id = a.id
"""


class RecoveryRefused(Exception):
    """Nothing was changed; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a recovery did."""

    lease_number: int
    """The greatest lease number that is not handed out any more."""
    lease_number_before: int
    session_number: int
    """The same of sessions."""
    term: int
    sessions: int
    """Sessions that were made to begin anew."""
    leases: int
    """Leases that stand, each with its full time from now on."""

    def __str__(self) -> str:
        return (
            f"recovered: lease numbers go on above {self.lease_number} (were at {self.lease_number_before}), "
            f"session numbers above {self.session_number}, terms above {self.term}; {self.leases} leases have their "
            f"full time again, agents begin new sessions ({self.sessions} ended); start the servers now"
        )


async def recover(
    database_url: str, *, now: datetime | None = None, pause: Callable[[float], Awaitable[object]] = asyncio.sleep
) -> Recovered:
    """Moves every number that agents and servers may still hold out of their reach.

    Refuses while a server is alive, for a server keeps such numbers in memory. All or
    nothing, but for sequences, which may have been raised already when it is cut off;
    run it again then. Running it twice is harmless.

    Args:
        database_url: The database.
        now: The time; None: the database's clock.
        pause: Waits, in seconds.

    Raises:
        ValueError: The URL is not one of PostgreSQL.
        DatabaseUnavailable: Nobody answers there, or it refuses us.
        SchemaMismatch: It holds no schema, or another than this code's.
        RecoveryRefused: It cannot be done now.
    """
    try:
        connection = await asyncpg.connect(plain_url(database_url), server_settings=SESSION_SETTINGS, timeout=5)
        try:
            return await _recover(connection, now, pause)
        finally:
            await connection.close(timeout=5)
    except asyncpg.LockNotAvailableError as error:
        raise RecoveryRefused(
            f"something holds the row of the leader ({error}): stop every server of this database, then try again"
        ) from error
    except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise DatabaseUnavailable(f"{type(error).__name__}: {error}") from error


async def _recover(
    connection: asyncpg.Connection | Any, now: datetime | None, pause: Callable[[float], Awaitable[object]]
) -> Recovered:
    if await connection.fetchval("SELECT pg_is_in_recovery()"):
        raise RecoveryRefused("the database is a standby: promote it (pg_ctl promote), or name the primary")
    await migrate.check_connection(connection)
    await _refuse_clock_set_back(connection, now)
    await ensure_partitions(connection, now)
    (seen,) = await connection.fetch("SELECT epoch, beat FROM leader")
    await pause(WATCH / timedelta(seconds=1))
    async with connection.transaction():
        # Held to the end: a server that starts now waits here, then finds that its look at the row is of old.
        (leader,) = await connection.fetch("SELECT epoch, beat, holder FROM leader FOR UPDATE")
        if (leader["epoch"], leader["beat"]) != (seen["epoch"], seen["beat"]):
            raise RecoveryRefused(
                f"a server is alive: {leader['holder'] or 'one that has just stopped'} has led within the last "
                f"{WATCH / timedelta(seconds=1):.0f} s; stop every server of this database, then try again"
            )
        return await _raise_numbers(connection, now)


async def _refuse_clock_set_back(connection: asyncpg.Connection | Any, now: datetime | None) -> None:
    now = now or await connection.fetchval("SELECT now()")
    newest = await connection.fetchval("SELECT max(id) FROM job")
    if newest is not None and submitted_at(newest) > now + CLOCK_SLACK:
        raise RecoveryRefused(
            f"the database's clock says {now:%Y-%m-%d %H:%M:%S} UTC, but a job was submitted at "
            f"{submitted_at(newest):%Y-%m-%d %H:%M:%S}: set the clock of the database's host right, then try again"
        )


async def _raise_numbers(connection: asyncpg.Connection | Any, now: datetime | None) -> Recovered:
    ahead = (now or await connection.fetchval("SELECT clock_timestamp()")) + AHEAD
    ahead_ms = int(ahead.timestamp() * 1000)
    before = await connection.fetchval("SELECT last_value FROM lease_number")
    lease_number = await connection.fetchval(
        "SELECT setval('lease_number', GREATEST(last_value, $1)) FROM lease_number", lease_number_at(ahead)
    )
    session_sequence = await connection.fetchval("SELECT pg_get_serial_sequence('session', 'id')")
    session_number = await connection.fetchval(
        f"SELECT setval('{session_sequence}', GREATEST(last_value, $1)) FROM {session_sequence}", ahead_ms
    )
    # A job's number carries its millisecond. Only if the clock of this host is behind that of the old one can the same
    # one come again, and then with other numbers of its 2**21.
    await connection.execute(
        "SELECT setval('job_number', (last_value + $1::bigint) % $2::bigint) FROM job_number", _JOB_LEAP, _JOB_NUMBERS
    )
    # A renewal that was lost may have given a lease more time than this database knows of, so each gets all of it.
    sessions = await connection.execute(
        "UPDATE session SET epoch = epoch + 1, renewed_at = GREATEST(renewed_at, (SELECT clock FROM leader))"
    )
    await connection.execute(_BEGIN_ANEW)
    term = await connection.fetchval(
        "UPDATE leader SET epoch = GREATEST(epoch + 1, $1), beat = beat + 1, holder = '', stood_ms = 0 RETURNING epoch",
        ahead_ms,
    )
    leases = await connection.fetchval("SELECT count(*) FROM lease")
    return Recovered(lease_number, before, session_number, term, int(sessions.rpartition(" ")[2]), leases)

"""Bugs to plant: each takes one rule of the lease protocol away. The checker must notice.

A mutant edits a copy of the packages (:mod:`.overlay`) and has a scenario of its
own (:mod:`.scenarios`) in which the rule is what stands between a user and harm.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.chaos.checker import Kind
from tests.chaos.overlay import Edit

_SQL = "lessor_server/store/sql"


@dataclass(frozen=True, slots=True)
class Mutant:
    """A bug, where it shows, and what the checker must say then."""

    name: str
    rule: str
    """What is taken away."""
    scenario: str
    """Name of the scenario."""
    caught_as: frozenset[Kind]
    """At least one of these must be reported."""
    edits: tuple[Edit, ...]


MUTANTS = (
    Mutant(
        "no-margin",
        "Agent and server keep a margin on their sides of a lease",
        "keeper_late_at_the_deadline",
        frozenset({Kind.OVERLAP}),
        (
            Edit("lessor/timing.py", "    return timedelta(seconds=1) + ttl / 50\n", "    return timedelta(0)\n"),
            Edit(f"{_SQL}/expire.sql", "l.ttl_ms + 1000 + l.ttl_ms / 50 < lead.clock", "l.ttl_ms < lead.clock"),
        ),
    ),
    Mutant(
        "no-deadline",
        "The keeper ends a job whose lease was not renewed",
        "agent_cut_off",
        frozenset({Kind.OVERLAP}),
        (Edit("lessor_agent/keeper/verdict.py", "limit_ns = deadline_ns - KILL_SLACK_NS", "limit_ns = _NEVER"),),
    ),
    Mutant(
        "no-fencing-guard",
        "An end counts for the lease that it names, and for no other",
        "end_from_a_stopped_replica",
        frozenset({Kind.WRONG_OUTCOME, Kind.OVERLAP}),
        (
            Edit(
                f"{_SQL}/end.sql",
                "JOIN live AS l ON l.job_id = i.job_id AND l.lease_id = i.lease_id AND l.agent_id = i.agent_id",
                "JOIN live AS l ON l.job_id = i.job_id",
            ),
        ),
    ),
    Mutant(
        "no-outbox",
        "An end is said again until it is acked",
        "end_lost_on_the_way",
        frozenset({Kind.LOST_JOB}),
        (
            Edit("lessor_agent/protocol/events.py", "RESEND_AFTER_NS = 15_000_000_000", "RESEND_AFTER_NS = 1 << 62"),
            Edit(
                "lessor_agent/protocol/events.py",
                "        for pending in self._pending.values() if lease_id is None else self.of_lease(lease_id):\n",
                "        for pending in ():\n",
            ),
        ),
    ),
    Mutant(
        "renewed-on-receipt",
        "A renewal counts from when the heartbeat was sent",
        "ack_comes_late",
        frozenset({Kind.OVERLAP}),
        (Edit("lessor_agent/protocol/session.py", "self.renewed_ns = sent_ns", "self.renewed_ns = now_ns"),),
    ),
    Mutant(
        "revoke-ignored",
        "An agent that is asked for a lease ends it",
        "cancel",
        frozenset({Kind.IGNORED_CANCEL}),
        (
            Edit(
                "lessor_agent/protocol/leases.py",
                "        lease = self._held.get(revoke.lease_id)\n",
                "        return\n",
            ),
        ),
    ),
    Mutant(
        "no-epoch-guard",
        "A leader whose term is over advances nothing",
        "two_stopped_leaders",
        frozenset({Kind.OVERLAP}),
        (Edit(f"{_SQL}/tick.sql", "WHERE epoch = CAST(:epoch AS bigint)", "WHERE CAST(:epoch AS bigint) > 0"),),
    ),
    Mutant(
        "no-session-lock",
        "A lease is not expired beside a renewal of its session",
        "renewal_amid_expiry",
        frozenset({Kind.HISTORY}),
        (Edit(f"{_SQL}/expire.sql", "FOR UPDATE OF s, l SKIP LOCKED", "FOR UPDATE OF l SKIP LOCKED"),),
    ),
    Mutant(
        "late-end-dropped",
        "An end that comes late counts while its job still waits",
        "ended_while_waiting",
        frozenset({Kind.RE_RUN}),
        (
            Edit(
                "lessor_server/store/reports.py",
                "    for _ in range(_REVIVE_TRIES):\n",
                "    for _ in range(0):\n",
            ),
        ),
    ),
    Mutant(
        "ends-unread",
        "An agent reads what ended without it before it says hello, and tells of it whatever is said of its lease",
        "ended_without_an_agent",
        frozenset({Kind.RE_RUN}),
        (
            Edit(
                "lessor_agent/supervisor.py",
                "            await asyncio.wait(over, timeout=HEAR_OF_ENDS_S)\n",
                "            over.clear()\n",
            ),
            Edit(
                "lessor_agent/protocol/lease.py",
                "return self.stage is ENDED and not self.end_acked and",
                "return False and",
            ),
        ),
    ),
)

"""Sessions: resumed, superseded, proven gone, refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from lessor.lifecycle import LeasePhase, Outcome
from lessor_server.domain.errors import AgentIdentityInUse
from lessor_server.store.hello import Answer, Held, hold_back, take_standing
from lessor_server.store.reports import End, Phase, Verdict
from tests.support.store import Leased, Store, succeeded


async def standing(store: Store, lease: Leased, *held: Held) -> tuple[dict[int, int], list[tuple[int, int]]]:
    result = await take_standing(store.database, lease.agent_id, lease.session, held)
    return {answer.lease_id: answer.decision for answer in result.answers}, result.unlisted


def holds(lease: Leased, phase: LeasePhase = LeasePhase.RUNNING) -> Held:
    return Held(lease.job, lease.lease_id, phase)


async def test_a_session_is_resumed_with_a_new_epoch_and_renewed(store: Store) -> None:
    first = await store.hello()
    await store.set_clock(5000)
    again = await store.hello(session_id=first.session_id)
    assert (again.session_id, again.epoch, again.resumed) == (first.session_id, first.epoch + 1, True)
    assert await store.value("SELECT renewed_at FROM session") == 5000
    assert await store.renew(first) == set()
    assert await store.renew(again) == {again.session_id}


async def test_renewals_never_go_back(store: Store) -> None:
    session = await store.hello()
    await store.set_clock(5000)
    await store.renew(session)
    await store.set_clock(4000)
    await store.renew(session)
    assert await store.value("SELECT renewed_at FROM session") == 5000


async def test_a_strangers_session_is_not_resumed(store: Store) -> None:
    first = await store.hello()
    other = await store.hello("agent-two", session_id=first.session_id)
    assert other.session_id != first.session_id


async def test_a_new_session_supersedes_the_old_and_adopts_what_is_held(store: Store) -> None:
    lease = await store.running()
    old = lease.session
    lease.session = await store.hello()
    assert lease.session.session_id != old.session_id
    assert await store.renew(old) == set()
    assert await standing(store, lease, holds(lease)) == ({lease.lease_id: Answer.KEEP}, [])
    assert await store.value("SELECT session_id FROM lease") == lease.session.session_id


async def test_a_lease_not_listed_is_asked_for_and_released(store: Store) -> None:
    lease = await store.running()
    lease.session = await store.hello()
    assert await standing(store, lease) == ({}, [(lease.job, lease.lease_id)])
    assert await store.where(lease.job) == "lease", "omission proves nothing"
    assert await store.report(lease, End(outcome=None)) == [Verdict.RECORDED]
    assert await store.where(lease.job) == "ready"


async def test_an_offer_of_the_resumed_session_is_not_asked_for(store: Store) -> None:
    session = await store.hello()
    (lease,) = await store.claim(await store.submit(), session)
    lease.session = await store.hello(session_id=session.session_id)
    assert await standing(store, lease) == ({}, [])
    rows = await store.database.fetch("read_deliveries", session_ids=[session.session_id])
    assert [row["lease_id"] for row in rows] == [lease.lease_id], "it is sent again"


async def test_answers_tell_ended_from_stale_and_from_an_end_under_way(store: Store) -> None:
    session = await store.hello()
    ended, draining, stale, late = await store.claim(await store.submit(4), session)
    await store.report(ended, succeeded())
    await store.report(draining, Phase(LeasePhase.RUNNING))
    await store.report(draining, succeeded(final_log_offset=9))
    for lease in (stale, late):
        await store.report(lease, End(outcome=Outcome.LOST))
    never = Leased(ended.job, 1, session, ended.agent_id)
    decisions, _ = await standing(
        store, ended, holds(ended), holds(draining), holds(stale), holds(late, LeasePhase.DRAINING), holds(never)
    )
    assert decisions == {
        ended.lease_id: Answer.ENDED,
        draining.lease_id: Answer.ENDED,
        stale.lease_id: Answer.STALE,
        late.lease_id: Answer.KEEP,
        never.lease_id: Answer.STALE,
    }


async def lost(store: Store) -> Leased:
    """A job whose lease has expired, and that waits again."""
    lease = await store.running()
    await store.set_clock(62_201)
    assert [row["lease_id"] for row in await store.expire()] == [lease.lease_id]
    assert await store.where(lease.job) == "ready"
    return lease


async def test_a_job_that_its_agent_has_finished_is_kept_for_the_end_that_comes(store: Store) -> None:
    lease = await lost(store)
    await hold_back(store.database, lease.agent_id, [holds(lease, LeasePhase.DRAINING)])
    assert await store.where(lease.job) == "delayed"
    lease.session = await store.hello()
    assert await store.claim([lease.job], lease.session) == []
    assert (await standing(store, lease, holds(lease, LeasePhase.DRAINING)))[0] == {lease.lease_id: Answer.KEEP}
    assert await store.report(lease, succeeded()) == [Verdict.RECORDED]
    assert await store.where(lease.job) == "SUCCEEDED"
    assert await store.value("SELECT count(*) FROM attempt") == 1


async def test_an_end_that_does_not_come_is_not_waited_for_without_end(store: Store) -> None:
    lease = await lost(store)
    now = datetime.now(UTC)
    await hold_back(store.database, lease.agent_id, [holds(lease, LeasePhase.DRAINING)], now)
    counters = await store.counters(lease.job)
    for seconds, place in ((4.9, "delayed"), (5, "ready")):
        await store.database.fetch("promote", epoch=store.epoch, now=now + timedelta(seconds=seconds))
        assert await store.where(lease.job) == place
    assert await store.counters(lease.job) == counters
    session = await store.hello("agent-two")
    assert len(await store.claim([lease.job], session, agent_id="agent-two")) == 1


async def test_nothing_is_kept_for_whoever_has_no_end_of_it(store: Store) -> None:
    lease = await lost(store)
    await hold_back(store.database, lease.agent_id, [holds(lease)])
    await hold_back(store.database, "agent-two", [holds(lease, LeasePhase.DRAINING)])
    await hold_back(store.database, lease.agent_id, [Held(lease.job, lease.lease_id - 1, LeasePhase.DRAINING)])
    assert await store.where(lease.job) == "ready"
    other = await store.hello("agent-two")
    (again,) = await store.claim([lease.job], other, agent_id="agent-two")
    await store.report(again, End(outcome=None))
    # It waits again, but under a newer lease: the end of the first is stale.
    await hold_back(store.database, lease.agent_id, [holds(lease, LeasePhase.DRAINING)])
    assert await store.where(lease.job) == "ready"


async def test_a_rebooted_host_loses_its_leases_after_two_intervals_not_a_ttl(store: Store) -> None:
    lease = await store.running()
    lease.session = await store.hello(boot_id="boot-2")
    await store.set_clock(2000)
    assert await store.expire() == []
    await store.set_clock(2001)
    assert [row["lease_id"] for row in await store.expire()] == [lease.lease_id]
    assert await store.counters(lease.job) == (1, 0, 1)


@pytest.mark.parametrize(
    "facts",
    [
        {"boot_id": "boot-1"},
        {"boot_id": ""},
        {"boot_id": "boot-2", "hardware_id": ""},
    ],
    ids=["same boot", "boot unknown", "hardware unknown"],
)
async def test_without_proof_the_leases_run_out(store: Store, facts: dict[str, Any]) -> None:
    lease = await store.running()
    await store.hello(**facts)
    await store.set_clock(62_200)
    assert await store.expire() == []
    assert await store.where(lease.job) == "lease"


async def test_other_hardware_is_refused_while_leases_stand(store: Store) -> None:
    lease = await store.running()
    with pytest.raises(AgentIdentityInUse, match="host"):
        await store.hello(hardware_id="another", hostname="thief")
    assert await store.renew(lease.session) == {lease.session.session_id}
    await store.report(lease, succeeded())
    assert (await store.hello(hardware_id="another")).epoch == 1


async def test_gpus_that_are_gone_are_forgotten(store: Store) -> None:
    await store.hello(gpus=4)
    await store.hello(gpus=2)
    assert await store.value("SELECT count(*) FROM gpu") == 2

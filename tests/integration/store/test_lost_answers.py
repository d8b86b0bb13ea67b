"""A connection is reset in mid-commit: whether it was committed is found out by asking again, never guessed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lessor.lifecycle import LeasePhase
from lessor.v1 import job_pb2
from lessor_server.bells import Bells
from lessor_server.domain.errors import DatabaseUnavailable
from lessor_server.maintenance.leadership import Leadership
from lessor_server.maintenance.reaper import Reaper
from lessor_server.store.claims import Offer, claim
from lessor_server.store.database import Database
from lessor_server.store.reports import Phase, Report, Verdict, commit_reports
from tests.support.postgres_proxy import Fate, PostgresProxy
from tests.support.store import Leased, Store, failed, open_store, succeeded

LOST = pytest.mark.parametrize("fate", [Fate.LOSE_REQUEST, Fate.LOSE_ANSWER], ids=["request lost", "answer lost"])


class Line:
    """The store, and a way to it that a test can cut."""

    def __init__(self, store: Store, proxy: PostgresProxy, far: Store) -> None:
        self.store = store
        self.proxy = proxy
        self.far = far
        """The same store by way of the proxy."""

    @property
    def database(self) -> Database:
        return self.far.database


@pytest.fixture
async def line(store: Store) -> AsyncIterator[Line]:
    async with PostgresProxy(store.database.url) as proxy, open_store(proxy.url) as far:
        store.epoch = far.epoch
        yield Line(store, proxy, far)


async def commit_end(line: Line, report: Report) -> list[Verdict]:
    return (await commit_reports(line.database, [report])).verdicts


@LOST
@pytest.mark.parametrize("deduped", [False, True], ids=["plain", "deduped"])
async def test_a_submit_said_again_is_one_job(line: Line, fate: Fate, deduped: bool) -> None:
    options: dict[str, Any] = {"dedupe_key": "key"} if deduped else {}
    await line.far.submit(request_id="before", name="warm up the caches")
    line.proxy.expect("COMMIT" if deduped else "INSERT INTO request", fate)
    with pytest.raises(DatabaseUnavailable):
        await line.far.submit(request_id="r", **options)
    await line.proxy.happened.wait()
    stored = await line.store.value("SELECT job_ids FROM request WHERE request_id = 'r'")
    assert (stored is not None) is (fate is Fate.LOSE_ANSWER)
    jobs = await line.far.submit(request_id="r", **options)
    assert stored in (None, jobs)
    assert await line.store.value("SELECT count(*) FROM job") == 2
    assert await line.store.where(jobs[0]) == "ready"


@LOST
async def test_a_claim_of_an_ended_term_changes_nothing_and_a_made_one_is_found(line: Line, fate: Fate) -> None:
    session = await line.store.hello()
    (job,) = await line.store.submit()
    await line.store.database.fetch("resign", epoch=line.far.epoch)
    leader = Leadership(line.database, "one", lambda: 0.0)
    await leader.step()
    term = leader.epoch
    assert term is not None
    line.proxy.expect("INSERT INTO lease (", fate)
    offers = [Offer(job, session.session_id, session.epoch, ())]
    with pytest.raises(DatabaseUnavailable):
        await claim(line.database, term, offers)
    await line.proxy.happened.wait()
    # What planning does before it looks again.
    await leader.renew_term()
    assert await claim(line.database, term, offers) == []
    assert leader.epoch is not None
    again = await claim(line.database, leader.epoch, offers)
    assert len(again) == (1 if fate is Fate.LOSE_REQUEST else 0)
    assert await line.store.value("SELECT array_agg(attempt) FROM lease") == [1]
    assert await line.store.where(job) == "lease"


async def test_a_claim_under_way_is_waited_for_by_the_new_term(line: Line) -> None:
    """Its connection is cut off, its statement arrives after all: late, and in a term that is over."""
    session = await line.store.hello()
    (job,) = await line.store.submit()
    line.proxy.expect("INSERT INTO lease (", Fate.HOLD)
    offers = [Offer(job, session.session_id, session.epoch, ())]
    late = asyncio.create_task(claim(line.database, line.far.epoch, offers))
    await line.proxy.happened.wait()
    await line.store.lead("another")
    (lease,) = await line.store.claim([job], session)
    line.proxy.release()
    assert await late == []
    assert await line.store.value("SELECT array_agg(lease_id) FROM lease") == [lease.lease_id]


@LOST
async def test_an_end_said_again_is_recorded_once(line: Line, fate: Fate) -> None:
    lease = await line.store.running()
    report = line.store.said(lease, succeeded())
    line.proxy.expect("cut_off", fate)
    with pytest.raises(DatabaseUnavailable):
        await commit_end(line, report)
    await line.proxy.happened.wait()
    assert await line.store.where(lease.job) == ("SUCCEEDED" if fate is Fate.LOSE_ANSWER else "lease")
    assert await commit_end(line, report) == [Verdict.RECORDED]
    assert await line.store.where(lease.job) == "SUCCEEDED"
    assert await line.store.value("SELECT count(*) FROM attempt WHERE job_id = $1", lease.job) == 1


@LOST
async def test_a_failure_said_again_is_counted_once(line: Line, fate: Fate) -> None:
    lease = await line.store.running(retry=job_pb2.RetryPolicy(max_failures=3))
    report = line.store.said(lease, failed())
    line.proxy.expect("cut_off", fate)
    with pytest.raises(DatabaseUnavailable):
        await commit_end(line, report)
    await line.proxy.happened.wait()
    assert await commit_end(line, report) == [Verdict.RECORDED]
    assert await line.store.counters(lease.job) == (1, 1, 0)


@LOST
async def test_an_expiry_done_again_loses_a_lease_once(line: Line, fate: Fate) -> None:
    lease = await line.store.running()
    await line.store.database.fetch("resign", epoch=line.far.epoch)
    leader = Leadership(line.database, "one", lambda: 0.0)
    await leader.step()
    await line.store.set_clock(62_201)
    reaper = Reaper(line.database, leader, Bells())
    line.proxy.expect("superseded", fate)
    with pytest.raises(DatabaseUnavailable):
        await reaper.step()
    await line.proxy.happened.wait()
    assert await line.store.where(lease.job) == ("ready" if fate is Fate.LOSE_ANSWER else "lease")
    await reaper.step()
    assert await line.store.counters(lease.job) == (1, 0, 1)
    # What the agent says meanwhile of a lease that it does not know to be lost still finishes the job.
    assert await line.store.report(lease, succeeded()) == [Verdict.RECORDED]
    assert await line.store.where(lease.job) == "SUCCEEDED"


@LOST
async def test_a_hello_said_again_has_a_newer_epoch(line: Line, fate: Fate) -> None:
    session = await line.far.hello()
    line.proxy.expect("COMMIT", fate)
    with pytest.raises(DatabaseUnavailable):
        await line.far.hello(session_id=session.session_id)
    await line.proxy.happened.wait()
    again = await line.far.hello(session_id=session.session_id)
    assert again.resumed
    assert again.epoch == session.epoch + (2 if fate is Fate.LOSE_ANSWER else 1)
    assert await line.store.renew(session) == set()
    assert await line.store.renew(again) == {again.session_id}


@LOST
async def test_an_accept_said_again_is_recorded(line: Line, fate: Fate) -> None:
    session = await line.store.hello()
    (job,) = await line.store.submit()
    (lease,) = await line.store.claim([job], session)
    accept = [line.store.said(lease, Phase(LeasePhase.ACCEPTED))]
    line.proxy.expect("UPDATE lease", fate)
    with pytest.raises(DatabaseUnavailable):
        await commit_reports(line.database, accept)
    await line.proxy.happened.wait()
    assert (await commit_reports(line.database, accept)).verdicts == [Verdict.RECORDED]


@LOST
async def test_time_is_never_counted_twice(line: Line, fate: Fate) -> None:
    clock = [0.0]
    await line.store.database.fetch("resign", epoch=line.far.epoch)
    leader = Leadership(line.database, "one", lambda: clock[0])
    await leader.step()
    line.proxy.expect("clock = clock +", fate)
    clock[0] += 0.25
    await leader.step()
    await line.proxy.happened.wait()
    clock[0] += 0.25
    await leader.step()
    assert leader.clock_ms == (500 if fate is Fate.LOSE_ANSWER else 250), "never more than has passed"


@LOST
async def test_a_take_over_that_may_have_happened_is_tried_again(line: Line, fate: Fate) -> None:
    clock = [0.0]
    await line.store.database.fetch("resign", epoch=line.far.epoch)
    candidate = Leadership(line.database, "one", lambda: clock[0])
    line.proxy.expect("SET epoch = epoch + 1, holder =", fate)
    await candidate.step()
    await line.proxy.happened.wait()
    assert candidate.epoch is None
    # Its own name may stand there by now, like that of a leader that does not beat.
    for _ in range(2):
        await candidate.step()
        clock[0] += 1.5
    await candidate.step()
    assert candidate.epoch is not None
    assert await line.store.value("SELECT epoch FROM leader") == candidate.epoch


@LOST
async def test_a_new_term_that_may_have_begun_is_lost_or_led(line: Line, fate: Fate) -> None:
    clock = [0.0]
    await line.store.database.fetch("resign", epoch=line.far.epoch)
    leader = Leadership(line.database, "one", lambda: clock[0])
    await leader.step()
    old = leader.epoch
    line.proxy.expect("AND holder =", fate)
    with pytest.raises(DatabaseUnavailable):
        await leader.renew_term()
    await line.proxy.happened.wait()
    await leader.renew_term()
    if fate is Fate.LOSE_ANSWER:
        assert leader.epoch is None, "the row has a term that nobody knows to be in"
        for _ in range(2):
            await leader.step()
            clock[0] += 1.5
    await leader.step()
    assert leader.epoch is not None
    assert old is not None
    assert leader.epoch > old
    session = await line.store.hello()
    (job,) = await line.store.submit()
    assert await line.store.claim([job], session, epoch=old) == []
    assert len(await line.store.claim([job], session, epoch=leader.epoch)) == 1


@LOST
async def test_a_renewal_said_again_renews(line: Line, fate: Fate) -> None:
    lease: Leased = await line.store.running()
    await line.store.set_clock(5000)
    line.proxy.expect("SET renewed_at", fate)
    with pytest.raises(DatabaseUnavailable):
        await line.far.renew(lease.session)
    await line.proxy.happened.wait()
    assert await line.far.renew(lease.session) == {lease.session.session_id}

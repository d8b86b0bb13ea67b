"""Races of two connections, stopped at barriers, in both orders."""

from __future__ import annotations

import asyncio
import random

import pytest

from lessor.lifecycle import LeasePhase
from lessor.v1 import job_service_pb2
from lessor_server.maintenance.reaper import LEASE_EXPIRED
from lessor_server.store.claims import Offer, claim
from lessor_server.store.database import Transaction
from lessor_server.store.fleet_status import set_drained
from lessor_server.store.hello import Answer, Held, take_standing
from lessor_server.store.reports import Phase, Verdict, commit_reports
from tests.support.races import held_at_leader, overtake
from tests.support.store import MIN_WAIT_MS, Leased, Store, failed, succeeded

OVERDUE_MS = 10_000_000


async def expire_on(transaction: Transaction, store: Store) -> int:
    rows = await transaction.fetch(
        "expire", epoch=store.epoch, now=None, min_wait_ms=MIN_WAIT_MS, max_leases=1000, error=LEASE_EXPIRED
    )
    return len(rows)


async def renew_on(transaction: Transaction, lease: Leased) -> int:
    session = lease.session
    return len(await transaction.fetch("renew", session_ids=[session.session_id], epochs=[session.epoch]))


async def claim_on(transaction: Transaction, store: Store, job: int, session_id: int, epoch: int) -> int:
    return len(await claim(transaction, store.epoch, [Offer(job, session_id, epoch)]))


class TestRenewAndExpire:
    async def test_a_renewal_under_way_keeps_the_lease(self, store: Store) -> None:
        lease = await store.running()
        await store.set_clock(OVERDUE_MS)
        renewed, expired = await overtake(store, lambda t: renew_on(t, lease), store.expire)
        assert (renewed, expired) == (1, [])
        assert await store.where(lease.job) == "lease"

    async def test_an_expiry_under_way_refuses_the_renewal(self, store: Store) -> None:
        lease = await store.running()
        await store.set_clock(OVERDUE_MS)
        expired, renewed = await overtake(store, lambda t: expire_on(t, store), lambda: store.renew(lease.session))
        assert (expired, renewed) == (1, set()), "a renewal acked beside the reassignment is a double run"

    async def test_the_time_is_checked_again_under_the_lock(self, store: Store) -> None:
        lease = await store.running()
        await store.set_clock(OVERDUE_MS)
        expired = await held_at_leader(store, store.expire, lambda: store.renew(lease.session))
        assert expired == []
        assert await store.where(lease.job) == "lease"


class TestEndAndExpire:
    async def test_an_end_under_way_wins(self, store: Store) -> None:
        lease = await store.running()
        await store.set_clock(OVERDUE_MS)
        reports = [store.said(lease, succeeded())]
        committed, expired = await overtake(store, lambda t: commit_reports(t, reports), store.expire)
        assert (committed.verdicts, expired) == ([Verdict.RECORDED], [])
        assert await store.where(lease.job) == "SUCCEEDED"

    async def test_an_end_after_an_expiry_under_way_still_finishes_the_job(self, store: Store) -> None:
        lease = await store.running()
        await store.set_clock(OVERDUE_MS)
        expired, verdicts = await overtake(
            store, lambda t: expire_on(t, store), lambda: store.report(lease, succeeded())
        )
        assert (expired, verdicts) == (1, [Verdict.RECORDED])
        assert await store.where(lease.job) == "SUCCEEDED"

    async def test_two_ends_of_one_lease_are_one(self, store: Store) -> None:
        lease = await store.running()
        reports = [store.said(lease, succeeded())]
        committed, verdicts = await overtake(
            store, lambda t: commit_reports(t, reports), lambda: store.report(lease, failed())
        )
        assert (committed.verdicts, verdicts) == ([Verdict.RECORDED], [Verdict.RECORDED])
        assert await store.where(lease.job) == "SUCCEEDED"


class TestLateEndAndClaim:
    async def lost(self, store: Store) -> Leased:
        lease = await store.running()
        await store.set_clock(OVERDUE_MS)
        await store.expire()
        lease.session = await store.hello(session_id=lease.session.session_id)
        return lease

    async def test_a_claim_under_way_makes_the_end_stale(self, store: Store) -> None:
        lease = await self.lost(store)
        session = lease.session
        claimed, verdicts = await overtake(
            store,
            lambda t: claim_on(t, store, lease.job, session.session_id, session.epoch),
            lambda: store.report(lease, succeeded()),
        )
        assert (claimed, verdicts) == (1, [Verdict.STALE])
        assert await store.where(lease.job) == "lease"

    async def test_a_late_end_under_way_leaves_nothing_to_claim(self, store: Store) -> None:
        lease = await self.lost(store)
        reports = [store.said(lease, succeeded())]
        committed, claimed = await overtake(
            store, lambda t: commit_reports(t, reports), lambda: store.claim([lease.job], lease.session)
        )
        assert (committed.verdicts, claimed) == ([Verdict.RECORDED], [])
        assert await store.where(lease.job) == "SUCCEEDED"


class TestCancelAndClaim:
    async def test_a_cancel_waits_for_the_claim_and_finds_the_lease(self, store: Store) -> None:
        session = await store.hello()
        (job,) = await store.submit()
        claimed, results = await overtake(
            store,
            lambda t: claim_on(t, store, job, session.session_id, session.epoch),
            lambda: store.jobs.cancel([job]),
        )
        assert (claimed, results) == (1, [job_service_pb2.CANCEL_RESULT_REQUESTED])
        assert await store.value("SELECT cancel_requested FROM lease") is True

    async def test_a_claim_leaves_out_a_job_being_cancelled(self, store: Store) -> None:
        session = await store.hello()
        (job,) = await store.submit()
        _, claimed = await overtake(
            store,
            lambda t: t.fetch("cancel_waiting", job_ids=[job], now=None, outcome=3, final_state=6, error=None),
            lambda: store.claim([job], session),
        )
        assert claimed == []
        assert await store.where(job) == "CANCELLED"


class TestDrainAndClaim:
    async def test_a_claim_planned_before_a_drain_makes_no_lease_after_it(self, store: Store) -> None:
        session = await store.hello()
        jobs = await store.submit(2)
        leases = await held_at_leader(
            store,
            lambda: store.claim(jobs, session),
            lambda: set_drained(store.database, "agent-one", True),
        )
        assert leases == []
        assert [await store.where(job) for job in jobs] == ["ready", "ready"]

    async def test_a_drain_waits_for_the_claim_and_then_sees_its_lease(self, store: Store) -> None:
        session = await store.hello()
        (job,) = await store.submit()

        async def drain() -> int:
            await set_drained(store.database, "agent-one", True)
            return int(await store.value("SELECT count(*) FROM lease WHERE agent_id = 'agent-one'"))

        granted, seen = await overtake(
            store, lambda t: claim_on(t, store, job, session.session_id, session.epoch), drain
        )
        assert (granted, seen) == (1, 1)

    @pytest.mark.parametrize("resumes", [False, True], ids=["new_session", "same_session"])
    async def test_a_drained_agent_stays_so_when_it_comes_back(self, store: Store, resumes: bool) -> None:
        before = await store.hello()
        await set_drained(store.database, "agent-one", True)
        await store.database.pool.execute("UPDATE session SET drained = false")  # a server of an older schema
        session = await store.hello(session_id=before.session_id if resumes else 0)
        assert session.resumed == resumes
        jobs = await store.submit()
        assert await store.claim(jobs, session) == []
        await set_drained(store.database, "agent-one", False)
        assert len(await store.claim(jobs, session)) == 1


class TestCancelAndRequeue:
    async def test_a_cancel_follows_the_job_through_a_requeue(self, store: Store) -> None:
        lease = await store.running()
        await store.set_clock(OVERDUE_MS)
        expired, results = await overtake(store, lambda t: expire_on(t, store), lambda: store.jobs.cancel([lease.job]))
        assert (expired, results) == (1, [job_service_pb2.CANCEL_RESULT_CANCELLED])
        assert await store.where(lease.job) == "CANCELLED"

    async def test_an_expiry_after_a_cancel_under_way_honours_it(self, store: Store) -> None:
        lease = await store.running()
        await store.set_clock(OVERDUE_MS)
        _, expired = await overtake(store, lambda t: t.fetch("cancel_leased", job_ids=[lease.job]), store.expire)
        assert expired == []
        await store.expire()
        assert await store.where(lease.job) == "CANCELLED"


class TestClaimAndTakeOver:
    async def test_a_take_over_waits_for_the_claim_and_sees_it(self, store: Store) -> None:
        session = await store.hello()
        (job,) = await store.submit()
        claimed, _ = await overtake(
            store,
            lambda t: claim_on(t, store, job, session.session_id, session.epoch),
            lambda: store.lead("another"),
        )
        assert claimed == 1
        assert await store.where(job) == "lease"

    async def test_an_old_leaders_claim_finds_its_epoch_gone(self, store: Store) -> None:
        session = await store.hello()
        (job,) = await store.submit()
        (row,) = await store.database.fetch("read_leader")
        _, claimed = await overtake(
            store,
            lambda t: t.fetch("take_over", holder="another", seen_epoch=row["epoch"], seen_beat=row["beat"]),
            lambda: store.claim([job], session),
        )
        assert claimed == []
        assert await store.where(job) == "ready"

    async def test_of_two_candidates_one_takes_over(self, store: Store) -> None:
        (row,) = await store.database.fetch("read_leader")
        seen = {"seen_epoch": row["epoch"], "seen_beat": row["beat"]}
        first, second = await overtake(
            store,
            lambda t: t.fetch("take_over", holder="one", **seen),
            lambda: store.database.fetch("take_over", holder="two", **seen),
        )
        assert (len(first), len(second)) == (1, 0)


class TestHelloAndAccept:
    async def offered(self, store: Store) -> Leased:
        session = await store.hello()
        (lease,) = await store.claim(await store.submit(), session)
        return lease

    async def test_an_accept_under_way_is_kept(self, store: Store) -> None:
        lease = await self.offered(store)
        reports = [store.said(lease, Phase(LeasePhase.ACCEPTED))]

        async def hello() -> int:
            session = await store.hello(session_id=lease.session.session_id)
            held = [Held(lease.job, lease.lease_id, LeasePhase.ACCEPTED)]
            standing = await take_standing(store.database, lease.agent_id, session, held)
            return standing.answers[0].decision

        committed, decision = await overtake(store, lambda t: commit_reports(t, reports), hello)
        assert (committed.verdicts, decision) == ([Verdict.RECORDED], Answer.KEEP)
        assert await store.value("SELECT phase FROM lease") == LeasePhase.ACCEPTED

    async def test_after_the_hello_the_accept_must_be_said_again(self, store: Store) -> None:
        lease = await self.offered(store)
        old = store.said(lease, Phase(LeasePhase.ACCEPTED))
        lease.session = await store.hello(session_id=lease.session.session_id)
        assert (await store.commit([old])).verdicts == [Verdict.SUPERSEDED]
        assert await store.report(lease, Phase(LeasePhase.ACCEPTED)) == [Verdict.RECORDED]
        assert await store.value("SELECT count(*) FROM lease") == 1

    async def test_a_claim_for_a_session_saying_hello_waits_and_is_refused(self, store: Store) -> None:
        session = await store.hello()
        (job,) = await store.submit()
        _, claimed = await overtake(
            store,
            lambda t: t.fetch(
                "resume_session", session_id=session.session_id, agent_id="agent-one", heartbeat_ms=1000, replica="r"
            ),
            lambda: store.claim([job], session),
        )
        assert claimed == []
        assert await store.where(job) == "ready"


class TestSameKeySubmits:
    async def test_many_submits_of_one_request_are_one_job(self, store: Store) -> None:
        answers = await asyncio.gather(*(store.submit(request_id="same") for _ in range(50)))
        assert len({answer[0] for answer in answers}) == 1
        assert await store.value("SELECT count(*) FROM job") == 1
        assert await store.value("SELECT count(*) FROM ready") == 1

    async def test_a_submit_waits_for_the_same_request_under_way(self, store: Store) -> None:
        await store.submit(request_id="warm the catalog")

        async def insert(transaction: Transaction) -> None:
            await transaction.connection.execute(
                "INSERT INTO request VALUES ('tester', 'same', '\\x00', ARRAY[7::bigint], now())"
            )

        _, error = await overtake(
            store, insert, lambda: asyncio.gather(store.submit(request_id="same"), return_exceptions=True)
        )
        assert type(error[0]).__name__ == "RequestIdReused"
        assert await store.value("SELECT count(*) FROM job") == 1

    @pytest.mark.parametrize("same_request", [True, False])
    async def test_many_submits_of_one_dedupe_key_are_one_job(self, store: Store, same_request: bool) -> None:
        answers = await asyncio.gather(
            *(store.submit(request_id="r" if same_request else f"r{n}", dedupe_key="k") for n in range(20))
        )
        assert len({answer[0] for answer in answers}) == 1
        assert await store.value("SELECT count(*) FROM job") == 1


class TestLockOrder:
    async def test_renewals_and_ends_of_the_same_rows_in_any_order_do_not_deadlock(self, store: Store) -> None:
        sessions = [await store.hello(f"agent-{n:04}") for n in range(20)]
        leases: list[Leased] = []
        for number, session in enumerate(sessions):
            leases += await store.claim(await store.submit(5), session, agent_id=f"agent-{number:04}")
        shuffle = random.Random(7).sample

        async def renew() -> None:
            await store.renew(*shuffle(sessions, len(sessions)))

        async def advance() -> None:
            await store.commit([store.said(lease, Phase(LeasePhase.RUNNING)) for lease in shuffle(leases, len(leases))])

        async def end() -> None:
            await store.commit([store.said(lease, succeeded()) for lease in shuffle(leases, len(leases))])

        async def cancel() -> None:
            await store.jobs.cancel([lease.job for lease in shuffle(leases, len(leases))])

        await asyncio.gather(*(work() for _ in range(10) for work in (renew, advance, cancel)), end(), end())
        assert await store.value("SELECT count(*) FROM attempt WHERE final_state IN (4, 6)") == 100
        assert await store.value("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == 0

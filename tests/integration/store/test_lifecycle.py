"""The contract of each contended statement: what it moves, returns and leaves alone."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from lessor.lifecycle import LeasePhase, Outcome
from lessor.v1 import job_pb2, job_service_pb2
from lessor_server.domain.budgets import REJECTED_DELAY, Fate, fate, requeue_delay
from lessor_server.domain.errors import JobNotTerminal, QueueNotFound, RequestIdReused
from lessor_server.domain.states import JobState
from lessor_server.maintenance.reaper import QUEUE_TIMEOUT
from lessor_server.store.claims import Offer, claim
from lessor_server.store.logs import Chunk, append
from lessor_server.store.reports import Checkpoint, End, Phase, Verdict, finish_drained
from tests.support.store import Store, failed, job_spec, succeeded


def lost() -> End:
    return End(outcome=Outcome.LOST)


async def test_a_job_goes_from_submit_to_success(store: Store) -> None:
    lease = await store.running()
    assert await store.where(lease.job) == "lease"
    assert await store.report(lease, succeeded(result=b"{}")) == [Verdict.RECORDED]
    assert await store.where(lease.job) == "SUCCEEDED"
    states = await store.database.pool.fetch("SELECT unnest(states) AS s FROM event ORDER BY xid, id")
    assert [row["s"] for row in states] == [1, 2, 3, 4]


async def test_a_batch_is_stored_in_order(store: Store) -> None:
    numbers = await store.submit(500)
    assert numbers == sorted(numbers)
    assert await store.value("SELECT count(*) FROM ready") == 500


async def test_a_repeated_request_makes_no_second_job(store: Store) -> None:
    first = await store.submit(3, request_id="r1")
    assert await store.submit(3, request_id="r1") == first
    assert await store.value("SELECT count(*) FROM job") == 3


async def test_a_request_id_stands_for_one_thing(store: Store) -> None:
    await store.submit(request_id="r1")
    with pytest.raises(RequestIdReused):
        await store.submit(2, request_id="r1")


async def test_an_unknown_queue_stores_nothing(store: Store) -> None:
    with pytest.raises(QueueNotFound):
        await store.submit(queue="nowhere")
    assert await store.value("SELECT count(*) FROM job") == 0


async def test_two_leases_of_a_job_cannot_be_stored(store: Store) -> None:
    lease = await store.running()
    columns = (
        "member, lease_id, session_id, agent_id, attempt, phase, queue_id, shape_id, priority, failures, losses, "
        "max_failures, max_losses, backoff_initial_ms, backoff_max_ms, dedupe_key, ttl_ms, gpu_uuids, offered_at, "
        "granted_at"
    )
    with pytest.raises(asyncpg.UniqueViolationError):
        await store.database.pool.execute(
            f"INSERT INTO lease (job_id, {columns}) SELECT job_id, {columns} FROM lease WHERE job_id = $1", lease.job
        )


async def test_a_gpu_cannot_be_held_twice(store: Store) -> None:
    session = await store.hello(gpus=1)
    one, two = await store.submit(2)
    await store.claim([one], session, gpus=["GPU-agent-one-0"])
    with pytest.raises(asyncpg.UniqueViolationError):
        await store.claim([two], session, gpus=["GPU-agent-one-0"])
    assert await store.where(two) == "ready"


async def test_lease_numbers_grow(store: Store) -> None:
    session = await store.hello()
    leases = await store.claim(await store.submit(100), session)
    assert len({lease.lease_id for lease in leases}) == 100
    (later,) = await store.claim(await store.submit(1), session)
    assert later.lease_id > max(lease.lease_id for lease in leases)


@pytest.mark.parametrize("outcome", list(Outcome))
async def test_the_fate_in_sql_is_the_fate_of_the_domain(store: Store, outcome: Outcome) -> None:
    cases = list(itertools.product((0, 1, 2), (0, 1, 2), (0, 1, 3), (0, 1, 3), (True, False), (True, False)))
    async with store.database.pool.acquire() as connection:
        for failures, losses, max_failures, max_losses, retryable, cancel in cases:
            row = await connection.fetchrow(
                "SELECT final_state_of($1::smallint, $2, $3, $4, $5, $6, $7) AS final_state, "
                "failures_after($1::smallint, $2, $7) AS new_failures, "
                "losses_after($1::smallint, $3, $7) AS new_losses, backs_off($1::smallint) AS backs_off",
                outcome, failures, losses, max_failures, max_losses, retryable, cancel,
            )  # fmt: skip
            assert row is not None
            expected = fate(
                outcome,
                failures=failures,
                losses=losses,
                max_failures=max_failures,
                max_losses=max_losses,
                retryable=retryable,
                cancel_requested=cancel,
            )
            assert row["final_state"] == expected.final, (outcome, failures, losses, max_failures, max_losses)
            assert (row["new_failures"], row["new_losses"]) == (expected.failures, expected.losses)
            if expected.final is None:
                assert row["backs_off"] == (expected.backoff or expected.delay > timedelta(0))


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.TIMED_OUT, Outcome.REJECTED])
async def test_the_wait_in_sql_is_the_wait_of_the_domain(store: Store, outcome: Outcome) -> None:
    hour = timedelta(hours=1)
    for count, initial, jitter in itertools.product(range(1, 80, 3), (timedelta(0), timedelta(seconds=3)), (-1.0, 0.3)):
        end = Fate(None, failures=count, losses=0, backoff=outcome is not Outcome.REJECTED, delay=REJECTED_DELAY)
        waited_ms = await store.value(
            "SELECT backoff_ms($1::smallint, $2, $2, $3, $4, $5)",
            outcome, count, initial // timedelta(milliseconds=1), hour // timedelta(milliseconds=1), jitter,
        )  # fmt: skip
        expected = requeue_delay(end, count, initial, hour, jitter)
        assert waited_ms == pytest.approx(expected / timedelta(milliseconds=1))


async def test_a_failure_waits_out_its_backoff(store: Store) -> None:
    lease = await store.running(retry=job_pb2.RetryPolicy(max_failures=2))
    await store.report(lease, failed())
    assert await store.where(lease.job) == "delayed"
    assert await store.counters(lease.job) == (1, 1, 0)
    assert await store.database.fetch("promote", epoch=store.epoch, now=datetime.now(UTC) - timedelta(hours=1)) == []
    later = datetime.now(UTC) + timedelta(seconds=2)
    assert len(await store.database.fetch("promote", epoch=store.epoch, now=later)) == 1
    assert await store.where(lease.job) == "ready"


async def test_an_exhausted_failure_budget_fails_the_job(store: Store) -> None:
    lease = await store.running()
    await store.report(lease, failed())
    assert await store.where(lease.job) == "FAILED"


async def test_an_exhausted_loss_budget_fails_the_job(store: Store) -> None:
    lease = await store.running(retry=job_pb2.RetryPolicy(max_losses=1))
    await store.report(lease, lost())
    assert await store.where(lease.job) == "FAILED"


async def test_a_loss_costs_no_failure(store: Store) -> None:
    lease = await store.running()
    await store.report(lease, lost())
    assert await store.where(lease.job) == "ready"
    assert await store.counters(lease.job) == (1, 0, 1)


async def test_a_release_of_an_offer_costs_nothing(store: Store) -> None:
    session = await store.hello()
    (lease,) = await store.claim(await store.submit(), session)
    assert await store.report(lease, End(outcome=None)) == [Verdict.RECORDED]
    assert await store.counters(lease.job) == (1, 0, 0)


async def test_a_release_after_accept_is_a_loss(store: Store) -> None:
    session = await store.hello()
    (lease,) = await store.claim(await store.submit(), session)
    await store.report(lease, Phase(LeasePhase.ACCEPTED))
    await store.report(lease, End(outcome=None))
    assert await store.counters(lease.job) == (1, 0, 1)


async def test_a_refused_offer_waits_a_moment(store: Store) -> None:
    session = await store.hello()
    (lease,) = await store.claim(await store.submit(), session)
    await store.report(lease, End(outcome=Outcome.REJECTED))
    assert await store.where(lease.job) == "delayed"
    assert await store.counters(lease.job) == (1, 0, 0)


async def test_events_of_one_batch_keep_their_order(store: Store) -> None:
    session = await store.hello()
    (lease,) = await store.claim(await store.submit(), session)
    events: list[Phase | Checkpoint | End] = [
        Phase(LeasePhase.ACCEPTED),
        Phase(LeasePhase.RUNNING),
        Checkpoint("c1"),
        succeeded(),
    ]
    assert await store.report(lease, *events) == [Verdict.RECORDED] * 4
    assert await store.where(lease.job) == "SUCCEEDED"


async def test_repeated_events_are_recorded_once(store: Store) -> None:
    lease = await store.running()
    for event in (Phase(LeasePhase.ACCEPTED), Phase(LeasePhase.RUNNING), succeeded(), succeeded()):
        assert await store.report(lease, event) == [Verdict.RECORDED]
    assert await store.value("SELECT count(*) FROM attempt") == 1


async def test_an_end_waits_for_its_log(store: Store) -> None:
    lease = await store.running()
    assert await store.report(lease, succeeded(final_log_offset=5)) == [Verdict.RECORDED]
    assert await store.where(lease.job) == "lease"
    chunk = Chunk(lease.job, lease.lease_id, lease.agent_id, 0, 1, b"hello", datetime.now(UTC))
    positions = await append(store.database, [chunk])
    assert positions[lease.lease_id].end_offset == 5
    assert await finish_drained(store.database, [lease.job]) == {lease.job}
    assert await store.where(lease.job) == "SUCCEEDED"


async def test_gpus_are_free_while_the_log_drains(store: Store) -> None:
    session = await store.hello(gpus=1)
    (lease,) = await store.claim(await store.submit(), session, gpus=["GPU-agent-one-0"])
    await store.report(lease, succeeded(final_log_offset=5))
    assert await store.value("SELECT count(*) FROM lease_gpu") == 0


async def test_an_expired_drain_takes_its_stored_outcome(store: Store) -> None:
    lease = await store.running()
    await store.report(lease, succeeded(final_log_offset=5))
    await store.set_clock(10_000_000)
    (row,) = await store.expire()
    assert row["outcome"] == Outcome.SUCCEEDED
    assert await store.where(lease.job) == "SUCCEEDED"
    assert await store.value("SELECT logs_truncated_at FROM attempt") == 0


async def test_a_drain_the_agent_forgot_is_truncated(store: Store) -> None:
    lease = await store.running()
    await store.report(lease, succeeded(final_log_offset=5))
    assert await store.report(lease, End(outcome=None)) == [Verdict.RECORDED]
    assert await store.where(lease.job) == "SUCCEEDED"
    assert await store.value("SELECT logs_truncated_at FROM attempt") == 0


async def test_log_bytes_are_stored_exactly_once_and_in_order(store: Store) -> None:
    lease = await store.running()

    def chunk(offset: int, data: bytes, stream: int = 1) -> Chunk:
        return Chunk(lease.job, lease.lease_id, lease.agent_id, offset, stream, data, datetime.now(UTC))

    await append(store.database, [chunk(0, b"abc"), chunk(3, b"de", 2)])
    again = await append(store.database, [chunk(0, b"abc"), chunk(3, b"de", 2)])
    assert again[lease.lease_id].end_offset == 5
    gap = await append(store.database, [chunk(9, b"x")])
    assert gap[lease.lease_id].end_offset == 5
    done = await append(store.database, [chunk(5, b"f")])
    position = done[lease.lease_id]
    assert (position.end_offset, position.stdout_bytes, position.stderr_bytes) == (6, 4, 2)
    rows = await store.database.pool.fetch("SELECT data FROM log_chunk ORDER BY start_offset")
    assert b"".join(row["data"] for row in rows) == b"abcdef"


async def test_a_strangers_log_is_not_stored(store: Store) -> None:
    lease = await store.running()
    chunk = Chunk(lease.job, lease.lease_id, "agent-two", 0, 1, b"evil", datetime.now(UTC))
    positions = await append(store.database, [chunk])
    assert positions[lease.lease_id].end_offset == 0
    assert await store.value("SELECT count(*) FROM log_chunk") == 0


async def test_an_expired_offer_costs_nothing_and_work_counts_as_lost(store: Store) -> None:
    session = await store.hello()
    offered, accepted = await store.claim(await store.submit(2), session)
    await store.report(accepted, Phase(LeasePhase.ACCEPTED))
    await store.set_clock(62_200)
    assert await store.expire() == []
    await store.set_clock(62_201)
    assert {row["outcome"] for row in await store.expire()} == {Outcome.LOST, Outcome.WITHDRAWN}
    assert await store.counters(offered.job) == (1, 0, 0)
    assert await store.counters(accepted.job) == (1, 0, 1)


async def test_the_log_of_an_offer_whose_answer_was_lost_is_said_to_be_cut(store: Store) -> None:
    session = await store.hello()
    silent, ran = await store.claim(await store.submit(2), session)
    await append(store.database, [Chunk(ran.job, ran.lease_id, ran.agent_id, 0, 1, b"hello", datetime.now(UTC))])
    await store.set_clock(10_000_000)
    assert {row["outcome"] for row in await store.expire()} == {Outcome.WITHDRAWN}
    attempts = await store.database.pool.fetch("SELECT lease_id, log_bytes, logs_truncated_at FROM attempt")
    assert {tuple(row) for row in attempts} == {(silent.lease_id, 0, None), (ran.lease_id, 5, 5)}


async def test_a_short_ttl_expires_before_a_long_one_of_the_same_session(store: Store) -> None:
    session = await store.hello()
    policy = job_pb2.LeasePolicy()
    policy.ttl.FromSeconds(10)
    (short,) = await store.claim(await store.submit(lease=policy), session)
    (long,) = await store.claim(await store.submit(), session)
    await store.set_clock(11_201)
    assert [row["lease_id"] for row in await store.expire()] == [short.lease_id]
    assert await store.where(long.job) == "lease"
    assert await store.renew(session) == set(), "the session must say hello again"


async def test_a_late_end_finishes_a_job_nobody_took(store: Store) -> None:
    lease = await store.running()
    await store.set_clock(10_000_000)
    await store.expire()
    assert await store.counters(lease.job) == (1, 0, 1)
    lease.session = await store.hello(session_id=lease.session.session_id)
    assert await store.report(lease, succeeded()) == [Verdict.RECORDED]
    assert await store.where(lease.job) == "SUCCEEDED"
    assert await store.value("SELECT losses FROM attempt WHERE final_state = 4") == 0
    assert await store.value("SELECT count(*) FROM attempt") == 1


async def test_a_late_failure_refunds_the_loss_and_counts(store: Store) -> None:
    lease = await store.running(retry=job_pb2.RetryPolicy(max_failures=2))
    await store.set_clock(10_000_000)
    await store.expire()
    await store.report(lease, failed())
    assert await store.counters(lease.job) == (1, 1, 0)


async def test_a_late_end_after_a_new_claim_is_stale(store: Store) -> None:
    old = await store.running()
    await store.set_clock(10_000_000)
    await store.expire()
    other = await store.hello("agent-two")
    (new,) = await store.claim([old.job], other, agent_id="agent-two")
    assert await store.report(old, succeeded()) == [Verdict.STALE]
    assert await store.report(new, succeeded()) == [Verdict.RECORDED]
    assert await store.where(old.job) == "SUCCEEDED"
    assert await store.report(old, failed()) == [Verdict.STALE]
    assert await store.where(old.job) == "SUCCEEDED"


async def test_stale_tokens_change_nothing(store: Store) -> None:
    lease = await store.running()
    ghost = type(lease)(lease.job, lease.lease_id - 1, lease.session, lease.agent_id)
    for event in (Phase(LeasePhase.RUNNING), Checkpoint("x"), succeeded(), failed(), End(outcome=None)):
        assert await store.report(ghost, event) == [Verdict.STALE]
    stranger = type(lease)(lease.job, lease.lease_id, lease.session, "agent-two")
    assert await store.report(stranger, succeeded()) == [Verdict.STALE]
    assert await store.where(lease.job) == "lease"


async def test_an_accept_in_an_old_epochs_name_is_not_recorded(store: Store) -> None:
    session = await store.hello()
    (lease,) = await store.claim(await store.submit(), session)
    await store.hello(session_id=session.session_id)
    assert await store.report(lease, Phase(LeasePhase.ACCEPTED)) == [Verdict.SUPERSEDED]


async def test_a_claim_in_an_old_epochs_name_finds_nothing(store: Store) -> None:
    session = await store.hello()
    (job,) = await store.submit()
    renewed = await store.hello(session_id=session.session_id)
    assert await store.claim([job], session) == []
    assert len(await store.claim([job], renewed)) == 1


async def test_an_old_leader_claims_and_expires_nothing(store: Store) -> None:
    old = store.epoch
    session = await store.hello()
    one, two = await store.submit(2)
    await store.claim([one], session)
    await store.lead("another")
    await store.set_clock(10_000_000)
    assert await store.claim([two], session, epoch=old) == []
    assert await store.expire(epoch=old) == []
    assert await store.database.fetch("tick", epoch=old, elapsed_ms=5, stood_ms=0) == []


async def test_a_checkpoint_reaches_the_next_attempt(store: Store) -> None:
    lease = await store.running()
    assert await store.report(lease, Checkpoint("a"), Checkpoint("b")) == [Verdict.RECORDED] * 2
    await store.report(lease, lost())
    offer = Offer(lease.job, lease.session.session_id, lease.session.epoch)
    (row,) = await claim(store.database, store.epoch, [offer])
    assert (row["cursor"], row["attempt"]) == ("b", 2)
    assert row["lease_id"] > lease.lease_id


async def test_an_old_checkpoint_does_not_overwrite_a_newer_attempts(store: Store) -> None:
    old = await store.running()
    await store.report(old, lost())
    (new,) = await store.claim([old.job], old.session)
    assert await store.report(new, Checkpoint("new")) == [Verdict.RECORDED]
    assert await store.report(old, Checkpoint("old")) == [Verdict.STALE]
    assert await store.value("SELECT cursor FROM checkpoint") == "new"


@pytest.mark.parametrize("where", ["ready", "delayed"])
async def test_a_waiting_job_is_cancelled_at_once(store: Store, where: str) -> None:
    if where == "ready":
        (job,) = await store.submit()
    else:
        lease = await store.running(retry=job_pb2.RetryPolicy(max_failures=2))
        await store.report(lease, failed())
        job = lease.job
    assert await store.jobs.cancel([job]) == [job_service_pb2.CANCEL_RESULT_CANCELLED]
    assert await store.where(job) == "CANCELLED"
    assert await store.jobs.cancel([job, 12345]) == [
        job_service_pb2.CANCEL_RESULT_ALREADY_TERMINAL,
        job_service_pb2.CANCEL_RESULT_NOT_FOUND,
    ]


@pytest.mark.parametrize(("end", "state"), [(failed(), "CANCELLED"), (succeeded(), "SUCCEEDED"), (lost(), "CANCELLED")])
async def test_a_cancelled_attempt_ends_as_it_ends(store: Store, end: End, state: str) -> None:
    lease = await store.running(retry=job_pb2.RetryPolicy(max_failures=5))
    assert await store.jobs.cancel([lease.job]) == [job_service_pb2.CANCEL_RESULT_REQUESTED]
    await store.report(lease, end)
    assert await store.where(lease.job) == state


async def test_an_expired_lease_honours_the_cancel(store: Store) -> None:
    lease = await store.running()
    await store.jobs.cancel([lease.job])
    await store.set_clock(10_000_000)
    await store.expire()
    assert await store.where(lease.job) == "CANCELLED"


async def test_a_queue_timeout_fails_a_job_never_started(store: Store) -> None:
    timeouts = job_pb2.Timeouts()
    timeouts.queue.FromSeconds(60)
    (job,) = await store.submit(timeouts=timeouts)

    async def time_out(now: datetime) -> int:
        rows = await store.database.fetch(
            "time_out_queued", epoch=store.epoch, now=now, outcome=int(Outcome.TIMED_OUT),
            final_state=int(JobState.FAILED), error=QUEUE_TIMEOUT,
        )  # fmt: skip
        return len(rows)

    assert await time_out(datetime.now(UTC) + timedelta(seconds=55)) == 0
    assert await time_out(datetime.now(UTC) + timedelta(seconds=61)) == 1
    assert await store.where(job) == "FAILED"


async def test_an_unanswered_offer_is_asked_back(store: Store) -> None:
    session = await store.hello()
    (lease,) = await store.claim(await store.submit(), session)

    async def ask_back() -> list[tuple[int, int]]:
        rows = await store.database.fetch("ask_back", epoch=store.epoch, now=None, offer_ttl_ms=10_000)
        return [(row["lease_id"], row["revoke"]) for row in rows]

    await store.set_clock(10_000)
    assert await ask_back() == []
    await store.set_clock(10_001)
    assert await ask_back() == [(lease.lease_id, 2)]
    assert await ask_back() == []
    await store.report(lease, Phase(LeasePhase.ACCEPTED))
    assert await store.value("SELECT revoke FROM lease") is None


async def test_a_late_start_is_asked_back(store: Store) -> None:
    timeouts = job_pb2.Timeouts()
    timeouts.start.FromSeconds(60)
    session = await store.hello()
    (lease,) = await store.claim(await store.submit(timeouts=timeouts), session)
    await store.report(lease, Phase(LeasePhase.ACCEPTED))
    later = datetime.now(UTC) + timedelta(seconds=61)
    rows = await store.database.fetch("ask_back", epoch=store.epoch, now=later, offer_ttl_ms=10_000)
    assert [row["revoke"] for row in rows] == [5]


async def test_a_dedupe_key_is_held_until_the_job_fails(store: Store) -> None:
    (first,) = await store.submit(dedupe_key="k")
    assert await store.submit(dedupe_key="k") == [first]
    session = await store.hello()
    (lease,) = await store.claim([first], session)
    assert await store.submit(dedupe_key="k") == [first]
    await store.report(lease, failed())
    (second,) = await store.submit(dedupe_key="k")
    assert second != first


async def test_a_dedupe_key_is_held_by_a_success_and_given_up_by_a_cancel(store: Store) -> None:
    (first,) = await store.submit(dedupe_key="k")
    (lease,) = await store.claim([first], await store.hello())
    await store.report(lease, succeeded())
    assert await store.submit(dedupe_key="k") == [first]
    (other,) = await store.submit(dedupe_key="other")
    await store.jobs.cancel([other])
    assert await store.submit(dedupe_key="other") != [other]


async def test_equal_keys_in_one_batch_are_one_job(store: Store) -> None:
    specs = [job_spec(dedupe_key="k"), job_spec(), job_spec(dedupe_key="k")]
    submitted = await store.jobs.submit("tester", "r1", specs)
    assert submitted.job_numbers[0] == submitted.job_numbers[2] != submitted.job_numbers[1]
    assert await store.value("SELECT count(*) FROM job") == 2


async def test_a_retry_is_a_new_job_and_takes_the_key(store: Store) -> None:
    (first,) = await store.submit(dedupe_key="k", labels={"a": "b"})
    with pytest.raises(JobNotTerminal):
        await store.jobs.retry("tester", "", first)
    (lease,) = await store.claim([first], await store.hello())
    await store.report(lease, succeeded())
    second = await store.jobs.retry("tester", "retry-1", first)
    assert await store.jobs.retry("tester", "retry-1", first) == second != first
    assert await store.where(first) == "SUCCEEDED"
    assert await store.value("SELECT retry_of FROM job WHERE id = $1", second) == first
    assert await store.submit(dedupe_key="k", labels={"a": "b"}) == [second]

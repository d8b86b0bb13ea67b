"""Storing requests: many in one statement, what their jobs share sent once, each row as it was given."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from lessor_server.domain.errors import RequestIdReused
from lessor_server.store.submit import JobRow, JobTerms, Request, Submitted, submit_batch, submit_deduped
from tests.support.store import Store

NOW = datetime.now(UTC).replace(microsecond=0)

JOB_COLUMNS = """
    SELECT j.queue_id, j.shape_id, j.priority, j.ttl_ms, j.start_timeout_ms, j.max_failures, j.max_losses,
        j.backoff_initial_ms, j.backoff_max_ms, j.retry_of, j.name, j.labels, j.spec, j.dedupe_key, j.submitted_at,
        r.queue_id AS ready_queue_id, r.shape_id AS ready_shape_id, r.priority AS ready_priority, r.queue_deadline
    FROM job AS j JOIN ready AS r ON r.job_id = j.id WHERE j.id = $1
"""

FIRST = JobTerms(1, 7, 0, 60_000, None, None, 1, 10, 1000, 300_000)
SECOND = JobTerms(2, 8, -5, 30_000, 2000, 90_000, 3, 4, 500, 7000, retry_of=77)


def job(terms: JobTerms, name: str, labels: dict[str, str] | None = None, key: str | None = None) -> JobRow:
    return JobRow(terms, name, json.dumps(labels or {}), f"spec of {name}".encode(), key)


def request(request_id: str, *jobs: JobRow, fingerprint: bytes = b"f") -> Request:
    return Request("tester", request_id, fingerprint, jobs)


async def numbers(store: Store, *requests: Request) -> list[list[int]]:
    answers = await submit_batch(store.database, requests, NOW)
    found = []
    for answer in answers:
        assert isinstance(answer, Submitted)
        found.append(answer.job_numbers)
    return found


async def assert_stored(store: Store, number: int, row: JobRow) -> None:
    stored = await store.database.pool.fetchrow(JOB_COLUMNS, number)
    assert stored is not None
    terms = row.terms
    deadline = None if terms.queue_timeout_ms is None else NOW + timedelta(milliseconds=terms.queue_timeout_ms)
    assert tuple(stored) == (
        terms.queue_id, terms.shape_id, terms.priority, terms.ttl_ms, terms.start_timeout_ms, terms.max_failures,
        terms.max_losses, terms.backoff_initial_ms, terms.backoff_max_ms, terms.retry_of, row.name,
        json.loads(row.labels_json), row.spec, row.dedupe_key, NOW, terms.queue_id, terms.shape_id, terms.priority,
        deadline,
    )  # fmt: skip


async def test_each_job_gets_its_own_values_whatever_the_others_share(store: Store) -> None:
    equal = JobTerms(1, 7, 0, 60_000, None, None, 1, 10, 1000, 300_000)
    one = request("one", job(SECOND, "a"), job(FIRST, "b", {"k": "é"}), job(SECOND, "c"), job(equal, "d"))
    two = request("two", job(FIRST, "e"))
    three = request("three", job(SECOND, "f", {"x": "y"}), job(FIRST, "g"))
    batch = (two, one, three)
    found = await numbers(store, *batch)
    for stored, given in zip(found, batch, strict=True):
        assert len(stored) == len(given.jobs)
        for number, row in zip(stored, given.jobs, strict=True):
            await assert_stored(store, number, row)
    assert len({number for stored in found for number in stored}) == 7


async def test_jobs_without_any_labels(store: Store) -> None:
    ((one, two),) = await numbers(store, request("r", job(FIRST, "a"), job(SECOND, "b")))
    await assert_stored(store, one, job(FIRST, "a"))
    await assert_stored(store, two, job(SECOND, "b"))


async def test_numbers_grow_in_the_order_of_the_jobs_and_one_event_tells_of_all(store: Store) -> None:
    given = request("r", *(job((FIRST, SECOND)[number % 2], f"n{number}") for number in range(700)))
    (found,) = await numbers(store, given)
    names = await store.database.pool.fetch("SELECT name FROM job ORDER BY id")
    assert [row["name"] for row in names] == [row.name for row in given.jobs]
    (event,) = await store.database.pool.fetch("SELECT job_ids, states, attempts FROM event")
    assert sorted(event["job_ids"]) == sorted(found)
    assert event["states"] == [1] * 700
    assert event["attempts"] == [0] * 700


async def test_requests_of_one_batch_that_were_made_before_are_answered_beside_new_ones(store: Store) -> None:
    ((earlier,),) = await numbers(store, request("earlier", job(FIRST, "a")))
    answers = await submit_batch(
        store.database,
        [
            request("new", job(SECOND, "b"), job(SECOND, "c")),
            request("earlier", job(FIRST, "a")),
            request("new", job(SECOND, "b"), job(SECOND, "c")),
            request("earlier", job(SECOND, "other"), fingerprint=b"other"),
        ],
        NOW,
    )
    new, again, same, reused = answers
    assert isinstance(new, Submitted)
    assert not new.existing
    assert again == Submitted([earlier], existing=True)
    assert same == Submitted(new.job_numbers, existing=True)
    assert isinstance(reused, RequestIdReused)
    assert await store.database.pool.fetchval("SELECT count(*) FROM job") == 3


async def test_a_full_batch_of_single_submits(store: Store) -> None:
    batch = [request(f"r{number}", job((FIRST, SECOND)[number % 2], f"n{number}")) for number in range(1000)]
    found = await numbers(store, *batch)
    for number in (0, 1, 500, 999):
        await assert_stored(store, found[number][0], batch[number].jobs[0])


async def test_deduped_jobs_beside_others(store: Store) -> None:
    row = job(SECOND, "b", {"k": "v"}, key="key")
    first = await submit_deduped(store.database, request("one", job(FIRST, "a"), row, row), NOW)
    a, b, same = first.job_numbers
    assert b == same
    await assert_stored(store, a, job(FIRST, "a"))
    await assert_stored(store, b, row)
    second = await submit_deduped(store.database, request("two", row, job(FIRST, "c")), NOW)
    assert second.job_numbers[0] == b
    await assert_stored(store, second.job_numbers[1], job(FIRST, "c"))
    third = await submit_deduped(store.database, request("three", row), NOW)
    assert third == Submitted([b], existing=True)


@pytest.mark.parametrize("jobs", [99, 100, 1500])
async def test_small_and_large_requests_go_in_beside_each_other(store: Store, jobs: int) -> None:
    assert len(await store.submit(jobs)) == jobs
    assert len(await store.submit(1)) == 1

"""What is stored of a spec, to the byte; and that a large request lets others have their turn."""

from __future__ import annotations

import asyncio

import pytest
from google.protobuf import text_format

from lessor.v1 import job_pb2
from lessor_server.domain.errors import InvalidField, TooLarge
from lessor_server.domain.shape import Selector, SelectorOperator, Shape
from lessor_server.services.submission import MAX_SPEC_BYTES, SPECS_PER_SLICE, Submission, Submissions

PLAIN = Shape(1000, 0, 0, "", 0, (), "process", 15_000, False)

MINIMAL = 'command { argv: "/bin/true" }'
EVERYTHING = """
    name: "näme" queue: "q" labels { key: "b" value: "2" } labels { key: "a" value: "1é" } runtime: "docker"
    command {
        argv: "python" argv: "x.py" env { key: "Z" value: "1" } env { key: "A" value: "2" } working_dir: "/w" user: "me"
    }
    resources { cpu_millis: 0 memory_bytes: 5 gpu_count: 2 gpu_model: "H200" gpu_memory_bytes: 7 }
    selectors { key: "zone" operator: SELECTOR_OPERATOR_IN values: "b" values: "a" }
    selectors { key: "ok" operator: SELECTOR_OPERATOR_EXISTS }
    priority: -3
    retry {
        max_failures: 4 max_losses: 5 backoff_initial { nanos: 500000000 } backoff_max { seconds: 7 nanos: 999999 }
    }
    timeouts { queue { seconds: 1 nanos: 1999999 } start { seconds: 2 } run { seconds: 3 } }
    lease { ttl { seconds: 30 } grace { seconds: 4 } } dedupe_key: "k"
"""
SHORT = 'command { argv: "/a/b/" } lease { ttl { seconds: 10 } }'
EMPTY_PARTS = 'command { argv: "\\001" } resources {} retry {} timeouts {} lease {}'
ZEROS = (
    'command { argv: "a" } retry { backoff_initial {} backoff_max {} } lease { grace {} } timeouts { run { nanos: 1 } }'
)

RETRY_AND_LEASE = b'J\r\x08\x01\x10\n\x1a\x02\x08\x01"\x03\x08\xac\x02'
STORED = {
    MINIMAL: b'\n\x04true\x12\x07default"\x07process*\x0b\n\t/bin/true2\x03\x08\xe8\x07'
    + RETRY_AND_LEASE
    + b"Z\x08\n\x02\x08<\x12\x02\x08\n",
    EVERYTHING: b'\n\x05n\xc3\xa4me\x12\x01q\x1a\x08\n\x01a\x12\x031\xc3\xa9\x1a\x06\n\x01b\x12\x012"\x06docker*&\n'
    b'\x06python\n\x04x.py\x12\x06\n\x01A\x12\x012\x12\x06\n\x01Z\x12\x011\x1a\x02/w"\x02me2\x0e\x08\x00\x10\x05'
    b'\x18\x02"\x04H200(\x07:\x0e\n\x04zone\x10\x01\x1a\x01b\x1a\x01a:\x06\n\x02ok\x10\x03@\xfd\xff\xff\xff\xff\xff'
    b'\xff\xff\xff\x01J\x14\x08\x04\x10\x05\x1a\x06\x10\x80\xca\xb5\xee\x01"\x06\x08\x07\x10\xbf\x84=R\x10\n\x06\x08'
    b"\x01\x10\xff\x88z\x12\x02\x08\x02\x1a\x02\x08\x03Z\x08\n\x02\x08\x1e\x12\x02\x08\x04b\x01k",
    SHORT: b'\n\x01b\x12\x07default"\x07process*\x07\n\x05/a/b/2\x03\x08\xe8\x07'
    + RETRY_AND_LEASE
    + b"Z\x0e\n\x02\x08\n\x12\x08\x08\x01\x10\x80\xd2\x93\xad\x03",
    EMPTY_PARTS: b'\n\x03job\x12\x07default"\x07process*\x03\n\x01\x012\x03\x08\xe8\x07'
    + RETRY_AND_LEASE
    + b"R\x00Z\x08\n\x02\x08<\x12\x02\x08\n",
    ZEROS: b'\n\x01a\x12\x07default"\x07process*\x03\n\x01a2\x03\x08\xe8\x07J\x08\x08\x01\x10\n\x1a\x00"\x00R\x04\x1a'
    b"\x02\x10\x01Z\x06\n\x02\x08<\x12\x00",
}
"""What is said of these specs since the first server; fingerprints of requests depend on each byte."""

FREEZES = b"Z\x02\x18\x01"
STOPS = b"Z\x02\x18\x02"


def spec(text: str) -> job_pb2.JobSpec:
    return text_format.Parse(text, job_pb2.JobSpec())


async def prepared(*texts: str, submissions: Submissions | None = None) -> list[Submission]:
    return await (submissions or Submissions()).prepare_all([spec(text) for text in texts], single=False)


@pytest.mark.parametrize("text", STORED)
async def test_what_is_said_is_the_same_to_the_byte(text: str) -> None:
    (submission,) = await prepared(text)
    assert submission.said == STORED[text]
    assert submission.spec == STORED[text] + (STOPS if "docker" in text else FREEZES)


async def test_terms_found_again_are_those_of_the_spec() -> None:
    submissions = Submissions()
    for _ in range(2):
        found = await prepared(*STORED, submissions=submissions)
        assert [submission.said for submission in found] == list(STORED.values())


async def test_defaults() -> None:
    (submission,) = await prepared(MINIMAL)
    terms = submission.terms
    assert (submission.name, submission.labels_json, submission.dedupe_key) == ("true", "{}", None)
    assert (terms.queue, terms.shape, terms.priority) == ("default", PLAIN, 0)
    assert (terms.ttl_ms, terms.start_timeout_ms, terms.queue_timeout_ms) == (60_000, None, None)
    assert (terms.max_failures, terms.max_losses) == (1, 10)
    assert (terms.backoff_initial_ms, terms.backoff_max_ms) == (1000, 300_000)


async def test_everything_given() -> None:
    (submission,) = await prepared(EVERYTHING)
    terms = submission.terms
    assert (submission.name, submission.labels_json) == ("näme", '{"a": "1\\u00e9", "b": "2"}')
    assert submission.dedupe_key == "k"
    selectors = (Selector("ok", SelectorOperator.EXISTS), Selector("zone", SelectorOperator.IN, ("a", "b")))
    assert terms.shape == Shape(0, 5, 2, "h200", 7, selectors, "docker", 7500, True)
    assert (terms.queue, terms.priority) == ("q", -3)
    assert (terms.ttl_ms, terms.start_timeout_ms, terms.queue_timeout_ms) == (30_000, 2000, 1001)
    assert (terms.max_failures, terms.max_losses) == (4, 5)
    assert (terms.backoff_initial_ms, terms.backoff_max_ms) == (500, 7000)


async def test_a_zero_that_is_given_is_no_default() -> None:
    (submission,) = await prepared(ZEROS)
    assert (submission.terms.backoff_initial_ms, submission.terms.backoff_max_ms) == (0, 0)


async def test_a_prepared_spec_prepared_again_stays_as_it_is() -> None:
    """A retry takes the stored spec."""
    for text, encoded in STORED.items():
        submissions = Submissions()
        await prepared(text, submissions=submissions)
        stored = job_pb2.JobSpec.FromString(encoded + FREEZES)
        if stored.runtime == "docker":
            stored.lease.on_lost = job_pb2.ON_LEASE_LOST_STOP
        expected = stored.SerializeToString(deterministic=True)
        (again,) = await submissions.prepare_all([stored], single=True)
        assert again.spec == expected


@pytest.mark.parametrize(
    "other",
    [
        'queue: "q"', 'runtime: "docker"', "priority: 1", 'command { user: "me" }', "resources { gpu_count: 1 }",
        "resources { cpu_millis: 0 }", "retry { max_failures: 2 }", "retry { backoff_max { seconds: 1 } }",
        "timeouts { queue { seconds: 1 } }", "timeouts { start { seconds: 1 } }", "lease { ttl { seconds: 30 } }",
        "lease { grace { seconds: 1 } }", "lease { on_lost: ON_LEASE_LOST_STOP }",
        'selectors { key: "a" operator: SELECTOR_OPERATOR_EXISTS }',
    ],
)  # fmt: skip
async def test_each_of_the_terms_tells_jobs_apart(other: str) -> None:
    changed = spec(MINIMAL)
    changed.MergeFrom(spec(other))
    alike = spec(f'{MINIMAL} name: "n" labels {{ key: "a" }} dedupe_key: "k"')
    one, two, same = await Submissions().prepare_all([spec(MINIMAL), changed, alike], single=False)
    assert one.terms is not two.terms
    assert one.terms is same.terms


async def test_all_specs_whose_grace_leaves_no_room_are_named() -> None:
    bad = f"{MINIMAL} lease {{ ttl {{ seconds: 10 }} grace {{ seconds: 10 }} on_lost: ON_LEASE_LOST_STOP }}"
    with pytest.raises(InvalidField) as refused:
        await prepared(MINIMAL, bad, MINIMAL, bad)
    assert [field for field, _ in refused.value.violations] == ["specs[1].lease.grace", "specs[3].lease.grace"]
    with pytest.raises(InvalidField) as refused:
        await Submissions().prepare_all([spec(bad)], single=True)
    assert [field for field, _ in refused.value.violations] == ["spec.lease.grace"]


@pytest.mark.parametrize("on_lost", ["ON_LEASE_LOST_FREEZE", "ON_LEASE_LOST_CONTINUE", "ON_LEASE_LOST_UNSPECIFIED"])
async def test_a_grace_is_bound_by_the_ttl_only_where_the_job_is_to_end_in_it(on_lost: str) -> None:
    text = f"{MINIMAL} lease {{ ttl {{ seconds: 10 }} grace {{ seconds: 600 }} on_lost: %s }}"
    (submission,) = await prepared(text % on_lost)
    assert job_pb2.JobSpec.FromString(submission.spec).lease.grace.seconds == 600
    with pytest.raises(InvalidField, match=r"less than 3\.8 s, or a longer ttl, or let on_lost be FREEZE"):
        await prepared(text % "ON_LEASE_LOST_STOP")
    with pytest.raises(InvalidField, match=r"less than 3\.8 s, or a longer ttl$"):
        await prepared(text % "ON_LEASE_LOST_STOP" + ' runtime: "docker"')


async def test_a_runtime_that_cannot_freeze_is_not_asked_to() -> None:
    text = f'{MINIMAL} runtime: "docker"'
    (submission,) = await prepared(text)
    assert job_pb2.JobSpec.FromString(submission.spec).lease.on_lost == job_pb2.ON_LEASE_LOST_STOP
    with pytest.raises(InvalidField, match="FREEZE: the runtime 'docker' cannot freeze a job: use STOP, or CONTINUE"):
        await prepared(f"{text} lease {{ on_lost: ON_LEASE_LOST_FREEZE }}")


async def test_a_spec_that_is_too_large_is_named_with_its_size() -> None:
    large = spec(MINIMAL)
    large.command.argv.append("x" * MAX_SPEC_BYTES)
    with pytest.raises(TooLarge, match=r"specs\[1\]"):
        await Submissions().prepare_all([spec(MINIMAL), large], single=False)


async def test_the_largest_spec_can_be_submitted_again_as_it_is_stored() -> None:
    """With the late defaults in it, it is larger than what may be submitted."""

    def padded(size: int) -> job_pb2.JobSpec:
        large = spec(MINIMAL)
        large.command.argv.append("x" * size)
        return large

    room = MAX_SPEC_BYTES - 1000
    (smaller,) = await Submissions().prepare_all([padded(room)], single=True)
    size = room + MAX_SPEC_BYTES - len(smaller.said)
    (largest,) = await Submissions().prepare_all([padded(size)], single=True)
    assert len(largest.said) == MAX_SPEC_BYTES
    with pytest.raises(TooLarge):
        await Submissions().prepare_all([padded(size + 1)], single=True)
    stored = largest.spec
    for _ in range(2):
        (again,) = await Submissions().prepare_all([job_pb2.JobSpec.FromString(stored)], single=True, stored=True)
        stored = again.spec
    assert job_pb2.JobSpec.FromString(stored) == job_pb2.JobSpec.FromString(largest.spec)


async def test_more_terms_than_are_remembered() -> None:
    submissions = Submissions()
    texts = [f"{MINIMAL} resources {{ memory_bytes: {number} }}" for number in range(5000)]
    found = await prepared(*texts, submissions=submissions)
    assert [submission.terms.shape.memory_bytes for submission in found] == list(range(5000))


async def test_a_large_request_lets_others_have_their_turn() -> None:
    count = 10_000
    specs = [spec(MINIMAL)] * count
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    try:
        assert len(await Submissions().prepare_all(specs, single=False)) == count
    finally:
        beside.cancel()
    assert turns >= count / SPECS_PER_SLICE - 1

"""The compiled rules never call a message valid that protovalidate, or the rule on NUL characters, refuses."""

from __future__ import annotations

import random

import protovalidate
import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from lessor.v1 import agent_service_pb2 as agents_pb
from lessor.v1 import job_pb2
from lessor.v1 import job_service_pb2 as pb
from lessor_server.domain.errors import InvalidField
from lessor_server.rpc.rules import keeps_rules
from lessor_server.rpc.texts import nul_paths
from lessor_server.rpc.validation import check
from tests.support.contract import all_messages, copy_field, new, random_message

SEED = 20260401
TRIES = 300


def a_spec() -> job_pb2.JobSpec:
    """Every field set, to something good."""
    return job_pb2.JobSpec(
        name="größe 1",
        queue="default",
        labels={"team": "vision", "run": "7"},
        runtime="process",
        command=job_pb2.Command(argv=["/bin/true", ""], env={"SEED": "7"}, working_dir="/w", user="me"),
        resources=job_pb2.Resources(cpu_millis=0, gpu_count=1, gpu_model="H200", gpu_memory_bytes=1 << 34),
        selectors=[job_pb2.LabelSelector(key="zone", operator=job_pb2.SELECTOR_OPERATOR_IN, values=["a"])],
        priority=-1000,
        retry=job_pb2.RetryPolicy(max_failures=1000, backoff_initial=Duration(seconds=1)),
        timeouts=job_pb2.Timeouts(queue=Duration(nanos=1), run=Duration(seconds=31536000)),
        lease=job_pb2.LeasePolicy(ttl=Duration(seconds=10), grace=Duration()),
        dedupe_key="k",
    )


def small_spec() -> job_pb2.JobSpec:
    return job_pb2.JobSpec(command=job_pb2.Command(argv=["/bin/true"]))


SURE: list[Message] = [
    small_spec(),
    a_spec(),
    pb.SubmitJobRequest(request_id="r", spec=a_spec()),
    pb.SubmitJobsRequest(specs=[small_spec(), a_spec()]),
    pb.GetJobRequest(job_id="j0000000000001"),
    agents_pb.ConnectRequest(heartbeat=agents_pb.Heartbeat(seq=1)),
    agents_pb.ConnectRequest(log_chunks=agents_pb.LogChunks(chunks=[
        agents_pb.LogChunk(lease_id=1, stream=job_pb2.LOG_STREAM_STDERR, data=b"\0\xff")
    ])),
    agents_pb.ConnectRequest(lease_events=agents_pb.LeaseEvents(events=[
        agents_pb.LeaseEvent(seq=1, job_id="j0000000000001", lease_id=1, ended=agents_pb.Ended(
            outcome=job_pb2.OUTCOME_FAILED, exit_code=1, error=job_pb2.JobError(type="T", message="m")
        ))
    ])),
]  # fmt: skip


@pytest.mark.parametrize("message", SURE, ids=lambda m: m.DESCRIPTOR.name)
def test_what_comes_often_is_known_to_be_valid_at_once(message: Message) -> None:
    assert protovalidate.collect_violations(message) == []
    assert keeps_rules(message)


@pytest.mark.parametrize("descriptor", all_messages(), ids=lambda d: d.name)
def test_a_message_that_is_called_valid_is_valid(descriptor: Descriptor) -> None:
    rng = random.Random(f"{SEED} {descriptor.full_name}")
    for number in range(TRIES):
        message = random_message(descriptor, rng)
        if keeps_rules(message):
            assert protovalidate.collect_violations(message) == [], f"message {number} of seed {SEED}: {message}"
            assert list(nul_paths(message)) == [], f"message {number} of seed {SEED}: {message}"


@pytest.mark.parametrize("descriptor", all_messages(), ids=lambda d: d.name)
def test_an_empty_message_that_is_called_valid_is_valid(descriptor: Descriptor) -> None:
    message = new(descriptor)
    assert not (keeps_rules(message) and protovalidate.collect_violations(message))


def test_one_wrong_field_of_a_good_spec_is_seen() -> None:
    """Each field in turn takes what is wrong for it, beside others that are right."""
    rng = random.Random(SEED)
    valid = sure = 0
    for _ in range(3000):
        field = rng.choice(job_pb2.JobSpec.DESCRIPTOR.fields)
        good_part, other = a_spec(), new(job_pb2.JobSpec.DESCRIPTOR)
        good_part.ClearField(field.name)  # type: ignore[arg-type]
        for found, value in random_message(job_pb2.JobSpec.DESCRIPTOR, rng).ListFields():
            if found is field:
                copy_field(other, found, value)
        spec = job_pb2.JobSpec()
        spec.MergeFrom(good_part)
        spec.MergeFrom(other)
        good = not protovalidate.collect_violations(spec) and not list(nul_paths(spec))
        valid += good
        sure += keeps_rules(spec)
        assert good or not keeps_rules(spec), spec
    assert 500 < valid < 2500
    assert sure > 0.9 * valid, "few that are valid take the long way"


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (job_pb2.JobSpec(), "work"),
        (job_pb2.JobSpec(command=job_pb2.Command()), "command.argv"),
        (job_pb2.JobSpec(command=job_pb2.Command(argv=[""])), "command"),
        (job_pb2.JobSpec(command=job_pb2.Command(argv=["a"], env={"LESSOR_X": ""})), "command"),
        (job_pb2.JobSpec(command=job_pb2.Command(argv=["a"], working_dir="w")), "command"),
        (job_pb2.JobSpec(queue="q\n", command=job_pb2.Command(argv=["a"])), "queue"),
    ],
)
def test_rules_that_are_compiled_apart_are_worded_by_protovalidate(spec: job_pb2.JobSpec, field: str) -> None:
    assert not keeps_rules(spec)
    with pytest.raises(InvalidField) as refused:
        check(spec)
    assert [name for name, _ in refused.value.violations] == [field]


def test_a_name_that_only_contains_the_reserved_prefix_takes_the_long_way_and_is_allowed() -> None:
    spec = job_pb2.JobSpec(command=job_pb2.Command(argv=["a"], env={"MY_LESSOR_X": ""}))
    assert not keeps_rules(spec)
    check(spec)


def test_the_verdict_on_a_part_is_not_given_to_another_part() -> None:
    """Parts whose rules are not compiled are remembered by what they hold."""
    for gpus, good in ((1, True), (0, False), (1, True), (0, False)):
        resources = job_pb2.Resources(gpu_count=gpus, gpu_model="H200")
        spec = job_pb2.JobSpec(command=job_pb2.Command(argv=["a"]), resources=resources)
        assert keeps_rules(spec) == good


STRING_RULES = {
    "an alternative": b"\x32\x05^a|b$",
    "an escape": b"\x32\x04^\\d$",
    "no end": b"\x32\x02^a",
    "another named class": b"\x32\x0d^[[:alpha:]]$",
    "a rule of another kind": b"\xb0\x01\x01",
    "a rule not made yet": b"\xf8\x3e\x01",
}


@pytest.mark.parametrize("rules", STRING_RULES.values(), ids=STRING_RULES)
def test_of_rules_not_known_here_nothing_is_said(rules: bytes) -> None:
    assert not keeps_rules(_message_with("s", FieldDescriptorProto.TYPE_STRING, _rules(14, rules), "a"))


def test_known_rules_of_a_new_message_are_compiled() -> None:
    rules = _rules(14, b"\x32\x06^[ab]$")
    assert keeps_rules(_message_with("s", FieldDescriptorProto.TYPE_STRING, rules, "a"))
    assert not keeps_rules(_message_with("s", FieldDescriptorProto.TYPE_STRING, rules, "c"))
    assert not keeps_rules(_message_with("s", FieldDescriptorProto.TYPE_STRING, rules, ""))


def test_a_required_field_and_an_ignored_one() -> None:
    integer = FieldDescriptorProto.TYPE_INT32
    assert keeps_rules(_message_with("i", integer, b"\xc8\x01\x01", 1))
    assert not keeps_rules(_message_with("i", integer, b"\xc8\x01\x01", 0))
    # ``ignore`` changes when rules hold: left to protovalidate.
    assert not keeps_rules(_message_with("i", integer, b"\xd8\x01\x01" + _rules(3, b"\x28\x01"), 1))


def _rules(kind: int, rules: bytes) -> bytes:
    return bytes([kind << 3 | 2, len(rules)]) + rules


def _message_with(name: str, kind: FieldDescriptorProto.Type.ValueType, rules: bytes, value: object) -> Message:
    """Returns a message of a type of its own: one field, with rules as they stand in its options."""
    field = FieldDescriptorProto(name=name, number=1, type=kind, label=FieldDescriptorProto.LABEL_OPTIONAL)
    field.options.MergeFromString(b"\xba\x48" + bytes([len(rules)]) + rules)
    file = FileDescriptorProto(
        name="made.proto", syntax="proto3", message_type=[DescriptorProto(name="M", field=[field])]
    )
    pool = DescriptorPool()
    pool.Add(file)
    message = new(pool.FindMessageTypeByName("M"))
    setattr(message, name, value)
    return message

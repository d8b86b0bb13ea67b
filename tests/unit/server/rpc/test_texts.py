"""A character that no text may have is found wherever a message of the contract holds text."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from lessor.v1 import agent_service_pb2, job_pb2
from lessor_server.domain.errors import InvalidField
from lessor_server.rpc.texts import nul_paths
from lessor_server.rpc.validation import check
from tests.support.contract import all_messages, new, text_places

WITH_TEXT = [descriptor for descriptor in all_messages() if any(text_places(descriptor))]


@pytest.mark.parametrize("descriptor", WITH_TEXT, ids=lambda d: d.name)
def test_a_nul_is_found_in_every_text_and_named(descriptor: Descriptor) -> None:
    for path, write in text_places(descriptor):
        message = new(descriptor)
        write(message, "be\0low")
        found = [path.format("be\\0low")]
        assert list(nul_paths(message)) == found
        with pytest.raises(InvalidField) as refused:
            check(message)
        assert (found[0], "must not contain a NUL character") in refused.value.violations


@pytest.mark.parametrize("descriptor", WITH_TEXT, ids=lambda d: d.name)
def test_nothing_is_found_in_other_texts(descriptor: Descriptor) -> None:
    for _, write in text_places(descriptor):
        message = new(descriptor)
        write(message, "below")
        assert list(nul_paths(message)) == []


@pytest.mark.parametrize("descriptor", WITH_TEXT, ids=lambda d: d.name)
def test_a_lone_surrogate_does_not_get_past_the_parser(descriptor: Descriptor) -> None:
    for _, write in text_places(descriptor):
        message = new(descriptor)
        write(message, "~!~")
        encoded = message.SerializeToString().replace(b"~!~", "\udc80".encode(errors="surrogatepass"))
        with pytest.raises(DecodeError):
            type(message).FromString(encoded)


def test_all_places_of_one_message_are_named() -> None:
    command = job_pb2.Command(argv=["a", "\0", "b\0"], env={"A": "\0"}, user="\0")
    assert list(nul_paths(job_pb2.JobSpec(name="x\0", command=command))) == [
        "name",
        "command.argv[1]",
        "command.argv[2]",
        'command.env["A"]',
        "command.user",
    ]


def test_bytes_may_hold_what_text_may_not() -> None:
    chunk = agent_service_pb2.LogChunk(lease_id=1, stream=job_pb2.LOG_STREAM_STDOUT, data=b"\0")
    assert list(nul_paths(chunk)) == []


def test_absent_messages_stay_absent() -> None:
    spec = job_pb2.JobSpec()
    assert list(nul_paths(spec)) == []
    assert spec.ListFields() == []

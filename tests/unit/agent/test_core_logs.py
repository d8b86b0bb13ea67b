"""The core's log flow: offsets, window, fairness, going back."""

from __future__ import annotations

import pytest

from lessor.lifecycle import LeasePhase
from lessor.v1 import job_pb2
from lessor_agent.protocol import actions as act
from lessor_agent.protocol.logflow import MAX_CHUNK_BYTES, RESEND_AFTER_NS, LeaseLog, Position
from lessor_agent.protocol.logwindow import LogWindow
from tests.support.agent_core import SECOND_NS, CoreDriver, its_end_is_known, keep, log_position

pytestmark = pytest.mark.unit

STDOUT, STDERR = job_pb2.LOG_STREAM_STDOUT, job_pb2.LOG_STREAM_STDERR
KIB = 1024


def running(*lease_ids: int, window: int = 0) -> CoreDriver:
    drive = CoreDriver()
    drive.connect(window=window)
    for lease_id in lease_ids:
        drive.bring(lease_id, LeasePhase.RUNNING)
    drive.clear()
    return drive


def written(drive: CoreDriver, lease_id: int, stdout: int, stderr: int = 0) -> None:
    drive.do(drive.core.log_available(lease_id, stdout, stderr, drive.now_ns))


def chunks(drive: CoreDriver, lease_id: int = 1) -> list[tuple[int, int, int, int]]:
    return [
        (log.offset, log.stream, log.file_offset, log.length)
        for log in drive.of(act.SendLog)
        if log.lease_id == lease_id
    ]


def test_one_offset_counts_over_both_streams() -> None:
    drive = running(1)
    written(drive, 1, 10)
    written(drive, 1, 10, 5)
    written(drive, 1, 14, 5)
    assert chunks(drive) == [(0, STDOUT, 0, 10), (10, STDERR, 0, 5), (15, STDOUT, 10, 4)]


def test_chunks_are_at_most_64_kib() -> None:
    drive = running(1)
    written(drive, 1, 150 * KIB)
    assert [length for *_, length in chunks(drive)] == [64 * KIB, 64 * KIB, 22 * KIB]


def test_reading_stops_at_the_window_and_goes_on_with_acks() -> None:
    drive = running(1, window=128 * KIB)
    written(drive, 1, 1024 * KIB)
    assert sum(length for *_, length in chunks(drive)) == 128 * KIB
    drive.clear()
    drive.ack(logs=[log_position(1, stdout=64 * KIB)])
    assert chunks(drive) == [(128 * KIB, STDOUT, 128 * KIB, 64 * KIB)]


def test_a_full_window_holds_no_heartbeat_and_no_event_back() -> None:
    drive = running(1, window=64 * KIB)
    written(drive, 1, 1024 * KIB)
    drive.clear()
    drive.ended(1, stdout=1024 * KIB)
    drive.advance(5 * SECOND_NS)
    assert drive.events() == ["ended"]
    assert len(drive.sent("heartbeat")) == 1


def test_the_window_is_shared_fairly() -> None:
    drive = running(1, 2, window=256 * KIB)
    written(drive, 1, 1024 * KIB)
    assert sum(length for *_, length in chunks(drive, 1)) == 256 * KIB
    written(drive, 2, 1024 * KIB)
    for stdout in (64, 128, 192, 256):
        drive.ack(logs=[log_position(1, stdout=stdout * KIB)])
    assert sum(length for *_, length in chunks(drive, 2)) == 128 * KIB


def test_after_a_reconnect_the_log_goes_on_where_the_server_says() -> None:
    drive = running(1)
    written(drive, 1, 100, 50)
    drive.clear()
    drive.reconnect(keep(1, stdout=100, stderr=20))
    assert chunks(drive) == [(120, STDERR, 20, 30)]


def test_nothing_is_sent_while_the_server_has_not_said_where_to_go_on() -> None:
    drive = running(1)
    drive.lose()
    written(drive, 1, 100)
    drive.advance(10 * SECOND_NS)
    drive.do(drive.core.stream_opened(drive.stream_id, drive.now_ns))
    assert chunks(drive) == []
    drive.welcome(keep(1))
    assert chunks(drive) == [(0, STDOUT, 0, 100)]


def test_an_ack_of_a_part_sends_nothing_twice() -> None:
    drive = running(1)
    written(drive, 1, 100)
    written(drive, 1, 200)
    drive.clear()
    drive.ack(logs=[log_position(1, stdout=100)])
    assert chunks(drive) == []


def test_a_position_that_does_not_move_goes_back_once() -> None:
    drive = running(1)
    written(drive, 1, 100)
    written(drive, 1, 200)
    drive.ack(logs=[log_position(1, stdout=100)])
    drive.clear()
    drive.ack(logs=[log_position(1, stdout=100)])
    assert chunks(drive) == [(100, STDOUT, 100, 100)]
    drive.clear()
    drive.ack(logs=[log_position(1, stdout=100)])
    assert chunks(drive) == []


def test_a_position_behind_what_was_acked_goes_back_to_it() -> None:
    drive = running(1)
    written(drive, 1, 200)
    drive.ack(logs=[log_position(1, stdout=200)])
    drive.clear()
    drive.ack(logs=[log_position(1, stdout=50)])
    assert chunks(drive) == [(50, STDOUT, 50, 150)]


@pytest.mark.parametrize(("offset_ns", "again"), [(-1, False), (0, True)])
def test_bytes_that_are_not_acked_are_sent_again_after_a_while(offset_ns: int, again: bool) -> None:
    drive = running(1)
    written(drive, 1, 100)
    sent_ns = drive.now_ns
    drive.advance(5 * SECOND_NS)
    drive.ack(heartbeat=1)
    drive.clear()
    drive.advance(sent_ns + RESEND_AFTER_NS + offset_ns - drive.now_ns)
    assert bool(chunks(drive)) is again


def test_a_contradictory_position_is_ignored() -> None:
    drive = running(1)
    written(drive, 1, 100)
    drive.clear()
    position = log_position(1, stdout=50)
    position.end_offset = 60
    drive.ack(logs=[position])
    assert chunks(drive) == []


def test_a_lease_is_forgotten_after_its_end_and_its_last_byte_are_acked_in_either_order() -> None:
    for log_first in (True, False):
        drive = running(1)
        written(drive, 1, 100, 10)
        drive.ended(1, stdout=100, stderr=10)
        assert drive.last_event().ended.final_log_offset == 110
        if log_first:
            drive.ack(logs=[log_position(1, stdout=100, stderr=10)])
        else:
            drive.ack_events()
        assert drive.held() == [1]
        if log_first:
            drive.ack_events()
        else:
            drive.ack(logs=[log_position(1, stdout=100, stderr=9)])
            assert drive.held() == [1]
            drive.ack(logs=[log_position(1, stdout=100, stderr=10)])
        assert drive.held() == []


def test_an_end_known_to_the_server_still_has_its_log_finished() -> None:
    drive = running(1)
    written(drive, 1, 100)
    drive.ended(1, stdout=100)
    drive.clear()
    drive.reconnect(its_end_is_known(1, stdout=40))
    assert chunks(drive) == [(40, STDOUT, 40, 60)]
    assert drive.held() == [1]
    drive.ack(logs=[log_position(1, stdout=100)])
    assert drive.held() == []


def test_a_file_that_shrinks_counts_with_its_former_length() -> None:
    drive = running(1)
    written(drive, 1, 100)
    drive.ended(1, stdout=30)
    assert drive.last_event().ended.final_log_offset == 100


def test_a_stale_lease_sends_no_more_log() -> None:
    drive = running(1)
    drive.revoke(1, 4)  # type: ignore[arg-type]
    written(drive, 1, 100)
    assert chunks(drive) == []


def test_a_fresh_agent_goes_on_at_the_servers_position_before_it_has_looked_at_the_files() -> None:
    log = LeaseLog()
    log.resume(Position(100, 50), 0)
    assert log.next_chunk(1000, 0) is None
    log.grow(130, 50)
    chunk = log.next_chunk(1000, 0)
    assert chunk is not None
    assert (chunk.offset, chunk.file_offset, chunk.length) == (150, 100, 30)


def test_many_leases_take_turns() -> None:
    window = LogWindow()
    window.window_bytes = 8 * MAX_CHUNK_BYTES
    for lease_id in range(4):
        log = LeaseLog()
        log.resume(Position(), 0)
        log.grow(10 * MAX_CHUNK_BYTES, 0)
        window.moved(lease_id, log)
    order = [lease_id for lease_id, _ in window.take(0)]
    assert order == [0, 1, 2, 3, 0, 1, 2, 3]

"""The workload's JSON lines."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lessor_agent.workload_events import MAX_LINE_BYTES, EventReader

pytestmark = pytest.mark.unit


def line(**event: object) -> bytes:
    return json.dumps(event).encode() + b"\n"


def test_progress_and_metrics_add_up() -> None:
    reader = EventReader(1)
    first = reader.feed(line(type="progress", fraction=0.25, message="epoch 1")).progress
    second = reader.feed(line(type="metrics", values={"loss": 2}) + line(type="progress", fraction=0.5)).progress
    assert first is not None
    assert (first.fraction, first.message) == (0.25, "epoch 1")
    assert second is not None
    assert (second.fraction, second.message, dict(second.metrics)) == (0.5, "epoch 1", {"loss": 2.0})
    assert second.HasField("update_time")
    assert dict(first.metrics) == {}


def test_a_partial_line_waits_for_its_rest() -> None:
    reader = EventReader(1)
    whole = line(type="checkpoint", cursor="abc")
    assert reader.feed(whole[:10]).checkpoint is None
    assert reader.feed(whole[10:]).checkpoint == "abc"


def test_a_last_line_needs_no_newline() -> None:
    reader = EventReader(1)
    reader.feed(b'{"type": "result", "value": [1, 2]}')
    assert reader.result_json == b""
    reader.finish()
    assert reader.result_json == b"[1,2]"


def test_only_the_newest_checkpoint_of_a_piece_counts() -> None:
    reader = EventReader(1)
    news = reader.feed(b"".join(line(type="checkpoint", cursor=str(step)) for step in range(100)))
    assert news.checkpoint == "99"
    assert reader.feed(b"").checkpoint is None


def test_an_error_is_kept() -> None:
    reader = EventReader(1)
    reader.feed(
        line(type="error", error={"type": "ValueError", "message": "bad", "traceback": "tb", "retryable": False})
    )
    assert reader.error is not None
    assert (reader.error.type, reader.error.message, reader.error.traceback) == ("ValueError", "bad", "tb")
    assert reader.error.retryable is False


@pytest.mark.parametrize(
    "bad",
    [
        b"not json\n",
        b"[1]\n",
        b"\xff\xfe\n",
        line(type="progress", fraction="half"),
        b'{"type": "progress", "fraction": NaN}\n',
        b'{"type": "metrics", "values": {"loss": Infinity}}\n',
        line(type="metrics", values=3),
        line(type="checkpoint", cursor=5),
        line(type="checkpoint", cursor="x" * 70_000),
        line(type="checkpoint", cursor="a\0b"),
        line(type="checkpoint", cursor="a\ud800b"),
        line(type="result"),
        b'{"type": "result", "value": NaN}\n',
        line(type="result", value="x" * 300_000),
        line(type="error", error="bad"),
        line(type="news"),
        line(type=["progress"]),
        b"[" * 100_000 + b"\n",
        b"x" * (MAX_LINE_BYTES + 10) + b"\n",
    ],
)
def test_a_bad_line_is_skipped_and_warned_about_once(bad: bytes, caplog: pytest.LogCaptureFixture) -> None:
    reader = EventReader(7)
    with caplog.at_level(logging.WARNING):
        news = reader.feed(bad + bad + line(type="progress", fraction=0.5))
    assert news.progress is not None
    assert news.progress.fraction == 0.5
    assert (news.checkpoint, reader.result_json, reader.error) == (None, b"", None)
    assert len(caplog.records) == 1


def test_a_huge_line_in_pieces_takes_no_memory_and_ends_with_its_newline() -> None:
    reader = EventReader(1)
    for _ in range(40):
        reader.feed(b"x" * 100_000)
    news = reader.feed(b'{"type": "progress", "fraction": 1}\n' + line(type="progress", fraction=0.5))
    assert news.progress is not None
    assert news.progress.fraction == 0.5


def test_text_that_no_database_takes_is_made_fit() -> None:
    reader = EventReader(1)
    progress = reader.feed(b'{"type": "progress", "message": "a\\u0000b\\ud800c"}\n').progress
    assert progress is not None
    assert progress.message == "a\N{REPLACEMENT CHARACTER}b?c"
    reader.feed(b'{"type": "result", "value": "\\ud800"}\n')
    assert reader.result_json == b'"\\ud800"'


def test_a_fraction_is_kept_between_zero_and_one() -> None:
    reader = EventReader(1)
    progress = reader.feed(line(type="progress", fraction=7)).progress
    assert progress is not None
    assert progress.fraction == 1.0


def test_metrics_are_limited() -> None:
    reader = EventReader(1)
    progress = reader.feed(line(type="metrics", values={f"m{n}": n for n in range(500)})).progress
    assert progress is not None
    assert len(progress.metrics) == 128


@given(st.binary(max_size=300), st.integers(min_value=1, max_value=50))
def test_no_bytes_break_it_and_pieces_make_no_difference(data: bytes, size: int) -> None:
    whole, pieces = EventReader(1), EventReader(1)
    whole.feed(data)
    whole.finish()
    for start in range(0, len(data), size):
        pieces.feed(data[start : start + size])
    pieces.finish()
    assert (whole.result_json, whole.error) == (pieces.result_json, pieces.error)

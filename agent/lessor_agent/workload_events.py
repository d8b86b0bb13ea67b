"""The JSON lines a workload writes to ``$LESSOR_EVENTS``.

One object per line, told apart by ``type``: ``progress`` (fraction, message),
``metrics`` (values), ``checkpoint`` (cursor), ``result`` (value), ``error``
(error: type, message, traceback, retryable). A line that cannot be understood
is skipped and warned about once per attempt: a workload is never failed for
what it says about itself.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from lessor.v1 import job_pb2
from lessor_agent.protocol.outcomes import MAX_CURSOR_BYTES, MAX_RESULT_BYTES, WorkloadError, clip, timestamp

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 1024 * 1024
"""A longer line is skipped."""

MAX_METRICS = 128
MAX_METRIC_NAME_BYTES = 256
MAX_PROGRESS_MESSAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class News:
    """What a piece of the events file brought."""

    progress: job_pb2.Progress | None = None
    """The whole latest progress, if any part of it is new."""
    checkpoint: str | None = None
    """The newest cursor, if there is a new one."""


class EventReader:
    """Reads the events of one attempt, from the first byte on."""

    def __init__(self, lease_id: int) -> None:
        """Makes a reader; ``lease_id`` is for log lines."""
        self._lease_id = lease_id
        self._partial = b""
        self._skipping = False
        self._warned = False
        self._progress = job_pb2.Progress()
        self._progress_is_new = False
        self._checkpoint: str | None = None
        self.result_json = b""
        """The last result, JSON; empty: none."""
        self.error: WorkloadError | None = None
        """The last error the workload reported."""

    def feed(self, data: bytes, now: datetime | None = None) -> News:
        """Takes the next bytes of the file; a partial last line waits for its rest.

        Args:
            data: The bytes that follow those fed before.
            now: When they were read (aware); default: now.
        """
        self._progress_is_new, self._checkpoint = False, None
        lines = (self._partial + data).split(b"\n")
        self._partial = lines.pop()
        if self._skipping and lines:
            # The rest of a line whose beginning was already thrown away.
            del lines[0]
            self._skipping = False
        for line in lines:
            self._take(line)
        if self._skipping or len(self._partial) > MAX_LINE_BYTES:
            self._partial = b""
            if not self._skipping:
                self._skipping = True
                self._warn("a line is longer than 1 MiB")
        if not self._progress_is_new:
            return News(checkpoint=self._checkpoint)
        self._progress.update_time.CopyFrom(timestamp(now or datetime.now(UTC)))
        progress = job_pb2.Progress()
        progress.CopyFrom(self._progress)
        return News(progress, self._checkpoint)

    def skip(self) -> None:
        """The bytes fed next begin somewhere within a line, after others that are not fed: that line is left out."""
        self._partial = b""
        self._skipping = True

    def finish(self) -> News:
        """Takes what is left when the workload is over: a last line needs no newline."""
        return self.feed(b"\n") if self._partial else News()

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        if len(line) > MAX_LINE_BYTES:
            self._warn("a line is longer than 1 MiB")
            return
        try:
            event = json.loads(line)
        except (ValueError, RecursionError) as error:
            self._warn(f"not JSON: {error}")
            return
        if not isinstance(event, dict):
            self._warn("not a JSON object")
            return
        kind = event.get("type")
        if kind == "progress":
            self._take_progress(event)
        elif kind == "metrics":
            self._take_metrics(event.get("values"))
        elif kind == "checkpoint":
            self._take_checkpoint(event.get("cursor"))
        elif kind == "result":
            self._take_result(event)
        elif kind == "error":
            self._take_error(event.get("error"))
        else:
            self._warn(f"unknown type {str(kind)[:40]!r}")

    def _take_progress(self, event: Mapping[str, object]) -> None:
        fraction, message = event.get("fraction"), event.get("message")
        if fraction is not None:
            number = _number(fraction)
            if number is None:
                self._warn("fraction is not a number")
            else:
                self._progress.fraction = min(1.0, max(0.0, number))
                self._progress_is_new = True
        if isinstance(message, str):
            self._progress.message = clip(message, MAX_PROGRESS_MESSAGE_BYTES)
            self._progress_is_new = True
        elif message is not None:
            self._warn("message is not a string")

    def _take_metrics(self, values: object) -> None:
        if not isinstance(values, dict):
            self._warn("metrics without an object of values")
            return
        for name, value in values.items():
            number = _number(value)
            key = clip(str(name), MAX_METRIC_NAME_BYTES)
            if number is None:
                self._warn("a metric is not a finite number")
            elif key not in self._progress.metrics and len(self._progress.metrics) >= MAX_METRICS:
                self._warn(f"more than {MAX_METRICS} metrics")
            else:
                self._progress.metrics[key] = number
                self._progress_is_new = True

    def _take_checkpoint(self, cursor: object) -> None:
        if not isinstance(cursor, str):
            self._warn("checkpoint without a cursor string")
        elif len(cursor.encode("utf-8", "replace")) > MAX_CURSOR_BYTES:
            # Cut off, it would be another cursor.
            self._warn("checkpoint cursor is longer than 64 KiB")
        elif clip(cursor, MAX_CURSOR_BYTES) != cursor:
            self._warn("checkpoint cursor holds a NUL or half a surrogate pair")
        else:
            self._checkpoint = cursor

    def _take_result(self, event: Mapping[str, object]) -> None:
        if "value" not in event:
            self._warn("result without a value")
            return
        try:
            encoded = json.dumps(event["value"], separators=(",", ":"), allow_nan=False).encode("ascii")
        except (ValueError, RecursionError):
            self._warn("result is not valid JSON: it holds NaN or Infinity, or is too deep")
            return
        if len(encoded) > MAX_RESULT_BYTES:
            self._warn("result is larger than 256 KiB")
            return
        self.result_json = encoded

    def _take_error(self, error: object) -> None:
        if not isinstance(error, dict):
            self._warn("error without an object")
            return
        self.error = WorkloadError(
            type=str(error.get("type") or "ERROR"),
            message=str(error.get("message") or ""),
            traceback=str(error.get("traceback") or ""),
            retryable=error.get("retryable") is not False,
        )

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "a line of the workload's events is ignored; further ones are not reported",
                extra={"event": "workload_event_invalid", "lease_id": self._lease_id, "problem": problem},
            )


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None

"""Inside a workload: tells Lessor how a job is doing, and asks what it was given.

    from lessor import job

    start = int(job.last_checkpoint() or 0)
    for step in range(start, steps):
        train(step)
        job.progress(step=step + 1, total=steps)
        if save(step):
            job.checkpoint(str(step + 1))
        if job.cancelled():
            raise SystemExit(143)
    job.result({"accuracy": accuracy})

Standard library only. Outside a Lessor job everything here is harmless: what is
told is checked and then dropped, what is asked is None or False. It may be used
from any thread and any process of the job. The wire format is docs/workload-interface.md.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback as tracebacks
from collections.abc import Mapping
from types import TracebackType
from typing import Any

__all__ = [
    "attempt",
    "cancelled",
    "checkpoint",
    "error",
    "excepthook",
    "fencing_token",
    "id",
    "last_checkpoint",
    "message",
    "metrics",
    "progress",
    "report_exceptions",
    "result",
]

MAX_MESSAGE_BYTES = 4096
MAX_METRICS = 128
MAX_METRIC_NAME_BYTES = 256
MAX_CURSOR_BYTES = 65536
MAX_RESULT_BYTES = 262144
_MAX_ERROR_TYPE_BYTES = 256
_MAX_ERROR_MESSAGE_BYTES = 16384
_MAX_TRACEBACK_BYTES = 65536


# -- what the job was given ----------------------------------------------------


def id() -> str | None:
    """Returns the job's public id; None outside a Lessor job."""
    return os.environ.get("LESSOR_JOB_ID")


def attempt() -> int | None:
    """Returns the number of this attempt (1, 2, …); None outside a Lessor job."""
    return _integer("LESSOR_ATTEMPT")


def fencing_token() -> int | None:
    """Returns the fencing token of this attempt; None outside a Lessor job.

    It grows from one attempt of a job to the next. A store that remembers the
    highest token it saw can refuse a write of an attempt that was given up.
    """
    return _integer("LESSOR_FENCING_TOKEN")


def last_checkpoint() -> str | None:
    """Returns the cursor an earlier attempt last gave to :func:`checkpoint`; None: begin at the beginning."""
    return os.environ.get("LESSOR_CHECKPOINT")


def cancelled() -> bool:
    """Returns whether the job was asked to stop.

    Ask between two steps. What has not ended by itself within the job's grace
    is killed.
    """
    path = os.environ.get("LESSOR_CANCEL")
    return path is not None and os.path.exists(path)


def _integer(name: str) -> int | None:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        return None


# -- what it tells -------------------------------------------------------------


def progress(
    fraction: float | None = None,
    message: str | None = None,
    *,
    step: int | None = None,
    total: int | None = None,
) -> None:
    """Tells how far the job is. Only the latest is kept; what is left out stays as it was.

    Args:
        fraction: 0 to 1.
        message: One line for people; cut after 4 KiB.
        step: Steps done, in place of ``fraction``; needs ``total``.
        total: Steps in all.

    Raises:
        ValueError: The fraction is not between 0 and 1, or it is not clear which it is.
    """
    if step is not None or total is not None:
        if fraction is not None:
            raise ValueError("progress: give either fraction, or step and total")
        if step is None or total is None:
            raise ValueError("progress: step and total go together")
        if total <= 0 or not 0 <= step <= total:
            raise ValueError(f"progress: step {step} of total {total}: expected 0 <= step <= total and total > 0")
        fraction = step / total
    if fraction is not None:
        fraction = _number("progress: fraction", fraction)
        if not 0 <= fraction <= 1:
            raise ValueError(f"progress: fraction is {fraction}; expected a number from 0 to 1")
    if fraction is None and message is None:
        raise ValueError("progress: give a fraction, a message, or step and total")
    event: dict[str, Any] = {"type": "progress"}
    if fraction is not None:
        event["fraction"] = fraction
    if message is not None:
        event["message"] = _clip(str(message), MAX_MESSAGE_BYTES)
    _channel.tell_loosely(event)


def message(text: str) -> None:
    """Tells people one line about what the job is doing; the fraction stays as it was."""
    progress(message=text)


def metrics(values: Mapping[str, float]) -> None:
    """Tells the current value of some metrics; others keep theirs.

    A value that is not finite has no JSON and is left out: a diverged loss must
    not end a training through this call.

    Args:
        values: Name → value; at most 128 names of at most 256 bytes.

    Raises:
        ValueError: Too many, a name too long or empty, or a value that is no number.
    """
    if len(values) > MAX_METRICS:
        raise ValueError(f"metrics: {len(values)} values; at most {MAX_METRICS} are kept")
    finite = {}
    for name, value in values.items():
        if not isinstance(name, str) or not name or len(name.encode("utf-8", "replace")) > MAX_METRIC_NAME_BYTES:
            raise ValueError(f"metrics: {name!r} is not a name of 1 to {MAX_METRIC_NAME_BYTES} bytes")
        number = _number(f"metrics: {name}", value, finite=False)
        if math.isfinite(number):
            finite[name] = number
    if finite:
        _channel.tell_loosely({"type": "metrics", "values": finite})


def checkpoint(cursor: Any) -> None:
    """Tells that the job can resume from ``cursor``: the next attempt gets it from :func:`last_checkpoint`.

    Save first, then call this. When it returns the cursor is with the agent's
    host; the agent passes it on within moments.

    Args:
        cursor: Text that means something to the job (a path, a step), at most
            64 KiB; anything else is turned into JSON text.

    Raises:
        ValueError: Too long, not JSON, or text that cannot be put in an environment variable.
        OSError: It could not be written.
    """
    text = cursor if isinstance(cursor, str) else _json("checkpoint: cursor", cursor)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError("checkpoint: the cursor holds lone surrogates") from None
    if size > MAX_CURSOR_BYTES:
        raise ValueError(f"checkpoint: the cursor has {size} bytes; at most {MAX_CURSOR_BYTES}")
    if "\0" in text:
        raise ValueError("checkpoint: the cursor holds a NUL")
    _channel.tell({"type": "checkpoint", "cursor": text})


def result(value: Any) -> None:
    """Tells the job's result; it is kept with the job if this attempt succeeds. The last one counts.

    Args:
        value: Anything JSON can say, at most 256 KiB of it. Larger results belong in a file.

    Raises:
        ValueError: Not JSON, or too large.
        OSError: It could not be written.
    """
    text = _json("result: value", value)
    if len(text) > MAX_RESULT_BYTES:
        raise ValueError(f"result: {len(text)} bytes of JSON; at most {MAX_RESULT_BYTES}")
    _channel.tell({"type": "result", "value": value})


def error(failure: BaseException | str, *, retryable: bool = True) -> None:
    """Tells why the job is about to fail; the exit code still decides whether it did.

    Args:
        failure: The exception, or one sentence.
        retryable: False: another attempt cannot help, and none is made.

    Raises:
        OSError: It could not be written.
    """
    if isinstance(failure, BaseException):
        kind = type(failure)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        text, trace = str(failure), "".join(tracebacks.format_exception(failure))
    else:
        name, text, trace = "ERROR", failure, ""
    _channel.tell(
        {
            "type": "error",
            "error": {
                "type": _clip(name, _MAX_ERROR_TYPE_BYTES),
                "message": _clip(text, _MAX_ERROR_MESSAGE_BYTES),
                "traceback": _clip_front(trace, _MAX_TRACEBACK_BYTES),
                "retryable": bool(retryable),
            },
        }
    )


def excepthook(kind: type[BaseException], failure: BaseException, trace: TracebackType | None) -> None:
    """Reports an uncaught exception, then shows it as usual. For ``sys.excepthook``."""
    if not issubclass(kind, KeyboardInterrupt):
        try:
            error(failure.with_traceback(trace))
        except OSError as problem:
            print(f"lessor: the error could not be reported: {problem}", file=sys.stderr)
    sys.__excepthook__(kind, failure, trace)


def report_exceptions() -> None:
    """Reports the exception that ends this process, if one does, with its traceback."""
    sys.excepthook = excepthook


# -- the channel -----------------------------------------------------------------


class _Channel:
    """The events file: one line per event, each appended by one write so that lines of several writers stay whole."""

    def __init__(self) -> None:
        self._torn = False

    def tell(self, event: dict[str, Any]) -> None:
        """Appends an event.

        Raises:
            OSError: It could not be written whole.
        """
        path = os.environ.get("LESSOR_EVENTS")
        line = json.dumps({**event, "time": time.time()}, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        if path is None:
            return
        # Opened each time: a kept descriptor would not survive a library that closes all it does not know.
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            # A line cut short by a full disk must not swallow this one.
            data = b"\n" + line if self._torn else line
            written = os.write(fd, data)
        finally:
            os.close(fd)
        self._torn = written < len(data)
        if self._torn:
            raise OSError(f"{path}: only {written} of {len(data)} bytes could be written; is the disk full?")

    def tell_loosely(self, event: dict[str, Any]) -> None:
        """Appends an event that nobody will miss: a full disk must not end the job through it."""
        try:
            self.tell(event)
        except OSError as problem:
            print(f"lessor: {event['type']} dropped: {problem}", file=sys.stderr)


_channel = _Channel()


def _number(what: str, value: Any, *, finite: bool = True) -> float:
    """Returns a number, also from a NumPy or PyTorch scalar."""
    if isinstance(value, str | bytes | bool):
        raise ValueError(f"{what} is {value!r}; expected a number")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{what} is {value!r}; expected a number") from None
    if finite and not math.isfinite(number):
        raise ValueError(f"{what} is {number}; expected a finite number")
    return number


def _json(what: str, value: Any) -> str:
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as problem:
        raise ValueError(f"{what} is not JSON: {problem}") from None


def _clip(text: str, max_bytes: int) -> str:
    """Returns ``text`` as valid UTF-8 of at most ``max_bytes``, its end cut off."""
    data = text.replace("\0", "\ufffd").encode("utf-8", "replace")
    if len(data) <= max_bytes:
        return data.decode()
    return data[: max_bytes - 3].decode("utf-8", "ignore") + "…"


def _clip_front(text: str, max_bytes: int) -> str:
    """Likewise, its beginning cut off: the end of a traceback says what happened."""
    data = text.replace("\0", "\ufffd").encode("utf-8", "replace")
    if len(data) <= max_bytes:
        return data.decode()
    return "…" + data[len(data) - max_bytes + 3 :].decode("utf-8", "ignore")

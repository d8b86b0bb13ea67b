"""Logging of Lessor's programs: constant messages with fields, as JSON lines or for people.

Everything goes to standard error. Fields given in ``extra`` become keys of the
JSON object, or ``key=value`` after the message.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal, TextIO

LogFormat = Literal["json", "console"]

LEVELS = ("debug", "info", "warning", "error")
"""Accepted by :func:`configure`."""

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def configure(format: LogFormat = "console", level: str = "info", stream: TextIO | None = None) -> None:
    """Sets up the root logger. A later call replaces an earlier one.

    Args:
        format: ``json`` (one object per line) or ``console``.
        level: One of :data:`LEVELS`.
        stream: Where to write; default: standard error.

    Raises:
        ValueError: Unknown format or level.
    """
    if level.lower() not in LEVELS:
        raise ValueError(f"unknown log level {level!r}: give one of {', '.join(LEVELS)}")
    formatters: dict[str, type[logging.Formatter]] = {"json": JsonFormatter, "console": ConsoleFormatter}
    if format not in formatters:
        raise ValueError(f"unknown log format {format!r}: give one of {', '.join(formatters)}")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(formatters[format]())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # asyncio tells on DEBUG which selector it uses, on INFO nothing we want.
    logging.getLogger("asyncio").setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC, RFC 3339), level, logger, message, fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line of ``record``."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update((key, value) for key, value in _fields(record).items() if key not in line)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class ConsoleFormatter(logging.Formatter):
    """One line for people: local time, level, message, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line of ``record``, and its traceback below."""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        fields = "".join(
            f" {key}={_plain(value)}"
            for key, value in _fields(record).items()
            if key != "event" and value not in ("", None)
        )
        line = f"{time} {record.levelname:<7} {record.getMessage()}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    return {key: value for key, value in record.__dict__.items() if key not in _STANDARD}


def _plain(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(character in text for character in ' "\n=') else text

"""Log lines of Lessor's programs."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from lessor.log import configure

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def own_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_carry_their_fields() -> None:
    out = io.StringIO()
    configure("json", "info", out)
    logging.getLogger("lessor.x").info("lease granted", extra={"event": "granted", "lease_id": 7})
    line = json.loads(out.getvalue())
    assert (line["message"], line["level"], line["logger"]) == ("lease granted", "info", "lessor.x")
    assert (line["event"], line["lease_id"]) == ("granted", 7)
    assert line["time"].endswith("+00:00")


def test_json_lines_carry_exceptions() -> None:
    out = io.StringIO()
    configure("json", "info", out)
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("lessor.x").exception("failed")
    assert "ValueError: bad" in json.loads(out.getvalue())["exception"]


def test_console_lines_are_for_people() -> None:
    out = io.StringIO()
    configure("console", "info", out)
    logging.getLogger("lessor.x").warning("stream lost", extra={"event": "x", "error": "no route", "n": 3, "empty": ""})
    assert out.getvalue().rstrip().endswith('WARNING stream lost error="no route" n=3')


def test_the_level_holds_and_a_second_setup_replaces_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure("console", "info", first)
    configure("console", "warning", second)
    logging.getLogger("lessor.x").info("quiet")
    assert (first.getvalue(), second.getvalue()) == ("", "")


@pytest.mark.parametrize(("format", "level"), [("xml", "info"), ("json", "loud")])
def test_unknown_settings_are_refused(format: str, level: str) -> None:
    with pytest.raises(ValueError, match="give one of"):
        configure(format, level)  # type: ignore[arg-type]

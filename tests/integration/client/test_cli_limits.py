"""Values at and over the edge, and standard streams that are closed or full: one readable line, no traceback."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lessor
from lessor.v1 import job_pb2
from tests.integration.client.conftest import Ran
from tests.support.fake_services import FakeServer, Fault

Cli = Callable[..., Ran]
Shell = Callable[..., "subprocess.CompletedProcess[bytes]"]

WRONG = "\udcff"
"""How Python reads the byte 0xff of a command line."""


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("ps", "--since", "99999999d"), ("--since", "'99999999d'", "year 1")),
        (("ps", "--since", "0001-01-01T00:00+10:00"), ("--since", "0001-01-01", "year 1")),
        (("logs", "--tail", "99999999999", "j1"), ("tail", "99999999999", "2147483647")),
        (("logs", "--attempt", "99999999999", "j1"), ("attempt", "99999999999", "2147483647")),
        (("ps", "--name", WRONG), ("name", "not valid Unicode")),
        (("ps", "--queue", WRONG), ("queue", "not valid Unicode")),
        (("ps", "--watch", "--queue", WRONG), ("queue", "not valid Unicode")),
        (("ps", "--label", f"{WRONG}=x"), ("labels", "not valid Unicode")),
        (("ps", "--label", f"x={WRONG}"), ("labels.x", "not valid Unicode")),
        (("ps", "--state", WRONG), ("--state",)),
        (("show", WRONG), ("job", "not valid Unicode")),
        (("logs", WRONG), ("job", "not valid Unicode")),
        (("wait", "j1", WRONG), ("job", "not valid Unicode")),
        (("cancel", WRONG), ("job", "not valid Unicode")),
        (("retry", WRONG), ("job", "not valid Unicode")),
        (("explain", WRONG), ("job", "not valid Unicode")),
        (("drain", WRONG), ("agent", "not valid Unicode")),
        (("undrain", WRONG), ("agent", "not valid Unicode")),
        (("queues", "create", WRONG), ("name", "not valid Unicode")),
        (("queues", "pause", WRONG), ("name", "not valid Unicode")),
        (("queues", "update", WRONG, "--max-gpus", "1"), ("name", "not valid Unicode")),
        (("submit", "--queue", WRONG, "--", "x"), ("--queue", "not valid Unicode")),
        (("submit", "--", WRONG), ("CMD: '\\udcff' is not valid Unicode",)),
        (("submit", "--", "echo", f"a{WRONG}"), ("CMD[1]: 'a\\udcff' is not valid Unicode",)),
        (("submit", "-f", f"jobs{WRONG}.yaml"), ("jobs\\udcff.yaml: cannot be read",)),
        (("run", "--", WRONG), ("CMD: '\\udcff' is not valid Unicode",)),
        (("submit", "--gpus", "two", "--", "x"), ("--gpus", "'two'", "integer", "--help")),
        (("submit", "--priority", "1.5", "--", "x"), ("--priority", "'1.5'")),
        (("submit", "--max-failures", "few", "--", "x"), ("--max-failures", "'few'")),
        (("ps", "--limit", "many"), ("--limit", "'many'")),
        (("ps", "--limit", "0"), ("--limit", "0")),
        (("logs", "--tail", "x" * 1000, "j1"), ("--tail", "'xxx")),
        (("queues", "create", "q", "--max-gpus", "two"), ("--max-gpus", "'two'")),
    ],
)
def test_wrong_values(cli: Cli, server: FakeServer, argv: tuple[str, ...], words: tuple[str, ...]) -> None:
    ran = cli(*argv)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran.err
    assert len(ran.err) < 400
    for word in words:
        assert word in ran.err
    assert not server.requests


def texts_of_the_client() -> Iterator[tuple[str, str]]:
    """Yields every argument of the client's methods that takes text that goes to the server."""
    for method, function in inspect.getmembers(lessor.AsyncClient, inspect.isfunction):
        if not method.startswith("_"):
            for name, parameter in inspect.signature(function, eval_str=False).parameters.items():
                if "str" in str(parameter.annotation) or "JobRef" in str(parameter.annotation):
                    yield method, name


@pytest.mark.parametrize(("method", "argument"), list(texts_of_the_client()))
async def test_every_text_is_checked_before_it_is_sent(server: FakeServer, method: str, argument: str) -> None:
    required: dict[str, Any] = {"job": "j1", "jobs": ["j1"], "agent": "a", "name": "n"}
    async with lessor.AsyncClient(server.address) as client:
        function = getattr(client, method)
        given = {
            name: required[name]
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.default is parameter.empty and name in required
        }
        given[argument] = {"x": WRONG} if argument == "labels" else WRONG
        made = function(**given)
        with pytest.raises(lessor.InvalidArgument, match="not valid Unicode"):
            await (anext(made) if isinstance(made, AsyncGenerator) else made)
    assert not server.requests


def test_numbers_the_wire_has_no_room_for(client: lessor.Client, server: FakeServer) -> None:
    for name, value in (("attempt", 2**31), ("offset", 2**63), ("tail", 2**31), ("tail", -1)):
        with pytest.raises(lessor.InvalidArgument, match=f"{name}: {value} is"):
            list(client.logs("j1", **{name: value}))  # type: ignore[arg-type]
    with pytest.raises(lessor.InvalidArgument, match="page_size"):
        list(client.list(page_size=2**31))
    assert not server.requests


def test_a_request_over_the_limit_of_the_server(client: lessor.Client, cli: Cli, tmp_path: Path) -> None:
    with pytest.raises(lessor.TooLarge) as error:
        client.submit(["x"], env={"A": "x" * 20_000_000})
    text = str(error.value)
    assert text.startswith("the request has 200000")
    assert "more than the server's limit of 16777216 (16MiB) (pass large inputs as files that the job reads" in text
    assert "max" not in text
    assert client.submit(["x"]).id
    file = tmp_path / "large.json"
    file.write_text(json.dumps({"command": ["x"], "env": {"A": "x" * 20_000_000}}))
    ran = cli("submit", "-f", str(file))
    assert (ran.code, ran.out, ran.err) == (1, "", f"error: {text}\n")


def test_an_answer_over_the_limit_of_the_client(client: lessor.Client, server: FakeServer) -> None:
    job = client.submit(["x"]).id
    server.jobs[job].result_json = b"1" * (65 << 20)
    with pytest.raises(lessor.TooLarge, match=r"the server's answer has \d+ bytes, more than the limit of 67108864"):
        client.get(job)


def test_a_wait_of_no_time_returns_what_has_ended(client: lessor.Client, cli: Cli, server: FakeServer) -> None:
    ended, going = client.submit(["x"]).id, client.submit(["y"]).id
    server.start(ended)
    server.end(ended)
    for timeout in (0, "0s", "1us"):
        assert [job.id for job in client.wait([ended, ended], timeout=timeout)] == [ended, ended]
    with pytest.raises(lessor.WaitTimeout) as error:
        client.wait([going, ended], timeout=0)
    assert (error.value.pending, [job.id for job in error.value.ended]) == ((going,), [ended])
    with pytest.raises(lessor.JobNotFound):
        client.wait("j0000000000009", timeout=0)
    ran = cli("wait", "--timeout", "0s", ended)
    assert (ran.code, ran.out) == (0, f"{ended}\tsucceeded\t0\n")
    assert cli("wait", "--timeout", "0s", going).code == 124


def test_a_wait_of_no_time_looks_at_the_jobs_of_every_watch(
    client: lessor.Client, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lessor.sdk.following.MAX_WATCHED", 1)
    going, ended = client.submit(["y"]).id, client.submit(["x"]).id
    server.start(ended)
    server.end(ended)
    with pytest.raises(lessor.WaitTimeout) as error:
        client.wait([going, ended], timeout=0)
    assert (error.value.pending, [job.id for job in error.value.ended]) == ((going,), [ended])


def test_the_first_look_of_a_wait_takes_no_longer_than_a_call(client: lessor.Client, server: FakeServer) -> None:
    job = client.submit(["x"]).id
    silent = Fault("WatchJobs", hold=threading.Event())
    server.faults.append(silent)
    try:
        with lessor.Client(server.address, timeout="200ms", connect_timeout=60) as hasty:
            hasty.get(job)
            with pytest.raises(lessor.WaitTimeout):
                hasty.wait(job, timeout=0)
    finally:
        assert silent.hold is not None
        silent.hold.set()


@pytest.fixture
def shell(server: FakeServer) -> Shell:
    """Runs ``lessor ARGUMENTS REDIRECTIONS`` in a shell, as a user writes it."""

    def run(line: str) -> subprocess.CompletedProcess[bytes]:
        program = f'"{sys.executable}" -c "import sys; from lessor.cli.main import main; sys.exit(main())"'
        return subprocess.run(
            ["bash", "-c", f"{program} {line}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            env={**os.environ, "LESSOR_ADDRESS": server.address},
        )

    return run


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(shell: Shell, server: FakeServer, closed: str) -> None:
    def script(job: str) -> None:
        server.start(job)
        server.log(job, b"out\n")
        server.log(job, b"err\n", job_pb2.LOG_STREAM_STDERR)
        server.end(job, job_pb2.JOB_STATE_FAILED, exit_code=7)

    server.on_submit = script
    ran = shell(f"run -- x {closed}")
    assert ran.returncode == 7, ran.stderr
    assert ran.stdout == (b"" if ">&-" in closed.split() else b"out\n")
    assert b"Traceback" not in ran.stderr
    assert (b"err\n" in ran.stderr) is ("2>&-" not in closed)
    assert shell(f"ps {closed}").returncode == 0
    assert shell(f"show j0000000000009 {closed}").returncode == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "line", ["ps", "ps --json", "ps --help", "version", "wait j0000000000001", "logs j0000000000001"]
)
def test_a_full_standard_output(shell: Shell, client: lessor.Client, server: FakeServer, line: str) -> None:
    job = client.submit(["x"]).id
    server.start(job)
    server.log(job, b"out\n")
    server.end(job)
    ran = shell(f"{line} > /dev/full")
    assert (ran.returncode, ran.stderr) == (1, b"error: the output cannot be written: No space left on device\n")
    assert shell(f"{line} > /dev/full 2>&1").returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_run_with_a_full_standard_output(shell: Shell, server: FakeServer) -> None:
    def script(job: str) -> None:
        server.start(job)
        server.log(job, b"out\n")

    server.on_submit = script
    for flags in ("", "--json "):
        ran = shell(f"run {flags}-- x > /dev/full")
        assert ran.returncode == 1
        told = [line for line in ran.stderr.splitlines() if not line.startswith(b"lessor: ")]
        assert told == [b"error: the output cannot be written: No space left on device"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_standard_error_keeps_the_exit_code(shell: Shell) -> None:
    assert shell("show j0000000000009 2> /dev/full").returncode == 3
    assert shell("--nope 2> /dev/full").returncode == 2

"""Every command against a server in memory, as in a pipe and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import lessor
from lessor.cli import external, session
from lessor.cli.output import columns_that_fit
from lessor.v1 import fleet_service_pb2, job_pb2
from tests.integration.client.conftest import Ran
from tests.support.fake_services import FakeServer, Fault

Cli = Callable[..., Ran]


def submit(server: FakeServer, *, name: str = "", queue: str = "", gpus: int = 0) -> str:
    with lessor.Client(server.address) as client:
        return client.submit(["python", "train.py"], name=name, queue=queue, gpus=gpus).id


def done(server: FakeServer, state: int = job_pb2.JOB_STATE_SUCCEEDED, **how: Any) -> str:
    job = submit(server)
    server.start(job)
    server.log(job, b"one\ntwo\n")
    server.log(job, b"oops\n", job_pb2.LOG_STREAM_STDERR)
    server.end(job, state, **how)
    return job


def documents(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def test_submit_prints_the_id(cli: Cli, server: FakeServer) -> None:
    ran = cli(
        *("submit", "--name", "n", "--label", "a=b", "--label", "c=d=e", "--env", "X=1", "--cpu", "500m"),
        *("--memory", "4GiB", "--gpus", "2", "--gpu-model", "H200", "--gpu-memory", "80GiB", "--selector", "zone=a"),
        *("--selector", "!spot", "--priority", "-3", "--workdir", "/w", "--user", "u", "--max-failures", "3"),
        *("--max-losses", "4", "--backoff", "2s", "--timeout", "1h", "--queue-timeout", "1d", "--start-timeout", "5m"),
        *("--ttl", "30s", "--grace", "3s", "--dedupe-key", "k", "--runtime", "process", "--queue", "default"),
        *("--", "python", "train.py", "--json", "-f", "x"),
    )
    assert (ran.code, ran.err) == (0, "")
    [job] = server.jobs.values()
    assert ran.out == f"{job.id}\n"
    spec = lessor.JobSpec.from_proto(job.spec)
    assert spec.to_dict() == {
        "command": ["python", "train.py", "--json", "-f", "x"],
        "name": "n",
        "queue": "default",
        "labels": {"a": "b", "c": "d=e"},
        "runtime": "process",
        "env": {"X": "1"},
        "working_dir": "/w",
        "user": "u",
        "cpu": "500m",
        "memory": "4GiB",
        "gpus": 2,
        "gpu_model": "H200",
        "gpu_memory": "80GiB",
        "selectors": ["zone=a", "!spot"],
        "priority": -3,
        "max_failures": 3,
        "max_losses": 4,
        "backoff": "2s",
        "timeout": "1h",
        "queue_timeout": "1d",
        "start_timeout": "5m",
        "ttl": "30s",
        "grace": "3s",
        "dedupe_key": "k",
    }
    again = cli("submit", "--json", "--dedupe-key", "k", "--queue", "default", "--", "true")
    assert json.loads(again.out) == {"job_id": job.id, "existing": True}


def test_submit_takes_a_variable_from_here(cli: Cli, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "t")
    assert cli("submit", "--env", "TOKEN", "--", "true").code == 0
    assert next(iter(server.jobs.values())).spec.command.env == {"TOKEN": "t"}
    ran = cli("submit", "--env", "NOT_SET_ANYWHERE", "--", "true")
    assert (ran.code, ran.err) == (2, "error: --env: 'NOT_SET_ANYWHERE' is not set here (write --env KEY=VALUE)\n")


def test_submit_of_files(cli: Cli, server: FakeServer, tmp_path: Path) -> None:
    one = tmp_path / "one.yaml"
    one.write_text("command: [a]\n")
    ran = cli("submit", "-f", str(one))
    assert ran.out.split() == list(server.jobs)
    ran = cli("submit", "-f", "-", "--json", stdin="- command: b\n- command: c\n")
    assert [job["job_id"] for job in json.loads(ran.out)["jobs"]] == list(server.jobs)[1:]
    assert server.count("SubmitJobs") == 1
    for wrong in (("--gpus", "1"), ("--", "x")):
        ran = cli("submit", "-f", str(one), *wrong)
        assert ran.code == 2
        assert "exclude each other" in ran.err
    one.write_text("command: [a\n")
    ran = cli("submit", "-f", str(one))
    assert ran.code == 2
    assert ran.err.startswith(f"error: {one}:2:1: is not valid YAML")
    assert ran.err.count("\n") == 1
    assert len(server.jobs) == 3


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("submit", "--gpus", "-1", "--", "x"), 2, "--gpus: -1 is negative; give 0 or more"),
        (("submit", "--gpus", "two", "--", "x"), 2, "--gpus"),
        (("submit", "--selector", "zone==", "--", "x"), 2, "--selector: 'zone==' is not a label selector (write"),
        (("submit", "--memory", "4gib", "--", "x"), 2, 'did you mean "4GiB"?'),
        (("submit", "--label", "x", "--", "x"), 2, "--label: 'x' has no key or no value (write --label KEY=VALUE)"),
        (("submit",), 2, "no command was given (write it after --"),
        (("run",), 2, "no command was given (write it after --"),
        (("submit", "--queue", "nope", "--", "x"), 3, "no queue 'nope' (`lessor queues` lists queues"),
        (("submit", "--priority", "9999", "--", "x"), 2, "spec.priority: must be at most 1000"),
        (("submit", "--bogus"), 2, "No such option"),
        (("bogus",), 2, "No such command 'bogus'"),
        (("show",), 2, "Missing argument 'JOB'"),
        (("show", "jnope"), 3, "no job 'jnope' (`lessor ps` lists jobs)"),
        (("logs", "jnope"), 3, "no job 'jnope'"),
        (("wait", "jnope"), 3, "no job 'jnope'"),
        (("cancel", "jnope"), 3, "no such job: jnope"),
        (("retry", "jnope"), 3, "no job 'jnope'"),
        (("explain", "jnope"), 3, "no job 'jnope'"),
        (("drain", "nope"), 3, "no agent 'nope' (`lessor agents` lists agents)"),
        (("undrain", "nope"), 3, "no agent 'nope'"),
        (("queues", "pause", "nope"), 3, "no queue 'nope'"),
        (("queues", "create", "default"), 1, "there is a queue 'default'"),
        (("queues", "create", "x", "--max-gpus", "-2"), 2, "max_gpus: -2 is not a limit"),
        (("queues", "update", "default"), 2, "nothing to change was given"),
        (("queues", "update", "default", "--max-gpus", "x"), 2, "--max-gpus: 'x' is no limit"),
        (("ps", "--state", "bogus"), 2, "--state: 'bogus' is no state (give one of queued, leased"),
        (("ps", "--since", "yesterday"), 2, "--since: 'yesterday' is neither a duration nor a time"),
        (("ps", "--limit", "0"), 2, "--limit"),
        (("ps", "--address", "host:x"), 2, "'host:x' is not an address"),
        (("--address", "127.0.0.1:1", "server"), 2, "options of 'server' come after it"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(cli: Cli, argv: tuple[str, ...], code: int, message: str) -> None:
    ran = cli(*argv)
    assert message in ran.err
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert (ran.code, ran.out.replace("jnope\tnot_found\n", "")) == (code, "")


@pytest.mark.usefixtures("one_try")
def test_nobody_at_the_address(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "FIRST_CONTACT", timedelta(seconds=20))
    ran = cli("ps", "--address", "127.0.0.1:1")
    assert ran.code == 4
    assert ran.err == (
        "error: no server answers at 127.0.0.1:1: connection refused"
        " (is the server running? set LESSOR_ADDRESS or --address)\n"
    )
    assert cli("--address", "127.0.0.1:1", "agents").code == 4
    assert cli("ps", address="127.0.0.1:1").code == 4


def test_ps(cli: Cli, server: FakeServer) -> None:
    old = submit(server, name="old\tname")
    server.end(old)
    new = submit(server, name="new", gpus=2)
    server.start(new)
    rows = [line.split("\t") for line in cli("ps").out.splitlines()]
    assert [(row[0], row[1], row[2], row[3], row[4], row[5], row[6]) for row in rows] == [
        (new, "running", "new", "default", "1", "alpha", "2"),
        (old, "succeeded", "old name", "default", "0", "-", "0"),
    ]
    listed = json.loads(cli("ps", "--json").out)["jobs"]
    assert [job["id"] for job in listed] == [new, old]
    assert listed[0]["state"] == "running"
    assert json.loads(cli("--json", "ps", "--state", "succeeded").out)["jobs"][0]["id"] == old
    assert cli("ps", "--name", "new").out.startswith(new)
    assert cli("ps", "--limit", "1").out.count("\n") == 1
    assert cli("ps", "--since", "1h").out.count("\n") == 2
    assert cli("ps", "--since", "2100-01-01").out == ""
    assert cli("ps", "--label", "a=b").out == ""


def test_show(cli: Cli, server: FakeServer) -> None:
    error = job_pb2.JobError(
        error_class=job_pb2.ERROR_CLASS_APPLICATION, type="EXIT_CODE", message="exit code 3", traceback="Trace\n  x"
    )
    job = done(server, job_pb2.JOB_STATE_FAILED, exit_code=3, error=error)
    text = cli("show", job).out
    fields = dict(line.split("\t", 1) for line in text.split("\n\n")[0].splitlines() if "\t" in line)
    assert fields["state"] == "failed"
    assert fields["error"] == "EXIT_CODE: exit code 3"
    assert fields["command"] == "python train.py"
    assert fields["failures"] == "0 of 1"
    assert "Trace\n  x" in text
    assert text.splitlines()[-1].split("\t")[:4] == ["1", "1001", "failed", "alpha"]
    document = json.loads(cli("show", job, "--json").out)
    assert document["job"]["exit_code"] == 3
    assert document["attempts"][0]["outcome"] == "failed"
    assert document["explanations"] is None

    waiting = submit(server)
    assert "waiting\tno_agent_connected: no agent is connected (start one" in cli("show", waiting).out
    assert json.loads(cli("show", waiting, "--json").out)["explanations"][0]["numbers"] == {"agents": 0}


def test_logs(cli: Cli, server: FakeServer) -> None:
    job = done(server)
    ran = cli("logs", job)
    assert (ran.out, ran.err) == ("one\ntwo\n", "oops\n")
    assert cli("logs", "-f", "--tail", "2", job).out == "two\n"
    assert cli("logs", "--attempt", "1", job).out == "one\ntwo\n"
    assert cli("logs", "--attempt", "4", job).code == 3
    lines = documents(cli("logs", "--json", job).out)
    assert [(line["offset"], line["stream"], line["data"]) for line in lines] == [
        (0, "stdout", "one\ntwo\n"),
        (8, "stderr", "oops\n"),
    ]
    server.log(job, b"\xff")
    assert documents(cli("logs", "--json", job).out)[-1]["data"] == {"base64": "/w=="}


def test_wait(cli: Cli, server: FakeServer) -> None:
    good, bad = done(server), done(server, job_pb2.JOB_STATE_FAILED, exit_code=7)
    ran = cli("wait", good)
    assert (ran.code, ran.out) == (0, f"{good}\tsucceeded\t0\n")
    ran = cli("wait", good, bad)
    assert (ran.code, ran.out) == (1, f"{good}\tsucceeded\t0\n{bad}\tfailed\t7\n")
    ran = cli("wait", "--json", good)
    assert json.loads(ran.out)["jobs"][0]["state"] == "succeeded"
    ran = cli("wait", "--timeout", "100ms", submit(server))
    assert ran.code == 124
    assert "1 of 1 jobs had not ended within 100ms" in ran.err


def test_cancel_and_retry(cli: Cli, server: FakeServer) -> None:
    job = submit(server)
    ran = cli("cancel", job, "jnope")
    assert (ran.code, ran.out) == (3, f"{job}\tcancelled\njnope\tnot_found\n")
    assert json.loads(cli("cancel", "--json", job).out) == {"jobs": [{"job_id": job, "result": "already_terminal"}]}
    again = cli("retry", job).out.strip()
    assert server.jobs[again].retry_of == job
    assert json.loads(cli("retry", "--json", job).out)["retry_of"] == job
    ran = cli("retry", again)
    assert ran.code == 1
    assert "has not ended (wait for its end, or cancel it first)" in ran.err


def test_explain(cli: Cli, server: FakeServer) -> None:
    job = submit(server)
    assert cli("explain", job).out == "no_agent_connected\tno agent is connected\tstart one with `lessor agent`\n"
    document = json.loads(cli("explain", "--json", job).out)
    assert document["state"] == "queued"
    assert document["explanations"][0]["reason"] == "no_agent_connected"


def test_agents(cli: Cli, server: FakeServer) -> None:
    server.add_agent("alpha", gpus=1, zone="a")
    server.lease_rows.append(
        fleet_service_pb2.LeaseStatus(lease_id=9, job_id="j9", phase=job_pb2.LEASE_PHASE_RUNNING, agent="alpha")
    )
    [row] = cli("agents").out.splitlines()
    assert row.split("\t")[:8] == ["alpha", "active", "0/8000", f"0/{32 * 2**30}", "0/1", "0", "process", "zone=a"]
    agents, gpus, leases = cli("agents", "--gpus", "--leases").out.split("\n\n")
    assert agents.startswith("alpha\t")
    assert gpus.split("\t")[:3] == ["alpha", "0", "NVIDIA H200"]
    assert leases.split("\t")[:2] == ["9", "j9"]
    document = json.loads(cli("agents", "--gpus", "--leases", "--json").out)
    assert (len(document["agents"]), len(document["gpus"]), document["leases"][0]["phase"]) == (1, 1, "running")
    assert cli("drain", "alpha").out == "alpha\tdraining\t0\n"
    assert json.loads(cli("undrain", "--json", "alpha").out)["drained"] is False


def test_drain_waits_when_asked_to(cli: Cli, server: FakeServer) -> None:
    alpha = server.add_agent("alpha")
    assert cli("drain", "--wait", "alpha").out == "alpha\tdraining\t0\n"
    alpha.lease_count = 1
    server.lease_rows.append(fleet_service_pb2.LeaseStatus(lease_id=1, job_id="j1"))
    ran = cli("drain", "--wait", "--timeout", "0s", "alpha")
    assert (ran.code, ran.out) == (124, "")
    assert ran.err == "error: jobs had not ended on alpha within 0s, 1 in all: j1; it stays drained\n"
    ran = cli("drain", "--timeout", "1s", "alpha")
    assert (ran.code, ran.err) == (2, "error: --timeout: is for --wait (give --wait too)\n")


def test_drain_says_when_nobody_knows_what_is_left_there(cli: Cli, server: FakeServer) -> None:
    server.add_agent("alpha")
    server.drained_state = fleet_service_pb2.AGENT_STATE_DISCONNECTED
    ran = cli("drain", "--wait", "alpha")
    assert (ran.code, ran.out) == (0, "alpha\tdisconnected\t0\n")
    assert ran.err == "warning: alpha is disconnected: what it ran may still be there\n"
    assert cli("drain", "alpha").err == "", "nothing was said of what is left"


def test_drain_that_somebody_takes_back(cli: Cli, server: FakeServer) -> None:
    alpha = server.add_agent("alpha")
    alpha.lease_count = 1

    def put_back() -> None:
        server.until(lambda: alpha.drained)
        alpha.drained = False

    server.script(put_back)
    ran = cli("drain", "--wait", "alpha")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "error: alpha was put back (undrained) meanwhile (drain it again)\n"


def test_queues(cli: Cli, server: FakeServer) -> None:
    assert cli("queues", "create", "night", "--max-gpus", "4", "--paused").out == "night\tpaused\t0\t0\t-\t0\t4\n"
    assert cli("queues", "resume", "night").out.split("\t")[1] == "active"
    assert cli("queues", "pause", "night").out.split("\t")[1] == "paused"
    ran = cli("queues", "update", "night", "--max-gpus", "none", "--max-running", "3", "--json")
    assert json.loads(ran.out)["max_gpus"] is None
    assert [line.split("\t")[0] for line in cli("queues").out.splitlines()] == ["default", "night"]
    assert json.loads(cli("queues", "--json").out)["queues"][1]["max_running"] == 3
    assert json.loads(cli("queues", "--json", "pause", "night").out)["paused"] is True


def test_version_and_help(cli: Cli) -> None:
    assert cli("version").out == f"lessor {lessor.__version__}\n"
    assert json.loads(cli("version", "--json").out) == {"version": lessor.__version__}
    assert cli().out.startswith("Usage: ")
    listing = cli("--help").out
    for command in ("run", "submit", "ps", "queues", "server", "agent", "dev"):
        assert f"\n  {command} " in listing


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "submit",
        "ps",
        "show",
        "logs",
        "wait",
        "cancel",
        "retry",
        "explain",
        "agents",
        "drain",
        "undrain",
        "version",
    ]
    + [f"queues {name}" for name in ("create", "update", "pause", "resume")]
    + ["queues"],
)
def test_each_help_has_an_example_and_the_common_options(cli: Cli, command: str) -> None:
    text = cli(*command.split(), "--help").out
    assert f"Example: lessor {command}" in text
    assert "--json" in text
    assert command == "version" or "--address" in text


@pytest.mark.usefixtures("one_try")
def test_a_database_that_is_away(cli: Cli, server: FakeServer) -> None:
    server.faults.append(Fault("ListJobs", "DATABASE_UNAVAILABLE"))
    ran = cli("ps")
    assert (ran.code, ran.err) == (
        4,
        "error: a DATABASE_UNAVAILABLE for this test (look at the server's log)\n",
    )


def test_commands_of_other_parts_get_their_arguments_untouched(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def main(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    monkeypatch.setattr(external, "find", lambda name: EntryPoint(name, "x:y", external.GROUP))
    monkeypatch.setattr(EntryPoint, "load", lambda self: main)
    assert cli("server", "--help", "--", "-x", "--json").code == 7
    assert seen == [["--help", "--", "-x", "--json"]]


@pytest.mark.parametrize("point", [None, EntryPoint("server", "no_such_package_anywhere.main:main", external.GROUP)])
def test_an_extra_that_is_not_installed(cli: Cli, monkeypatch: pytest.MonkeyPatch, point: EntryPoint | None) -> None:
    monkeypatch.setattr(external, "find", lambda name: point)
    ran = cli("server", "--listen", "x")
    assert ran.code == 1
    assert ran.err.startswith("error: lessor server needs the server extra: pip install 'lessor[server]'")
    assert ran.err.count("\n") == 1


def test_a_narrow_terminal_gets_fewer_columns_not_cut_ones() -> None:
    cells = [["host-one", "active", "2", "x" * 40, "y" * 40]]
    head = ["NAME", "STATE", "GPUS", "LABELS", "ID"]
    assert columns_that_fit(head, cells, 200) == 5
    assert columns_that_fit(head, cells, 80) == 4
    assert columns_that_fit(head, cells, 40) == 3
    assert columns_that_fit(head, cells, 5) == 3

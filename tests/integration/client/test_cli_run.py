"""``lessor run`` as a process of its own: streams, exit codes, Ctrl-C, the terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest

from lessor.cli import run
from lessor.cli.follow import Follower, Pace
from lessor.cli.output import Output, one_line, span_text
from lessor.cli.screen import bar_text
from lessor.sdk.jobs import Progress
from lessor.v1 import job_pb2
from tests.integration.client.conftest import Ran
from tests.support.fake_services import FakeServer

Start = Callable[..., "subprocess.Popen[bytes]"]
Cli = Callable[..., Ran]


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out.decode(), err.decode()


def test_run_follows_to_the_end(lessor_command: Start, server: FakeServer) -> None:
    def script(job: str) -> None:
        server.start(job)
        server.log(job, b"out\n")
        server.log(job, b"err\n", job_pb2.LOG_STREAM_STDERR)
        server.progress(job, 0.5, "half")
        server.end(job)

    server.on_submit = script
    code, out, err = finish(lessor_command("run", "--name", "x", "--", "python", "-c", "print(1)"))
    assert (code, out) == (0, "out\n")
    lines = err.splitlines()
    assert lines[0] == "lessor: job j0000000000001"
    assert "err" in lines
    assert lines[-1].startswith("lessor: job j0000000000001 succeeded after ")
    assert "\x1b" not in err
    assert server.jobs["j0000000000001"].spec.command.argv == ["python", "-c", "print(1)"]


@pytest.mark.parametrize(
    ("state", "how", "code", "last"),
    [
        (job_pb2.JOB_STATE_FAILED, {"exit_code": 7}, 7, "failed after 0s: exit code 7"),
        (job_pb2.JOB_STATE_FAILED, {"signal": 9}, 137, "failed after 0s: killed by SIGKILL"),
        (
            job_pb2.JOB_STATE_FAILED,
            {"error": job_pb2.JobError(type="START_FAILED", message="no such program")},
            1,
            "failed after 0s: no such program",
        ),
        (job_pb2.JOB_STATE_CANCELLED, {}, 130, "was cancelled after 0s"),
    ],
)
def test_run_exits_as_the_job_did(
    cli: Cli, server: FakeServer, state: int, how: dict[str, object], code: int, last: str
) -> None:
    def script(job: str) -> None:
        server.start(job)
        server.end(job, state, **how)  # type: ignore[arg-type]

    server.on_submit = script
    ran = cli("run", "--", "x")
    assert ran.code == code
    assert ran.err.splitlines()[-1].endswith(last)


def test_run_says_what_it_waits_for_and_tells_of_a_second_attempt(
    cli: Cli, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = Pace(explain_after=timedelta(milliseconds=20), explain_every=timedelta(milliseconds=20))
    monkeypatch.setattr(run, "Follower", partial(Follower, pace=impatient))

    def script(job: str) -> None:
        server.until(lambda: server.count("ExplainJob") >= 3)
        server.start(job)
        server.log(job, b"a\n")
        server.until(lambda: server.count("GetJob") >= 2)
        server.jobs[job].outcome = job_pb2.OUTCOME_LOST
        server.lose(job)
        server.until(lambda: server.count("GetJob") >= 3)
        server.start(job, "beta")
        server.log(job, b"b\n")
        server.until(lambda: server.count("GetJob") >= 4)
        server.end(job)

    server.on_submit = script
    ran = cli("run", "--", "x")
    assert (ran.code, ran.out) == (0, "a\nb\n")
    assert ran.err.count("waiting: no agent is connected (start one with `lessor agent`)") == 1
    assert "attempt 1 runs on alpha" in ran.err
    assert "attempt 1 is lost; the job waits to run again" in ran.err
    assert "attempt 2 runs on beta" in ran.err


def test_run_as_json_lines(cli: Cli, server: FakeServer) -> None:
    def script(job: str) -> None:
        server.until(lambda: server.count("WatchJobs") >= 1 and server.count("GetJob") >= 1)
        server.start(job)
        server.log(job, b"out\n")
        server.progress(job, 0.5, "half", loss=0.1)
        server.end(job, result=b'{"a": 1}')

    server.on_submit = script
    ran = cli("run", "--json", "--", "x")
    lines = [json.loads(line) for line in ran.out.splitlines()]
    kinds = {line["type"] for line in lines}
    assert kinds == {"submitted", "state", "log", "progress", "ended"}
    assert lines[0] == {"type": "submitted", "job_id": "j0000000000001", "existing": False}
    assert lines[-1]["job"]["result"] == {"a": 1}
    [progress] = [line for line in lines if line["type"] == "progress"]
    assert progress["metrics"] == {"loss": 0.1}
    assert ran.err == ""


def test_run_goes_on_over_a_restart_of_the_server(lessor_command: Start, server: FakeServer) -> None:
    process = lessor_command("run", "--", "x", stdin=subprocess.DEVNULL)
    server.until(lambda: server.count("StreamLogs") == 1 and server.count("WatchJobs") == 1)
    [job] = server.jobs
    server.start(job)
    server.log(job, b"a\n")
    server.until(lambda: server.count("GetJob") >= 1)
    server.stop()
    server.log(job, b"b\n")
    server.serve(server.address)
    server.until(lambda: server.count("StreamLogs") >= 2 and server.count("WatchJobs") >= 2)
    server.log(job, b"c\n")
    server.end(job)
    code, out, err = finish(process)
    assert (code, out) == (0, "a\nb\nc\n")
    assert [line for line in err.splitlines() if not line.startswith("lessor: ")] == []
    assert err.count("runs on alpha") <= 1


def test_ctrl_c_in_a_pipe_detaches(lessor_command: Start, server: FakeServer) -> None:
    process = lessor_command("run", "--", "x", stdin=subprocess.DEVNULL)
    server.until(lambda: server.count("StreamLogs") == 1 and server.count("WatchJobs") == 1)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert "the job goes on: `lessor logs -f j0000000000001` follows it, `lessor cancel" in err
    assert "Traceback" not in err
    assert server.count("CancelJobs") == 0


def test_ctrl_c_of_other_commands_is_no_traceback(lessor_command: Start, server: FakeServer) -> None:
    def check(*argv: str, rpc: str) -> None:
        process = lessor_command(*argv)
        server.until(lambda: server.count(rpc) >= 1)
        process.send_signal(signal.SIGINT)
        assert finish(process) == (130, "", "interrupted\n")

    finish(lessor_command("submit", "--", "x"))
    check("wait", "j0000000000001", rpc="WatchJobs")
    check("logs", "-f", "j0000000000001", rpc="StreamLogs")


def test_a_reader_that_goes_away_is_no_traceback(lessor_command: Start, server: FakeServer) -> None:
    finish(lessor_command("submit", "--", "x"))
    server.start("j0000000000001")
    process = lessor_command("logs", "-f", "j0000000000001")
    server.until(lambda: server.count("StreamLogs") >= 1)
    assert process.stdout is not None
    process.stdout.close()
    server.log("j0000000000001", b"x\n")
    assert process.stderr is not None
    assert process.wait(30) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_ps_watch_prints_each_change(lessor_command: Start, server: FakeServer) -> None:
    finish(lessor_command("submit", "--name", "one", "--", "x"))
    process = lessor_command("ps", "--watch", "--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["state"] == "queued"
    server.until(lambda: server.count("WatchJobs") >= 1)
    server.start("j0000000000001")
    assert json.loads(process.stdout.readline())["state"] == "running"
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130


class Terminal:
    """``lessor`` on a terminal of its own."""

    def __init__(self, address: str, *argv: str) -> None:
        self.fd, theirs = pty.openpty()
        code = "import sys; from lessor.cli.main import main; sys.exit(main())"
        # The new session makes the terminal its own, so that Ctrl-C on it is a signal.
        take = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        self.process = subprocess.Popen(
            [sys.executable, "-c", take + code, *argv],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "LESSOR_ADDRESS": address, "TERM": "xterm-256color", "COLUMNS": "120"},
        )
        os.close(theirs)
        self.seen = ""

    def read(self) -> bool:
        ready, _, _ = select.select([self.fd], [], [], 30)
        assert ready, f"nothing more came after {self.seen!r}"
        try:
            data = os.read(self.fd, 65536)
        except OSError:
            return False
        self.seen += data.decode(errors="replace")
        return bool(data)

    def until(self, pattern: str) -> None:
        while not re.search(pattern, self.seen):
            assert self.read(), f"it ended before {pattern!r}: {self.seen!r}"

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def code(self) -> int:
        while self.read():
            pass
        os.close(self.fd)
        return self.process.wait(30)


def test_a_terminal_shows_a_bar_and_takes_it_away(server: FakeServer) -> None:
    terminal = Terminal(server.address, "run", "--", "x")
    server.until(lambda: server.count("WatchJobs") >= 1 and server.count("StreamLogs") >= 1)
    [job] = server.jobs
    server.start(job)
    server.log(job, b"before\n")
    server.progress(job, 0.25, "epoch 1", loss=0.5)
    terminal.until("25%.*epoch 1  loss 0.5")
    server.log(job, b"after\n")
    terminal.until(r"\x1b\[2Kafter")
    terminal.until(r"after\r\n\r\x1b\[2K.*25%")
    server.end(job)
    assert terminal.code() == 0
    assert "succeeded" in terminal.seen.split("\x1b[2K")[-1]


@pytest.mark.parametrize(
    ("answer", "cancels", "code"), [("c\n", 1, 130), ("d\n", 0, 130), ("\n", 0, 130), ("\x03", 0, 130)]
)
def test_ctrl_c_on_a_terminal_asks(server: FakeServer, answer: str, cancels: int, code: int) -> None:
    server.on_cancel = lambda job: server.end(job, job_pb2.JOB_STATE_CANCELLED)
    terminal = Terminal(server.address, "run", "--", "x")
    server.until(lambda: server.count("WatchJobs") >= 1 and server.count("StreamLogs") >= 1)
    [job] = server.jobs
    server.start(job)
    terminal.until("runs on alpha")
    terminal.type("\x03")
    terminal.until(r"\[d\]etach \(the job goes on\) or \[c\]ancel it\?")
    terminal.type(answer)
    assert terminal.code() == code
    assert server.count("CancelJobs") == cancels
    assert ("was cancelled" if cancels else "the job goes on") in terminal.seen
    assert "Traceback" not in terminal.seen


def test_a_second_ctrl_c_leaves_a_job_that_is_being_cancelled(server: FakeServer) -> None:
    terminal = Terminal(server.address, "run", "--", "x")
    server.until(lambda: server.count("WatchJobs") >= 1 and server.count("StreamLogs") >= 1)
    [job] = server.jobs
    server.start(job)
    terminal.until("runs on alpha")
    terminal.type("\x03")
    terminal.until("ancel it")
    terminal.type("c\n")
    terminal.until("Ctrl-C leaves at once")
    terminal.type("\x03")
    assert terminal.code() == 130
    assert "the job goes on" in terminal.seen


def test_a_table_on_a_terminal(server: FakeServer) -> None:
    terminal = Terminal(server.address, "queues")
    assert terminal.code() == 0
    assert re.search(r"NAME(.|\n)*STATE(.|\n)*default +\S*active", terminal.seen)


def test_what_people_see(cli: Cli, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Output, "to_stdout", classmethod(lambda cls, json: cls(json, not json)))
    monkeypatch.setenv("COLUMNS", "160")
    assert cli("ps").out == "No such jobs.\n"
    server.add_agent("alpha", gpus=1)
    for argv, pattern in (
        (("submit", "--name", "[red]x", "--", "x"), r"^j0000000000001$"),
        (("ps",), r"^ID +STATE +NAME .*\nj0000000000001 +queued +\[red\]x .* ago"),
        (("show", "j0000000000001"), r"id: +j0000000000001\nname: +\[red\]x"),
        (
            ("agents", "--gpus", "--leases"),
            r"^NAME +STATE .*\nalpha(.|\n)*\nAGENT +INDEX .*\nalpha.*141GiB(.|\n)*No live",
        ),
        (("queues",), r"^NAME +STATE .*\ndefault +active"),
        (("explain", "j0000000000001"), r"is queued\n  no_agent_connected: no agent is connected"),
        (("drain", "alpha"), r"alpha is draining, with 0 live leases"),
        (("queues", "pause", "default"), r"default is paused: any number of running jobs"),
        (("cancel", "j0000000000001"), r"j0000000000001: cancelled"),
        (("wait", "j0000000000001"), r"job j0000000000001 was cancelled"),
    ):
        ran = cli(*argv)
        assert re.search(pattern, ran.out), (argv, ran.out)


def test_ps_watch_on_a_terminal(server: FakeServer) -> None:
    terminal = Terminal(server.address, "ps", "--watch")
    server.until(lambda: server.count("WatchJobs") >= 1)
    with_job = Terminal(server.address, "submit", "--name", "fresh", "--", "x")
    assert with_job.code() == 0
    terminal.until("fresh")
    terminal.type("\x03")
    assert terminal.code() == 130


def test_the_bar_fits_its_line() -> None:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", bar_text(Progress(0.5, "x" * 500, {"a": 1.0}, None), "3s", 60))
    assert len(plain) <= 60
    assert "50%" in plain
    assert "%" not in bar_text(Progress(None, "no fraction\nhere", {}, None), "3s", 60)


def test_text_for_people() -> None:
    assert one_line("a\nb\x1b[31m\t") == "a b [31m"
    assert [span_text(timedelta(seconds=s)) for s in (5, 192, 7500, 356400)] == ["5s", "3m12s", "2h05m", "4d3h"]

"""``lessor dev``: everything on one machine, and nothing of it left behind."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import lessor
from lessor import JobState
from tests.support.cluster import LESSOR, processes_of
from tests.support.processes import wait_gone

pytestmark = pytest.mark.e2e

SLEEPER = "exec sleep 3600"


class Dev:
    """One ``lessor dev``, with a home of its own."""

    def __init__(self, home: Path, *flags: str, user: str | None = None) -> None:
        self.home = home
        self._errors = home / "stderr"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LESSOR_")}
        # All that it starts inherits these, so that it can be found again.
        environment |= {"HOME": str(home), "TMPDIR": str(home), "XDG_DATA_HOME": str(home / "data")}
        identity: dict[str, object] = {}
        if user is not None:
            identity = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
        with self._errors.open("ab") as errors:
            self.process: subprocess.Popen[str] = subprocess.Popen(
                [str(LESSOR), "dev", *flags],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
                cwd="/",
                **identity,  # type: ignore[call-overload]
            )
        self.greeting = ""
        self.address = ""

    def up(self) -> None:
        """Waits until it says how to reach it."""
        assert self.process.stdout is not None
        self.greeting = self.process.stdout.readline()
        assert "LESSOR_ADDRESS=" in self.greeting, self.errors
        self.address = self.greeting.partition("LESSOR_ADDRESS=")[2].split()[0]

    @property
    def errors(self) -> str:
        """What it said on standard error."""
        return self._errors.read_text()

    def everything(self) -> set[int]:
        """Returns all its processes: children, theirs, keepers and jobs."""
        return {self.process.pid, *descendants(self.process.pid), *processes_of(self.home)}

    def interrupt(self) -> int:
        """Presses Ctrl-C; returns the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def close(self) -> None:
        """Ends whatever is left of it."""
        for pid in self.everything():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def descendants(pid: int) -> set[int]:
    """Returns the children of a process, and theirs."""
    found: set[int] = set()
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return found
    for child in children:
        found |= {child, *descendants(child)}
    return found


def names(pids: set[int]) -> str:
    """Returns the command lines of processes, for a failed assertion."""
    lines = []
    for pid in pids:
        try:
            lines.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(lines)


class Devs:
    """Starts them; after the test none is left."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._started: list[Dev] = []

    def start(self, *flags: str, home: str = "home", user: str | None = None) -> Dev:
        path = self.directory / home
        path.mkdir(exist_ok=True)
        if user is not None:
            shutil.chown(path, user)
        dev = Dev(path, *flags, user=user)
        self._started.append(dev)
        return dev

    def close(self) -> None:
        for dev in self._started:
            dev.close()


@pytest.fixture
def devs() -> Iterator[Devs]:
    # Not pytest's own directory: PostgreSQL runs as another user when the tests run as root.
    directory = Path(tempfile.mkdtemp(prefix="lessor-test-dev-"))
    directory.chmod(0o755)
    made = Devs(directory)
    yield made
    made.close()
    shutil.rmtree(directory)


def run_job(address: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a job as a user does."""
    return subprocess.run(
        [str(LESSOR), "run", "--address", address, "--", *command], capture_output=True, text=True, timeout=60
    )


def start_sleeper(address: str) -> str:
    """Submits a job that does not end by itself; returns its id once it runs."""
    with lessor.Client(address, timeout=60) as client:
        job = client.submit(["/bin/sh", "-c", f"echo up; {SLEEPER}"], ttl="10s")
        for _ in client.logs(job, follow=True):
            break
        return job.id


def assert_all_gone(pids: set[int], timeout_s: float = 60.0) -> None:
    for pid in pids:
        try:
            wait_gone(pid, timeout_s)
        except TimeoutError:
            pytest.fail(f"still running: {names({pid})}")


def test_it_says_how_to_reach_it_runs_a_job_and_leaves_nothing(devs: Devs) -> None:
    dev = devs.start("--ephemeral")
    dev.up()
    assert "1 agent" in dev.greeting
    ran = run_job(dev.address, "/bin/sh", "-c", "echo hello; exit 7")
    assert (ran.returncode, ran.stdout) == (7, "hello\n"), ran.stderr
    start_sleeper(dev.address)
    everything = dev.everything()
    assert SLEEPER.removeprefix("exec ") in names(everything)
    assert dev.interrupt() == 0, dev.errors
    assert_all_gone(everything)
    assert not processes_of(dev.home), names(set(processes_of(dev.home)))
    assert dev.errors == "stopping\n"
    assert [path.name for path in dev.home.iterdir()] == ["stderr"], "it keeps nothing"


def test_two_at_once_do_not_meet(devs: Devs) -> None:
    one, two = devs.start("--ephemeral", home="one"), devs.start("--ephemeral", home="two")
    one.up()
    two.up()
    assert one.address != two.address
    assert run_job(one.address, "/bin/echo", "one").stdout == "one\n"
    assert run_job(two.address, "/bin/echo", "two").stdout == "two\n"
    for dev in (one, two):
        with lessor.Client(dev.address, timeout=60) as client:
            assert len(list(client.list())) == 1
    everything = one.everything()
    assert one.interrupt() == 0
    assert_all_gone(everything)
    assert run_job(two.address, "/bin/echo", "still").stdout == "still\n"
    assert two.interrupt() == 0


def test_what_it_keeps_is_there_the_next_time(devs: Devs) -> None:
    first = devs.start("--data-dir", f"{devs.directory}/kept")
    first.up()
    with lessor.Client(first.address, timeout=60) as client:
        done = client.submit(["/bin/echo", "kept"])
        client.wait([done])
    sleeper = start_sleeper(first.address)
    assert first.interrupt() == 0, first.errors
    second = devs.start("--data-dir", f"{devs.directory}/kept")
    second.up()
    with lessor.Client(second.address, timeout=60) as client:
        assert {job.id for job in client.list()} == {done.id, sleeper}
        assert client.get(done).state is JobState.SUCCEEDED
        assert b"".join(chunk.data for chunk in client.logs(done)) == b"kept\n"
        # It ended with the first run, through no fault of its own: it is there to be run again.
        client.cancel(sleeper)
        (stopped,) = client.wait([sleeper], timeout=60)
        assert (stopped.state, stopped.failures) == (JobState.CANCELLED, 0)
    assert second.interrupt() == 0, second.errors


def test_a_data_directory_in_use_is_refused(devs: Devs) -> None:
    kept = f"{devs.directory}/kept"
    first = devs.start("--data-dir", kept, home="one")
    first.up()
    second = devs.start("--data-dir", kept, home="two")
    assert second.process.wait(60) == 1
    (line,) = second.errors.splitlines()
    assert line.startswith("error: ")
    assert kept in line
    assert run_job(first.address, "/bin/echo", "unharmed").stdout == "unharmed\n"
    assert first.interrupt() == 0


def test_killed_hard_it_leaves_nothing_either(devs: Devs) -> None:
    dev = devs.start("--ephemeral")
    dev.up()
    start_sleeper(dev.address)
    everything = dev.everything()
    dev.process.kill()
    assert dev.process.wait() == -signal.SIGKILL
    # Jobs at their lease's deadline at the latest: the sleeper's ttl is 10 s.
    assert_all_gone(everything)
    assert not processes_of(dev.home), names(set(processes_of(dev.home)))


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests of this file already run as an ordinary user")
def test_as_an_ordinary_user(devs: Devs) -> None:
    user = "nobody"
    if not can_run(user):
        pytest.skip(f"{Path(sys.executable).resolve()} or its packages cannot be read by {user}")
    dev = devs.start("--fake-gpus", "2", user=user)
    dev.up()
    ran = run_job(dev.address, "/bin/sh", "-c", "id -un")
    assert ran.stdout == f"{user}\n", ran.stderr
    everything = dev.everything()
    assert dev.interrupt() == 0, dev.errors
    assert_all_gone(everything)


def can_run(user: str) -> bool:
    """Returns whether ``user`` can start this Python and read what is installed in it."""
    command = [sys.executable, "-c", "import lessor_server.dev, lessor_agent.main"]
    try:
        return not subprocess.run(command, user=user, extra_groups=[], cwd="/", capture_output=True).returncode
    except PermissionError:
        return False

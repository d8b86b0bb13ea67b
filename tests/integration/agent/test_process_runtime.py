"""The process runtime: what a job is started with and what is told of its end."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lessor_agent.keeper import nursery
from lessor_agent.runtimes.base import Runtime, RuntimeContext, RuntimeUnavailable, StartRefused, StopCause
from lessor_agent.runtimes.process import ProcessRuntime, find_keepers
from lessor_agent.runtimes.process_execution import ProcessExecution
from tests.support.process_runtime import (
    Fifo,
    gone,
    idle,
    keeper_of,
    lives,
    open_runtime,
    python,
    run,
    shell,
    start_request,
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may start a job as another user")


@pytest.fixture
def reachable_dir() -> Iterator[Path]:
    """A directory other users can pass through, unlike tmp_path."""
    path = Path(tempfile.mkdtemp(prefix="lessor-test-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


def leases(runtime_dir: Path) -> list[str]:
    return os.listdir(runtime_dir / "state" / "leases")


async def test_exit_code_and_times(runtime: ProcessRuntime) -> None:
    before = datetime.now(UTC)
    _, exit = await run(runtime, shell(1, "exit 7"))
    assert (exit.exit_code, exit.signal, exit.stop_cause, exit.start_error) == (7, 0, None, None)
    assert exit.started_at is not None
    assert before <= exit.started_at <= exit.ended_at <= datetime.now(UTC)


async def test_signal(runtime: ProcessRuntime) -> None:
    _, exit = await run(runtime, shell(1, "kill -SEGV $$"))
    assert (exit.exit_code, exit.signal, exit.stop_cause) == (None, signal.SIGSEGV, None)


async def test_output_is_apart_and_byte_exact(runtime: ProcessRuntime) -> None:
    script = "import os; os.write(1, bytes(range(256)) * 1000); os.write(2, bytes(range(255, -1, -1)) * 1000)"
    execution, exit = await run(runtime, python(1, script))
    assert exit.exit_code == 0
    assert execution.output.stdout.read_bytes() == bytes(range(256)) * 1000
    assert execution.output.stderr.read_bytes() == bytes(range(255, -1, -1)) * 1000
    assert execution.output.events.read_bytes() == b""


async def test_output_files_exist_from_prepare_on_and_nothing_runs_before_begin(runtime: ProcessRuntime) -> None:
    execution = await runtime.prepare(shell(1, "echo ran"))
    for path in (execution.output.stdout, execution.output.stderr, execution.output.events):
        assert path.read_bytes() == b""
    await execution.stop(StopCause.STALE)
    exit = await execution.wait()
    assert exit.stop_cause is StopCause.STALE
    assert (exit.exit_code, exit.signal, exit.started_at, exit.start_error) == (None, 0, None, None)
    assert execution.output.stdout.read_bytes() == b""
    await execution.begin()
    assert await execution.wait() == exit


async def test_begin_twice_runs_once(runtime: ProcessRuntime) -> None:
    execution = await runtime.prepare(shell(1, "echo ran"))
    await asyncio.gather(execution.begin(), execution.begin())
    await execution.begin()
    first, second = await asyncio.gather(execution.wait(), execution.wait())
    assert first == second
    assert execution.output.stdout.read_text() == "ran\n"


async def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ALLOWED", "LC_TEST", "AWS_SECRET_ACCESS_KEY", "LESSOR_TOKEN", "LESSOR_ADDRESS"):
        monkeypatch.setenv(name, f"host {name}")
    request = start_request(
        41,
        ["/usr/bin/env", "-0"],
        env={"MINE": "a=b\nc", "LC_TEST": "job", "LESSOR_JOB_ID": "forged", "LESSOR_CHECKPOINT": "forged"},
        gpu_uuids=("GPU-a", "GPU-b"),
        attempt=3,
    )
    async with open_runtime(tmp_path / "state") as runtime:
        execution, exit = await run(runtime, request)
    assert exit.exit_code == 0
    env = dict(item.split("=", 1) for item in execution.output.stdout.read_text().split("\0") if item)
    lease_dir = execution.output.stdout.parent
    assert env.pop("PATH") == os.environ["PATH"]
    env.pop("LANG", None)
    for name in [name for name in env if name.startswith("LC_") and name != "LC_TEST"]:
        del env[name]
    assert env == {
        "ALLOWED": "host ALLOWED",
        "LC_TEST": "job",
        "MINE": "a=b\nc",
        "LESSOR_JOB_ID": "j0000000000001",
        "LESSOR_ATTEMPT": "3",
        "LESSOR_FENCING_TOKEN": "41",
        "LESSOR_EVENTS": f"{lease_dir}/events",
        "LESSOR_CANCEL": f"{lease_dir}/cancel",
        "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b",
        "NVIDIA_VISIBLE_DEVICES": "GPU-a,GPU-b",
    }


async def test_agents_own_environment_is_in_no_process_a_job_could_look_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LESSOR_TOKEN", "secret")
    async with open_runtime(tmp_path / "state") as runtime:
        execution = await runtime.prepare(shell(1, "true"))
        keeper_pid = execution.handle.data["keeper_pid"]
        assert b"secret" not in Path(f"/proc/{keeper_pid}/environ").read_bytes()


async def test_large_checkpoint_is_handed_over(runtime: ProcessRuntime) -> None:
    cursor = "é" * 32768
    execution, _ = await run(runtime, shell(1, 'printf %s "$LESSOR_CHECKPOINT"', checkpoint=cursor))
    assert execution.output.stdout.read_text() == cursor


async def test_process_starts_clean(runtime: ProcessRuntime) -> None:
    script = """
import json, os
print(json.dumps({
    "fds": sorted(int(n) for n in os.listdir("/proc/self/fd"))[:-1],
    "stdin": os.readlink("/proc/self/fd/0"),
    "umask": os.umask(0),
    "leader": os.getpid() == os.getsid(0) == os.getpgid(0),
}))
"""
    execution, exit = await run(runtime, python(1, script))
    assert exit.exit_code == 0, execution.output.stderr.read_text()
    seen = json.loads(execution.output.stdout.read_text())
    assert seen == {"fds": [0, 1, 2], "stdin": "/dev/null", "umask": 0o022, "leader": True}
    # By a program that, unlike Python and shells, changes no signal of its own.
    execution, exit = await run(runtime, start_request(2, ["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"]))
    blocked, ignored = (int(mask, 16) for mask in execution.output.stdout.read_text().split()[1::2])
    # Signals 32 and 33 are the C library's own: nobody can set them through it, so they are as they were.
    assert (blocked & ~(0b11 << 31), ignored & ~(0b11 << 31)) == (0, 0)


async def test_own_working_directory(runtime: ProcessRuntime) -> None:
    execution, _ = await run(runtime, shell(1, "pwd; ls -A; echo x > file"))
    work = execution.output.stdout.parent / "work"
    assert execution.output.stdout.read_text() == f"{work}\n"
    assert (work / "file").exists()


async def test_given_working_directory(runtime: ProcessRuntime, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    execution, _ = await run(runtime, shell(1, "pwd", working_dir=tmp_path / "there"))
    assert execution.output.stdout.read_text() == f"{tmp_path}/there\n"


@pytest.mark.parametrize(
    "kind", ["missing", "no-program", "not-executable", "no-interpreter", "no-format", "directory"]
)
async def test_start_errors(runtime: ProcessRuntime, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "program"
    file.write_text({"no-interpreter": "#!/no/such/interpreter\n", "no-format": "\x01\x02"}.get(kind, "#!/bin/sh\n"))
    file.chmod(0o644 if kind == "not-executable" else 0o755)
    request, expected = {
        "missing": (shell(1, "true", working_dir=tmp_path / "nowhere"), "working directory"),
        "no-program": (
            start_request(1, ["no-such-program"], env={"PATH": "/bin"}),
            "no-such-program is in no directory",
        ),
        "not-executable": (start_request(1, [str(file)]), "not permitted to run"),
        "no-interpreter": (start_request(1, [str(file)]), "no such program"),
        "no-format": (start_request(1, [str(file)]), "neither a program"),
        "directory": (start_request(1, [str(tmp_path)]), "not permitted to run"),
    }[kind]
    _, exit = await run(runtime, request)
    assert exit.start_error is not None
    assert expected in exit.start_error
    assert (exit.exit_code, exit.signal, exit.stop_cause, exit.started_at) == (None, 0, None, None)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (start_request(1, []), "names no program"),
        (start_request(1, ["/bin/true", "a\0b"]), "argument 1 contains a NUL"),
        (start_request(1, ["/bin/true", "x" * 200_000]), "argument 1 has 200000 bytes"),
        (start_request(1, ["/bin/true"], env={"A=B": "c"}), "'A=B'"),
        (start_request(1, ["/bin/true"], env={"A": "\ud800"}), "lone surrogates"),
        (start_request(1, ["/bin/true"], working_dir=Path("relative")), "not absolute"),
        (start_request(1, ["/bin/true"], user="no-such-user-here"), "no user 'no-such-user-here'"),
    ],
)
async def test_refused_requests_leave_nothing(
    runtime: ProcessRuntime, tmp_path: Path, request_: object, expected: str
) -> None:
    with pytest.raises(StartRefused, match=expected):
        await runtime.prepare(request_)  # type: ignore[arg-type]
    assert leases(tmp_path) == []
    assert find_keepers(tmp_path / "state") == {}


async def test_failed_starts_leak_nothing(runtime: ProcessRuntime, tmp_path: Path) -> None:
    async def fail(lease_id: int) -> None:
        execution, exit = await run(runtime, start_request(lease_id, ["no-such-program"]))
        assert exit.start_error is not None
        await execution.forget()
        # A file where the lease's directory should be.
        blocked = tmp_path / "state" / "leases" / str(lease_id)
        blocked.write_text("")
        with pytest.raises(StartRefused, match="cannot prepare"):
            await runtime.prepare(shell(lease_id, "true"))
        blocked.unlink()

    await fail(1)
    before = len(os.listdir("/proc/self/fd"))
    for lease_id in range(2, 12):
        await fail(lease_id)
    assert len(os.listdir("/proc/self/fd")) == before
    assert leases(tmp_path) == []


@needs_root
async def test_runs_as_another_user(reachable_dir: Path) -> None:
    script = 'id -un; id -G; pwd; echo x > file; echo "{}" >> "$LESSOR_EVENTS"; echo err > /dev/stderr; echo $HOME'
    async with open_runtime(reachable_dir / "state") as runtime:
        (reachable_dir / "state").chmod(0o711)
        assert runtime.capabilities.can_set_user
        execution, exit = await run(runtime, shell(1, script, user="nobody"))
        assert exit.exit_code == 0, execution.output.stderr.read_text()
        account = pwd.getpwnam("nobody")
        groups = os.getgrouplist("nobody", account.pw_gid)
        name, seen_groups, directory, home = execution.output.stdout.read_text().splitlines()
        assert name == "nobody"
        assert sorted(map(int, seen_groups.split())) == sorted(set(groups))
        assert directory == str(execution.output.stdout.parent / "work")
        assert home == account.pw_dir
        assert execution.output.events.read_text() == "{}\n"
        assert execution.output.stderr.read_text() == "err\n"


@needs_root
async def test_job_of_another_user_cannot_touch_its_keepers_files(reachable_dir: Path) -> None:
    script = "cd ..; for f in record control; do (echo x >> $f) 2>/dev/null && echo wrote $f; done; ls . ; :"
    async with open_runtime(reachable_dir / "state") as runtime:
        (reachable_dir / "state").chmod(0o711)
        execution, exit = await run(runtime, shell(1, script, user="nobody"))
        assert exit.exit_code == 0
        assert execution.output.stdout.read_text() == ""


@needs_root
async def test_a_keeper_of_another_users_lease_guards_that_one_only(reachable_dir: Path) -> None:
    async with open_runtime(reachable_dir / "state") as runtime:
        (reachable_dir / "state").chmod(0o711)
        mine, _ = await run(runtime, shell(1, ":"))
        await mine.forget()
        await idle(keeper_of(mine))
        theirs, exit = await run(runtime, shell(2, "id -un", user="nobody"))
        assert (exit.exit_code, theirs.output.stdout.read_text()) == (0, "nobody\n")
        assert keeper_of(theirs) != keeper_of(mine)
        await gone(keeper_of(theirs))
        last, _ = await run(runtime, shell(3, ":"))
        assert keeper_of(last) == keeper_of(mine)


@needs_root
async def test_another_users_directory_counts_not_what_root_can_reach(reachable_dir: Path) -> None:
    (reachable_dir / "closed").mkdir(mode=0o700)
    (reachable_dir / "closed" / "open").mkdir(mode=0o777)
    async with open_runtime(reachable_dir / "state") as runtime:
        (reachable_dir / "state").chmod(0o711)
        _, exit = await run(runtime, shell(1, ":", user="nobody", working_dir=reachable_dir / "closed" / "open"))
        assert exit.start_error is not None
        assert "working directory" in exit.start_error


@needs_root
async def test_state_directory_the_user_cannot_pass_is_refused_with_the_remedy(
    runtime: ProcessRuntime, tmp_path: Path
) -> None:
    with pytest.raises(StartRefused, match=r"user nobody cannot reach .* \(chmod o\+x"):
        await runtime.prepare(shell(1, "true", user="nobody"))
    assert leases(tmp_path) == []


@needs_root
async def test_the_agents_own_user_may_be_named(runtime: ProcessRuntime) -> None:
    _, exit = await run(runtime, shell(1, "true", user="root"))
    assert exit.exit_code == 0


async def test_run_timeout(runtime: ProcessRuntime) -> None:
    request = shell(1, "trap '' TERM; exec sleep 1000", grace=timedelta(milliseconds=100))
    _, exit = await run(runtime, replace(request, run_timeout=timedelta(milliseconds=200)))
    assert (exit.stop_cause, exit.signal) == (StopCause.RUN_TIMEOUT, signal.SIGKILL)
    assert exit.started_at is not None
    assert exit.ended_at - exit.started_at >= timedelta(milliseconds=290)


async def test_fifty_at_once(runtime: ProcessRuntime, tmp_path: Path) -> None:
    executions = await asyncio.gather(*(runtime.prepare(shell(n, f"echo {n}; exit {n}")) for n in range(1, 51)))
    await asyncio.gather(*(execution.begin() for execution in executions))
    exits = await asyncio.gather(*(execution.wait() for execution in executions))
    assert [exit.exit_code for exit in exits] == list(range(1, 51))
    assert [execution.output.stdout.read_text() for execution in executions] == [f"{n}\n" for n in range(1, 51)]
    await asyncio.gather(*(execution.forget() for execution in executions))
    assert leases(tmp_path) == []


async def test_prepare_is_idempotent(runtime: ProcessRuntime, tmp_path: Path) -> None:
    request = shell(1, "echo ran")
    first, second = await asyncio.gather(runtime.prepare(request), runtime.prepare(request))
    assert first is second
    assert await runtime.prepare(request) is first
    assert len(find_keepers(tmp_path / "state")) == 1
    await first.begin()
    await first.wait()
    assert await runtime.prepare(request) is first
    assert first.output.stdout.read_text() == "ran\n"


async def test_two_runtimes_prepare_one_lease_once(runtime: ProcessRuntime, tmp_path: Path) -> None:
    other: Runtime = ProcessRuntime(RuntimeContext(tmp_path / "state", ()))
    await other.open()
    for lease_id in range(1, 11):
        request = shell(lease_id, "echo ran")
        # One after the other: the state directory's lock lets no two agents work on it at once.
        mine, theirs = await runtime.prepare(request), await other.prepare(request)
        assert mine.handle == theirs.handle
        await asyncio.gather(mine.begin(), theirs.begin())
        assert await mine.wait() == await theirs.wait()
        assert mine.output.stdout.read_text() == "ran\n"
    await other.close()


async def test_directory_of_a_crashed_prepare_is_used_again(runtime: ProcessRuntime, tmp_path: Path) -> None:
    remains = tmp_path / "state" / "leases" / "1"
    (remains / "work").mkdir(parents=True)
    (remains / "record").write_text("torn")
    execution, exit = await run(runtime, shell(1, "echo ran"))
    assert exit.exit_code == 0
    assert execution.output.stdout.read_text() == "ran\n"


async def test_cancelled_prepare_leaves_nothing(runtime: ProcessRuntime, tmp_path: Path) -> None:
    start = asyncio.create_task(runtime.prepare(shell(1, "echo ran")))
    await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    # Closing waits for what it was to undo.
    await runtime.close()
    assert leases(tmp_path) == []
    assert find_keepers(tmp_path / "state") == {}
    await runtime.open()


async def test_zygote_killed_is_replaced_and_executions_go_on(runtime: ProcessRuntime, fifo: Fifo) -> None:
    running = await runtime.prepare(shell(1, f"read _ < {fifo.path}; echo done"))
    await running.begin()
    zygote = runtime.zygote_pid
    assert zygote is not None
    os.kill(zygote, signal.SIGKILL)
    await gone(zygote)
    _, exit = await run(runtime, shell(2, "exit 3"))
    assert exit.exit_code == 3
    assert runtime.zygote_pid not in (None, zygote)
    fifo.path.write_text("go\n")
    assert (await running.wait()).exit_code == 0
    assert running.output.stdout.read_text() == "done\n"


async def test_zygote_killed_amid_prepares(runtime: ProcessRuntime) -> None:
    starts = [asyncio.create_task(runtime.prepare(shell(n, "echo ran"))) for n in range(1, 21)]
    first = await asyncio.shield(starts[0])
    assert runtime.zygote_pid is not None
    os.kill(runtime.zygote_pid, signal.SIGKILL)
    executions = await asyncio.gather(*starts)
    await asyncio.gather(*(execution.begin() for execution in executions))
    assert {(await execution.wait()).exit_code for execution in executions} == {0}
    assert {execution.output.stdout.read_text() for execution in executions} == {"ran\n"}
    assert executions[0] is first


async def test_forget_removes_what_the_job_made_unremovable(runtime: ProcessRuntime, tmp_path: Path) -> None:
    execution, _ = await run(runtime, shell(1, "mkdir -p a/b; touch a/b/c; chmod 000 a/b a; ln -s /etc link"))
    await execution.forget()
    await execution.forget()
    assert leases(tmp_path) == []
    assert Path("/etc/passwd").exists()


async def test_zygote_ends_with_the_runtime_that_has_no_jobs(tmp_path: Path) -> None:
    async with open_runtime(tmp_path / "state") as runtime:
        await run(runtime, shell(1, "true"))
        zygote = runtime.zygote_pid
        assert zygote is not None
        await runtime.close()
        await gone(zygote)
        await runtime.open()


async def test_zygote_outlives_the_runtime_with_its_jobs(tmp_path: Path, fifo: Fifo) -> None:
    async with open_runtime(tmp_path / "state") as runtime:
        execution = await runtime.prepare(shell(1, f"echo started > {fifo.path}; exec sleep 1000"))
        await execution.begin()
        zygote, keeper = runtime.zygote_pid, int(execution.handle.data["keeper_pid"])
        assert zygote is not None
        await fifo.line()
        await runtime.close()
        os.kill(zygote, signal.SIGTERM)
        assert lives(keeper)
        await runtime.open()
        assert runtime.zygote_pid != zygote
        adopted = await runtime.adopt(execution.handle)
        assert lives(zygote)
        await adopted.stop(StopCause.CANCELLED, timedelta(0))
        assert (await adopted.wait()).stop_cause is StopCause.CANCELLED
        await gone(zygote)


async def test_unwritable_state_directory_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeUnavailable, match="cannot make"):
        await ProcessRuntime(RuntimeContext(tmp_path / "file" / "state", ())).open()


async def test_state_directory_with_a_path_longer_than_a_socket_name(tmp_path: Path) -> None:
    async with open_runtime(tmp_path / ("d" * 120) / "state") as runtime:
        _, exit = await run(runtime, shell(1, "exit 5"))
        assert exit.exit_code == 5
        assert [handle.data["lease_id"] for handle in await runtime.strays()] == [1]


async def test_begin_tells_whether_it_ran(runtime: ProcessRuntime) -> None:
    assert await (await runtime.prepare(shell(1, "true"))).begin()
    assert not await (await runtime.prepare(start_request(2, ["/no/such"]))).begin()
    stopped = await runtime.prepare(shell(3, "true"))
    await stopped.stop(StopCause.CANCELLED)
    await stopped.wait()
    assert not await stopped.begin()


async def test_a_start_whose_zygote_is_silent_is_made_by_another(
    runtime: ProcessRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runtime.zygote_pid is not None
    os.kill(runtime.zygote_pid, signal.SIGSTOP)
    monkeypatch.setattr(nursery, "ANSWER_TIMEOUT_S", 0.5)
    _, exit = await run(runtime, shell(1, "exit 4"))
    assert exit.exit_code == 4


async def test_a_keeper_that_cannot_be_understood_ends_its_job(
    runtime: ProcessRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("garbled")

    monkeypatch.setattr(ProcessExecution, "_hear", fail)
    execution = await runtime.prepare(shell(1, "exec sleep 60"))
    exit = await asyncio.wait_for(execution.wait(), 20)
    assert exit.stop_cause is StopCause.KEEPER_DIED


async def test_whatever_fails_after_a_keepers_death_an_end_is_told(
    runtime: ProcessRuntime, fifo: Fifo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no idea")

    execution = await runtime.prepare(shell(1, f"echo up > {fifo.path}; exec sleep 60"))
    await execution.begin()
    monkeypatch.setattr(ProcessExecution, "_stored_outcome", fail)
    os.kill(find_keepers(tmp_path / "state")[1], signal.SIGKILL)
    exit = await asyncio.wait_for(execution.wait(), 20)
    assert exit.stop_cause is StopCause.KEEPER_DIED


async def test_whether_a_job_may_gain_privileges(runtime: ProcessRuntime) -> None:
    execution, _ = await run(runtime, shell(1, "grep NoNewPrivs /proc/self/status"))
    assert execution.output.stdout.read_text().split() == ["NoNewPrivs:", "0" if os.geteuid() == 0 else "1"]

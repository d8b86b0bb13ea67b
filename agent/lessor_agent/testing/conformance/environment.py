"""What a job is started with: arguments, variables, working directory, GPUs, user."""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from lessor_agent.runtimes.base import StartRefused
from lessor_agent.testing.conformance.checks import Check
from lessor_agent.testing.conformance.holding import holds
from lessor_agent.testing.conformance.stage import Stage, told
from lessor_agent.testing.conformance.subject import Subject

_ODD = (
    "", " ", "two words", "'single' \"double\" `back`", "a\nb\r\n", "\ttab", "$HOME ${PATH} $(id)", "*", "?", "~",
    "back\\slash\\", "-x", "--", "a;b|c&d>e", "#", "%s%d", "ünïcödé ☃ 🚀", "\x01\x7f", "!history",
)  # fmt: skip
_CURSOR = "é" * 32_768
"""64 KiB."""
_OF_ANOTHER_USER = 'id -un && echo mine > left && ls -A && echo "{}" >> "$LESSOR_EVENTS"'
"""Who it is, and whether it can write where it runs and what it has to say."""


@contextlib.contextmanager
def agents_own(variables: Mapping[str, str]) -> Iterator[None]:
    """Has the agents that are started within it have these variables."""
    # None of them is anybody else's, and only these are touched: other checks may run beside this one.
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


class EnvironmentChecks(Subject):
    """What an execution is started with."""

    @holds(Check.ARGV)
    async def test_argv(self, stage: Stage) -> None:
        execution, _ = await stage.run("tell", *_ODD)
        assert told(execution)["argv"] == [argument.encode() for argument in _ODD]

    @holds(Check.ENV_OF_JOB)
    async def test_env_of_job(self, stage: Stage) -> None:
        env = {f"MINE_{number}": value for number, value in enumerate(_ODD)} | {"EQUALS": "a=b=c", "LC_TEST": "mine"}
        execution, _ = await stage.run("tell", env=env)
        environ = told(execution)["environ"]
        assert {name: environ.get(name) for name in env} == env

    @holds(Check.ENV_OF_LESSOR)
    async def test_env_of_lessor(self, stage: Stage) -> None:
        names = ("LESSOR_JOB_ID", "LESSOR_ATTEMPT", "LESSOR_FENCING_TOKEN", "LESSOR_EVENTS", "LESSOR_CANCEL")
        request = stage.request("tell", attempt=3, env=dict.fromkeys(names, "forged"))
        execution = await stage.start(request)
        await stage.end(execution)
        found = told(execution)
        environ = found["environ"]
        assert [environ.get(name) for name in names[:3]] == [request.job_id, "3", str(request.lease_id)]
        assert found["events_exist"], f"LESSOR_EVENTS names no file: {environ.get('LESSOR_EVENTS')!r}"
        assert environ.get("LESSOR_CANCEL") not in (None, "", "forged")
        assert not found["cancel_exists"]

    @holds(Check.ENV_OF_HOST)
    async def test_env_of_host(self, stage: Stage) -> None:
        variables = {"CONFORMANCE_ALLOWED": "a=b\nc", "CONFORMANCE_PREFIX_X": "☃", "CONFORMANCE_HIDDEN": "hidden"}
        with agents_own(variables):
            await stage.restart()
            execution, _ = await stage.run("tell")
            again, _ = await stage.run("tell", env={"CONFORMANCE_ALLOWED": "the job's"})
        del variables["CONFORMANCE_HIDDEN"]
        environ = told(execution)["environ"]
        assert {name: value for name, value in environ.items() if name.startswith("CONFORMANCE_")} == variables
        assert told(again)["environ"]["CONFORMANCE_ALLOWED"] == "the job's"

    @holds(Check.ENV_NO_CREDENTIALS)
    async def test_env_no_credentials(self, stage: Stage) -> None:
        secret = "hunter2-of-the-agent"
        with agents_own({"LESSOR_CONFORMANCE_TOKEN": secret, "CONFORMANCE_SECRET_ACCESS_KEY": secret}):
            await stage.restart()
            execution, _ = await stage.run("tell")
        assert [name for name, value in told(execution)["environ"].items() if secret in value] == []

    @holds(Check.CHECKPOINT)
    async def test_checkpoint(self, stage: Stage) -> None:
        execution, _ = await stage.run("tell", checkpoint=_CURSOR)
        assert told(execution)["environ"].get("LESSOR_CHECKPOINT") == _CURSOR
        execution, _ = await stage.run("tell", env={"LESSOR_CHECKPOINT": "forged"})
        assert "LESSOR_CHECKPOINT" not in told(execution)["environ"]

    @holds(Check.WORKING_DIR_GIVEN)
    async def test_working_dir_given(self, stage: Stage) -> None:
        place = stage.place()
        _, exit = await stage.run("tell", working_dir=Path(self.there(place.path)))
        assert exit.exit_code == 0
        # Where the suite sees it, whatever the job calls it.
        assert [path.name for path in place.path.iterdir()] == ["left"]

    @holds(Check.WORKING_DIR_FRESH)
    async def test_working_dir_fresh(self, stage: Stage) -> None:
        for _ in range(2):
            execution, _ = await stage.run("tell")
            # What the first has left there the second would find.
            assert told(execution)["listing"] == []

    @holds(Check.GPUS)
    async def test_gpus(self, stage: Stage) -> None:
        first, second = self.gpu_uuids[:2]
        for gpus in ((first, second), (second,)):
            execution, _ = await stage.run("tell", gpu_uuids=gpus, env=_WIDER)
            assert visible(told(execution)["environ"]) == [",".join(gpus)] * 2

    @holds(Check.NO_GPUS)
    async def test_no_gpus(self, stage: Stage) -> None:
        for env in ({}, _WIDER):
            execution, _ = await stage.run("tell", env=env)
            assert visible(told(execution)["environ"]) == ["", ""]

    @holds(Check.USER)
    async def test_user(self, stage: Stage) -> None:
        # A shell, for the Python that tests run with may lie where no other user can read.
        user = another_user(self.other_user)
        request = stage.request(argv=["/bin/sh", "-c", _OF_ANOTHER_USER], user=user)
        if not stage.runtime.capabilities.can_set_user:
            with pytest.raises(StartRefused):
                await stage.prepare(request)
            assert await stage.runtime.strays() == []
            return
        execution = await stage.start(request)
        exit = await stage.end(execution)
        output = execution.output
        assert (exit.exit_code, output.stderr.read_text(errors="replace")) == (0, "")
        assert output.stdout.read_text() == f"{user}\nleft\n"
        assert output.events.read_text() == "{}\n"

    @holds(Check.USER_UNKNOWN)
    async def test_user_unknown(self, stage: Stage) -> None:
        with pytest.raises(StartRefused):
            await stage.prepare(stage.request("tell", user="no-such-user-here"))
        assert await stage.runtime.strays() == []


_WIDER = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "NVIDIA_VISIBLE_DEVICES": "all"}


def another_user(name: str) -> str:
    """Returns ``name``, or root's where it is this agent's own, which any agent may name."""
    try:
        return "root" if pwd.getpwnam(name).pw_uid == os.geteuid() else name
    except KeyError:
        return name


def visible(environ: Mapping[str, str]) -> list[str | None]:
    """Returns the GPUs that CUDA, and a container's tools, would show."""
    return [environ.get("CUDA_VISIBLE_DEVICES"), environ.get("NVIDIA_VISIBLE_DEVICES")]

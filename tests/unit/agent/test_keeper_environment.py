"""What a workload is started with: environment, strings, account."""

from __future__ import annotations

import os
import pwd
from dataclasses import replace
from datetime import timedelta

import pytest

from lessor_agent.runtimes.base import OnLost, StartRefused, StartRequest
from lessor_agent.runtimes.workload_environment import (
    check_strings,
    find_account,
    host_environment,
    workload_environment,
)

REQUEST = StartRequest(
    lease_id=5,
    job_id="j1",
    attempt=2,
    argv=("x",),
    env={},
    working_dir=None,
    user=None,
    gpu_uuids=(),
    grace=timedelta(seconds=1),
    on_lost=OnLost.STOP,
    run_timeout=None,
    checkpoint=None,
    deadline_ns=0,
)
HOST = {"PATH": "/bin", "HOME": "/root", "USER": "root", "NCCL_DEBUG": "1", "LESSOR_TOKEN": "s", "SECRET": "s"}


def names(allow: list[str]) -> set[str]:
    env = workload_environment(REQUEST, "/d", host_environment(HOST, allow), None)
    return {name for name in env if name in HOST}


def test_only_what_is_allowed_passes() -> None:
    assert names([]) == set()
    assert names(["PATH", "NCCL_*"]) == {"PATH", "NCCL_DEBUG"}
    assert names(["NCCL"]) == set()


def test_no_list_lets_the_agents_own_variables_pass() -> None:
    assert names(["*", "LESSOR_*", "LESSOR_TOKEN"]) == set(HOST) - {"LESSOR_TOKEN"}


def test_job_without_gpus_sees_none() -> None:
    env = workload_environment(replace(REQUEST, env={"CUDA_VISIBLE_DEVICES": "0"}), "/d", {}, None)
    assert env["CUDA_VISIBLE_DEVICES"] == env["NVIDIA_VISIBLE_DEVICES"] == ""
    env = workload_environment(replace(REQUEST, gpu_uuids=("GPU-1", "GPU-2")), "/d", {}, None)
    assert env["CUDA_VISIBLE_DEVICES"] == env["NVIDIA_VISIBLE_DEVICES"] == "GPU-1,GPU-2"


def test_checkpoint_only_if_there_is_one() -> None:
    assert "LESSOR_CHECKPOINT" not in workload_environment(
        replace(REQUEST, env={"LESSOR_CHECKPOINT": "x"}), "/d", {}, None
    )
    env = workload_environment(replace(REQUEST, checkpoint=""), "/d", {}, None)
    assert env["LESSOR_CHECKPOINT"] == ""


def test_another_account_brings_its_own_home_and_the_job_has_the_last_word() -> None:
    account = pwd.struct_passwd(("ann", "x", 1000, 1000, "", "/home/ann", "/bin/zsh"))
    env = workload_environment(replace(REQUEST, env={"SHELL": "/bin/sh"}), "/d", host_environment(HOST, ["*"]), account)
    assert (env["HOME"], env["USER"], env["LOGNAME"], env["SHELL"]) == ("/home/ann", "ann", "ann", "/bin/sh")


def test_refusals_never_show_a_value() -> None:
    with pytest.raises(StartRefused) as refusal:
        check_strings(["x"], {"TOKEN": "geheim\0"})
    assert "TOKEN" in str(refusal.value)
    assert "geheim" not in str(refusal.value)


def test_longest_string() -> None:
    check_strings(["x" * (128 * 1024 - 1)], {"A": "é" * 64_000})
    with pytest.raises(StartRefused, match="131072 bytes"):
        check_strings(["x" * 128 * 1024], {})


def test_another_user_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    account = next(entry for entry in pwd.getpwall() if entry.pw_uid not in (0, os.geteuid()))
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(StartRefused, match="runs as uid 54321; run the agent as root, or leave the user out"):
        find_account(account.pw_name)
    monkeypatch.setattr(os, "geteuid", lambda: account.pw_uid)
    assert find_account(account.pw_name) is None
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert find_account(account.pw_name) == account

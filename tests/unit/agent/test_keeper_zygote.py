"""The zygote, served to its end in this process: what it answers when it cannot fork."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
from collections.abc import Iterator

import pytest

from lessor_agent.keeper.zygote import Zygote


@pytest.fixture
def restored_signals() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGCHLD)
    wakeup = signal.set_wakeup_fd(-1)
    yield
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, handler)


def serve(*requests: dict[str, object]) -> list[dict[str, object]]:
    """Returns the zygote's answers, the greeting left out."""
    agent, zygote = socket.socketpair()
    with agent, zygote:
        agent.sendall(b"".join(json.dumps(request).encode() + b"\n" for request in requests))
        agent.shutdown(socket.SHUT_WR)
        Zygote(zygote).serve()
        zygote.shutdown(socket.SHUT_WR)
        lines = [json.loads(line) for line in agent.makefile("rb")]
    assert lines[0] == {"ready": os.getpid()}
    return lines[1:]


@pytest.mark.usefixtures("restored_signals")
@pytest.mark.parametrize("call", ["fork", "pipe"])
def test_no_process_or_descriptor_left_is_told_and_leaks_nothing(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    calls = 0
    real = getattr(os, call)

    def fails(*_: object) -> object:
        nonlocal calls
        calls += 1
        if call == "pipe" and calls == 1:
            # The zygote's own, before anything is asked of it.
            return real()
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    monkeypatch.setattr(os, call, fails)
    before = descriptors()
    answers = serve({"id": 7, "op": "fork", "spec": {}}, {"id": 8, "op": "sweep"})
    assert answers == [
        {"id": 7, "error": f"cannot start a keeper: {os.strerror(errno.EAGAIN)}"},
        {"id": 8, "swept": True},
    ]
    # All but the zygote's own pair, which ends with its process.
    assert descriptors() <= before + 2

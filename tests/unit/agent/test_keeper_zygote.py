"""The zygote, served to its end in a process of its own: what it answers when it cannot fork."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

# A zygote reaps and kills every child of its process that is no keeper: it must not run in the tests' own.
_SERVE = """
import errno, json, os, socket, sys

from lessor_agent.keeper.zygote import Zygote

call = sys.argv[1]

def fails(*_):
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

def descriptors():
    return len(os.listdir("/proc/self/fd"))

agent, zygote = socket.socketpair()
agent.sendall(sys.stdin.buffer.read())
agent.shutdown(socket.SHUT_WR)
setattr(socket if call == "socketpair" else os, call, fails)
before = descriptors()
Zygote(zygote).serve()
after = descriptors()
answers = [json.loads(line) for line in agent.makefile("rb")]
print(json.dumps({"pid": os.getpid(), "answers": answers, "left_open": after - before}))
"""


@pytest.mark.parametrize("call", ["fork", "socketpair"])
def test_no_process_or_descriptor_left_is_told_and_leaks_nothing(call: str) -> None:
    requests = [{"id": 7, "op": "fork", "spec": "{}", "own": False}, {"id": 8, "op": "sweep"}]
    served = subprocess.run(
        [sys.executable, "-c", _SERVE, call],
        input="".join(json.dumps(request) + "\n" for request in requests).encode(),
        capture_output=True,
        check=True,
        timeout=30,
    )
    told = json.loads(served.stdout)
    assert told["answers"] == [
        {"ready": told["pid"]},
        {"id": 7, "error": f"cannot start a keeper: {os.strerror(errno.EAGAIN)}"},
        {"id": 8, "swept": True},
    ]
    # Its own pair, which ends with its process, and not the agent's connection any more.
    assert told["left_open"] == 2 - 1

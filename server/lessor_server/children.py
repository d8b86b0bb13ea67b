"""Child processes that do not outlive their parent."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

# Asks the kernel to end this process with its parent, then becomes the command.
# A parent that died in between is noticed by its process id.
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def command(arguments: Sequence[str], parent_pid: int) -> list[str]:
    """Returns what to execute to run this Python with ``arguments`` as a child of ``parent_pid``.

    The child gets SIGTERM when the thread that started it ends.
    """
    # The launcher needs the standard library alone, whatever lies in the working directory.
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER]
    return [*launcher, str(parent_pid), sys.executable, *arguments]


def start(arguments: Sequence[str], log: Path, parent_pid: int) -> subprocess.Popen[str]:
    """Starts this Python with ``arguments``; its standard error goes to ``log``, its output to a pipe.

    It gets SIGTERM when the thread that called this ends, and no Ctrl-C of its own.
    """
    with log.open("ab") as stream:
        return subprocess.Popen(
            command(arguments, parent_pid),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            process_group=0,
        )


def stop(child: subprocess.Popen[str], timeout_s: float) -> None:
    """Ends a child with SIGTERM, and with SIGKILL if it has not ended after ``timeout_s`` seconds."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.stdout is not None:
        child.stdout.close()


def first_line(child: subprocess.Popen[str], log: Path) -> str:
    """Returns the first line a child prints.

    Raises:
        ChildEndedError: It ended without one.
    """
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        child.wait()
        raise ChildEndedError(last_line(log) or f"it ended with code {child.returncode}")
    return line.strip()


def last_line(log: Path) -> str:
    """Returns the last line of a log file that holds something."""
    with contextlib.suppress(OSError):
        lines = [line for line in _tail(log.open("rb")).splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""
    return ""


def _tail(stream: IO[bytes]) -> str:
    with stream:
        stream.seek(0, 2)
        stream.seek(max(0, stream.tell() - 4096))
        return stream.read().decode(errors="replace")


class ChildEndedError(Exception):
    """A child ended before it was up; the message is its last word."""

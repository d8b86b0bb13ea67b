"""The few kernel calls the standard library does not have: prctl, and the process title."""

from __future__ import annotations

import ctypes
import os

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38

# Looked up once and before any fork: a keeper must not have to load a library
# at the moment it is needed most.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_libc.prctl.restype = ctypes.c_int

_ARG_START_FIELD = 48
"""Number of ``arg_start`` in /proc/<pid>/stat, counted from 1; ``arg_end`` follows."""

KEEPER_TITLE = b"lessor-keeper"
"""argv[0] of every keeper, and its name in ps and top, of which the kernel keeps 15 bytes."""

_name = ctypes.create_string_buffer(KEEPER_TITLE)

TITLE_RESERVE = "." * 64
"""Last argument of the zygote: room so that a keeper's title always fits over the zygote's arguments."""


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def become_subreaper() -> None:
    """Makes every orphan below this process a child of this process."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(signum: int) -> None:
    """Asks the kernel for ``signum`` when the parent dies. A later change of user undoes it."""
    _prctl(_PR_SET_PDEATHSIG, signum)


def gain_no_privileges() -> None:
    """Makes set-user-ID, set-group-ID and file capabilities without effect here and in all that descends from here."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


LEAVING_TITLE = b"\0".join((KEEPER_TITLE, b"--leaving", b""))
"""The command line of a keeper whose lease is over: nobody may kill it for that one any more."""

IDLE_TITLE = b"\0".join((KEEPER_TITLE, b"--idle", b""))
"""The command line of a keeper that guards nothing and waits for another lease."""


def keeper_title(lease_id: int, state_dir: str) -> bytes:
    """Returns the command line by which a keeper is recognised in /proc, NUL-separated."""
    return b"\0".join((KEEPER_TITLE, b"--lease", str(lease_id).encode(), b"--state-dir", os.fsencode(state_dir), b""))


def parse_keeper_title(cmdline: bytes) -> tuple[int, str] | None:
    """Returns (lease_id, state_dir) of a keeper's command line, or None if it is none."""
    parts = cmdline.rstrip(b"\0").split(b"\0")
    if len(parts) != 5 or parts[0] != KEEPER_TITLE or parts[1] != b"--lease" or parts[3] != b"--state-dir":
        return None
    if not parts[2].isdigit():
        return None
    return int(parts[2]), os.fsdecode(parts[4])


def read_title(pid: int) -> tuple[int, str] | None:
    """Returns (lease_id, state_dir) of a keeper of this user; None: ``pid`` is none that guards a lease."""
    try:
        if os.stat(f"/proc/{pid}").st_uid != os.geteuid():
            return None
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return parse_keeper_title(file.read())
    except OSError:
        # It ended meanwhile.
        return None


def title_room() -> tuple[int, int]:
    """Returns where this process's arguments lie, (address, bytes), found once: forked processes have it from here."""
    global _title_room
    if _title_room is None:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        # The first field after the parenthesis is number 3.
        start, end = int(fields[_ARG_START_FIELD - 3]), int(fields[_ARG_START_FIELD - 2])
        _title_room = (start, end - start) if 0 < start < end else (0, 0)
    return _title_room


_title_room: tuple[int, int] | None = None


def set_title(title: bytes) -> None:
    """Replaces this process's command line as /proc and ps show it.

    It writes over the memory that holds the arguments it was started with; a
    title longer than that is cut.
    """
    start, room = title_room()
    if room:
        # The last byte stays NUL, or the kernel would take it for a title that goes on into the environment.
        ctypes.memmove(start, title[: room - 1].ljust(room, b"\0"), room)


def set_keeper_name() -> None:
    """Names this process as a keeper."""
    _prctl(_PR_SET_NAME, ctypes.addressof(_name))

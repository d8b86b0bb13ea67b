"""Control groups that freeze what is in them: version 2 (``cgroup.freeze``), else version 1 (``freezer.state``).

A group hangs below the one that its maker is in, which is where a service
manager that delegates lets it be made. It limits nothing: no controller is
turned on for it. The kernel freezes all members at once, those that are being
born included, and nothing shows to them or to their parents.

What is in a frozen group of version 1 does not die of SIGKILL before it is
thawed. Then it does, without running: whoever kills calls :func:`groups_of`
before and :func:`thaw_all` after.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_PREFIX = "lessor-"
_NAME = re.compile(_PREFIX + r"\d+-(?P<keeper>\d+)")
_INSIDE = re.compile(rf"(?P<parent>.*)/(?P<name>{_NAME.pattern})(/.*)?")
"""The path of such a group, or of one below it that the workload made."""

_ESCAPED = re.compile(r"\\([0-7]{3})")


class _Kind(NamedTuple):
    """How a version of control groups freezes."""

    file: str
    frozen: bytes
    thawed: bytes
    proof_file: str
    proof: bytes


_KINDS = {
    2: _Kind("cgroup.freeze", b"1", b"0", "cgroup.events", b"frozen 1"),
    1: _Kind("freezer.state", b"FROZEN", b"THAWED", "freezer.state", b"FROZEN"),
}
"""By version; the one that is tried first comes first."""


class Group(NamedTuple):
    """One group. Every method raises OSError where the kernel refuses."""

    version: int
    directory: str
    path: str
    """As ``/proc/PID/cgroup`` shows it."""

    def add(self, pid: int) -> None:
        """Moves a process here, all its living threads, and what it will fork."""
        _write(f"{self.directory}/cgroup.procs", b"%d" % pid)

    def holds(self, thread: int) -> bool:
        """Whether a thread is here or in a group below; one that is gone is nowhere."""
        path = _paths(thread).get(self.version, "")
        return path == self.path or path.startswith(self.path + "/")

    def freeze(self) -> None:
        """Has all members stand still, from now on as soon as each leaves the kernel."""
        kind = _KINDS[self.version]
        _write(f"{self.directory}/{kind.file}", kind.frozen)

    def thaw(self) -> None:
        """Has all members go on."""
        kind = _KINDS[self.version]
        _write(f"{self.directory}/{kind.file}", kind.thawed)

    def stands_still(self) -> bool:
        """Whether all members do; those that a system call keeps in the kernel do not yet."""
        kind = _KINDS[self.version]
        with open(f"{self.directory}/{kind.proof_file}", "rb") as file:
            return kind.proof in file.read()

    def remove(self) -> None:
        """Removes it, and the groups that were made below it, if nothing lives in them."""
        _remove_tree(self.directory)


def make_group(lease_id: int, versions: Iterable[int] = tuple(_KINDS)) -> Group | None:
    """Makes a group for the tree of this process's lease, not frozen; returns None where none may be made."""
    for version, directory, path in places(versions):
        name = f"{_PREFIX}{lease_id}-{os.getpid()}"
        group = Group(version, f"{directory}/{name}", f"{path.rstrip('/')}/{name}")
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(group.directory, 0o755)
            group.thaw()
        except OSError:
            # Read-only, not delegated, or a kernel without: the next one, or none.
            with contextlib.suppress(OSError):
                group.remove()
            continue
        return group
    return None


def groups_of(threads: Iterable[int]) -> list[Group]:
    """Returns the groups made by :func:`make_group`, of whatever process, that hold one of these threads.

    They are known by their name: whoever made them may have been elsewhere, as an
    agent is that was restarted as another service.
    """
    found: dict[tuple[int, str], Group] = {}
    mounts: dict[int, list[tuple[str, str]]] | None = None
    for thread in threads:
        for version, path in _paths(thread).items():
            if (match := _INSIDE.fullmatch(path)) is None:
                continue
            path = f"{match['parent']}/{match['name']}"
            mounts = _mounts() if mounts is None else mounts
            if (directory := _directory(mounts, version, path)) is not None:
                found[version, path] = Group(version, directory, path)
    return list(found.values())


def thaw_all(groups: Iterable[Group]) -> None:
    """Thaws groups whose members were all killed, so that they die."""
    for group in groups:
        # One that is gone has no members.
        with contextlib.suppress(OSError):
            group.thaw()


def remove_abandoned() -> None:
    """Removes what keepers left here that were killed; a group in which something lives stays."""
    for _, directory, _ in places(_KINDS):
        for name in _names(directory):
            if (match := _NAME.fullmatch(name)) and not os.path.exists(f"/proc/{match['keeper']}"):
                with contextlib.suppress(OSError):
                    _remove_tree(f"{directory}/{name}")


def _remove_tree(directory: str) -> None:
    for path, _, _ in os.walk(directory, topdown=False):
        os.rmdir(path)


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def places(versions: Iterable[int]) -> Iterator[tuple[int, str, str]]:
    """Yields (version, directory, path) of this process's own groups that can freeze."""
    own = _paths(os.getpid())
    mounts = _mounts()
    for version in versions:
        if (path := own.get(version)) is not None and (directory := _directory(mounts, version, path)) is not None:
            yield version, directory, path


def _directory(mounts: dict[int, list[tuple[str, str]]], version: int, path: str) -> str | None:
    """Returns where a group is found in the file system; None: it is not mounted."""
    for root, mount_point in mounts.get(version, ()):
        if path == root or path.startswith(root.rstrip("/") + "/"):
            return (mount_point + path[len(root.rstrip("/")) :]).rstrip("/")
    return None


def _mounts() -> dict[int, list[tuple[str, str]]]:
    """Returns version → (root, mount point) of each mounted hierarchy that can freeze."""
    found: dict[int, list[tuple[str, str]]] = {}
    for line in _lines("/proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        kind, _, options = after.partition(" ")
        version = 2 if kind == "cgroup2" else 1
        if kind == "cgroup2" or (kind == "cgroup" and "freezer" in options.rpartition(" ")[2].split(",")):
            fields = before.split(" ")
            found.setdefault(version, []).append((_unescaped(fields[3]), _unescaped(fields[4])))
    return found


def _lines(path: str) -> list[str]:
    """Returns the lines of a file of the kernel; none of one that is not there."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines()
    except OSError:
        return []


def _unescaped(path: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), path)


def _paths(thread: int) -> dict[int, str]:
    """Returns version → path of the group that a thread is in; nothing of one that is gone."""
    found: dict[int, str] = {}
    for line in _lines(f"/proc/{thread}/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            found[2] = path
        elif "freezer" in controllers.split(","):
            found[1] = path
    return found


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)

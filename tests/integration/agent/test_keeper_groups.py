"""Control groups: where a keeper may make them, and what is left of them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from lessor_agent.keeper import groups
from lessor_agent.keeper.groups import Group, groups_of, make_group, places, remove_abandoned, thaw_all
from lessor_agent.keeper.tree import read_process
from tests.support.processes import wait_gone

_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu
37 31 0:34 /jobs /mnt/a\\040b rw,relatime - cgroup cgroup rw,freezer
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
"""


@pytest.fixture(params=[2, 1])
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    """A group of each version that this host has."""
    made = make_group(7, (request.param,))
    if made is None:
        pytest.skip(f"no control group of version {request.param} can be made here")
    yield made
    thaw_all([made])
    if os.path.isdir(made.directory):
        made.remove()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()
        thaw_all(groups_of([process.pid]))


def test_a_member_stands_still_and_dies_once_it_is_thawed(group: Group, sleeper: subprocess.Popen[bytes]) -> None:
    assert not group.holds(sleeper.pid)
    group.add(sleeper.pid)
    assert group.holds(sleeper.pid)
    group.freeze()
    while not group.stands_still():
        pass
    assert groups_of([sleeper.pid, os.getpid()]) == [group]
    sleeper.kill()
    if group.version == 1:
        # It is not dead before it is thawed, and until then is found: whoever kills may look afterwards, too.
        assert groups_of([sleeper.pid]) == [group]
        thaw_all([group])
    wait_gone(sleeper.pid)


def test_one_made_twice_is_one_and_not_frozen(group: Group) -> None:
    group.freeze()
    assert make_group(7, (group.version,)) == group
    group.thaw()


def test_a_member_below_a_group_is_found_and_held(group: Group, sleeper: subprocess.Popen[bytes]) -> None:
    below = Group(group.version, f"{group.directory}/own", f"{group.path}/own")
    os.mkdir(below.directory)
    try:
        below.add(sleeper.pid)
        assert group.holds(sleeper.pid)
        assert groups_of([sleeper.pid]) == [group]
    finally:
        sleeper.kill()
        sleeper.wait()
        below.remove()


def test_what_a_killed_keeper_left_is_removed_and_a_living_ones_is_not(group: Group) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    parent = os.path.dirname(group.directory)
    left = f"{parent}/lessor-8-{gone.pid}"
    foreign = f"{parent}/lessor-of-others"
    os.makedirs(f"{left}/own/inner")
    os.mkdir(foreign)
    try:
        remove_abandoned()
        assert [os.path.isdir(path) for path in (left, foreign, group.directory)] == [False, True, True]
    finally:
        os.rmdir(foreign)


@pytest.mark.parametrize("version", [2, 1])
def test_a_group_that_was_made_elsewhere_is_found(version: int, sleeper: subprocess.Popen[bytes]) -> None:
    place = next(iter(places((version,))), None)
    if place is None or make_group(7, (version,)) is None:
        pytest.skip(f"no control group of version {version} can be made here")
    _, directory, path = place
    os.rmdir(f"{directory}/lessor-7-{os.getpid()}")
    elsewhere = f"/other-{os.getpid()}"
    name = f"{elsewhere}/lessor-8-{os.getpid()}"
    group = Group(version, directory + name, path.rstrip("/") + name)
    os.makedirs(group.directory)
    try:
        group.add(sleeper.pid)
        assert groups_of([sleeper.pid]) == [group]
        sleeper.kill()
        sleeper.wait()
    finally:
        group.remove()
        os.rmdir(directory + elsewhere)


def test_what_a_member_has_made_below_goes_with_its_group_unless_something_lives_there(
    group: Group, sleeper: subprocess.Popen[bytes]
) -> None:
    os.makedirs(f"{group.directory}/own/inner")
    os.makedirs(f"{group.directory}/held")
    below = Group(group.version, f"{group.directory}/held", f"{group.path}/held")
    below.add(sleeper.pid)
    with pytest.raises(OSError, match="busy"):
        group.remove()
    assert below.holds(sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    group.remove()
    assert not os.path.exists(group.directory)


def test_a_process_that_is_gone_is_in_no_group(group: Group) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert read_process(process.pid) is None
    assert not group.holds(process.pid)
    assert groups_of([process.pid]) == []
    with pytest.raises(ProcessLookupError):
        group.add(process.pid)


def test_places_are_read_from_what_is_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounts").write_text(_MOUNTS)
    (tmp_path / "cgroup").write_text("9:cpu,cpuacct:/\n6:freezer:/jobs/one\n0::/agent.slice/agent.service\n")
    opened = {"/proc/self/mountinfo": tmp_path / "mounts", f"/proc/{os.getpid()}/cgroup": tmp_path / "cgroup"}

    def open_other(path: str, **options: str) -> TextIO:
        return open(opened[path], encoding=options["encoding"], errors=options["errors"])

    monkeypatch.setattr(groups, "open", open_other, raising=False)
    assert list(places((2, 1))) == [
        (2, "/sys/fs/cgroup/unified/agent.slice/agent.service", "/agent.slice/agent.service"),
        (1, "/mnt/a b/one", "/jobs/one"),
    ]
    (tmp_path / "cgroup").write_text("6:freezer:/elsewhere\n")
    assert list(places((2, 1))) == []
    assert make_group(1) is None

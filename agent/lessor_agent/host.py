"""What this host is and how much of it the agent may use.

CPUs and memory are what this process may use, not what the machine has: its CPU
affinity and the limits of its control groups (v1, v2, or both at once) count.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger(__name__)

_HARDWARE_ID_MAX_BYTES = 256
_PERIOD_US = 100_000
"""The kernel's default period of a CPU quota."""
_DMI = "sys/class/dmi/id"
_HARDWARE_IDS = (
    # (kind, file), the surest first. Only root may read the first two: an agent that becomes root, or stops
    # being it, looks like other hardware.
    ("dmi-uuid", f"{_DMI}/product_uuid"),
    ("dmi-serial", f"{_DMI}/product_serial"),
    ("instance-id", f"{_DMI}/board_asset_tag"),
    ("xen-uuid", "sys/hypervisor/uuid"),
    ("board-serial", "proc/device-tree/serial-number"),
    ("machine-id", "etc/machine-id"),
)
_INSTANCE_ID = re.compile(r"i-[0-9a-f]{8,17}")
"""An asset tag is whatever its owner wrote on it, often the same on a whole rack; only a cloud's is unique."""
_PLACEHOLDERS = frozenset(
    {
        "none",
        "n/a",
        "not specified",
        "not applicable",
        "not available",
        "not settable",
        "unknown",
        "default",
        "default string",
        "no asset tag",
        "asset tag",
        "system serial number",
        "base board asset tag",
        "to be filled by o.e.m.",
        "o.e.m.",
        "oem",
        "invalid",
        "empty",
        "uninitialized",
        "0123456789",
        "123456789",
        "1234567890",
        # A UUID that one maker burned into many boards.
        "03000200-0400-0500-0006-000700080009",
    }
)


@dataclass(frozen=True, slots=True)
class HostFacts:
    """A host, as the agent introduces it."""

    boot_id: str
    """The kernel's; another after each boot. Empty: unreadable, so a reboot cannot be told."""
    hardware_id: str
    """``kind:value``, such as ``dmi-uuid:4c4c…``; empty: nothing identifies it.

    A ``machine-id`` lies on the disk, and copies of a disk image may share it; the other kinds belong to one machine.
    """
    hostname: str
    cpu_millis: int
    """CPUs this process may use, in thousandths."""
    memory_bytes: int
    """Memory this process may use; 0: unknown."""


def read_host(root: Path = Path("/"), affinity: Callable[[], int] | None = None) -> HostFacts:
    """Returns the facts of this host. Never raises: what cannot be read is empty, and logged.

    Args:
        root: Where the host's ``proc``, ``sys`` and ``etc`` are.
        affinity: Returns how many CPUs this process may run on; None: asks the kernel.
    """
    boot_id = _read(root / "proc/sys/kernel/random/boot_id")
    hardware_id = read_hardware_id(root)
    if not boot_id or not hardware_id:
        _log.warning(
            "the host cannot be identified fully; after a reboot its jobs are reassigned only when their leases expire",
            extra={"event": "host_unidentified", "boot_id": boot_id, "hardware_id": hardware_id},
        )
    return HostFacts(
        boot_id=boot_id,
        hardware_id=hardware_id,
        hostname=_read(root / "proc/sys/kernel/hostname") or socket.gethostname(),
        cpu_millis=read_cpu_millis(root, affinity or _own_affinity),
        memory_bytes=read_memory_bytes(root),
    )


def read_hardware_id(root: Path = Path("/")) -> str:
    """Returns what tells this machine from others, "kind:value", or "" when nothing does."""
    for kind, place in _HARDWARE_IDS:
        value = "".join(each for each in _read(root / place) if " " <= each <= "~").strip()
        plain = value.lower()
        # Some firmware says only zeroes, or only Fs, or a polite phrase.
        if plain in _PLACEHOLDERS or len(set(plain) - set("-. ")) < 2:
            continue
        if kind == "instance-id" and not _INSTANCE_ID.fullmatch(plain):
            continue
        return f"{kind}:{plain}"[:_HARDWARE_ID_MAX_BYTES]
    return ""


def read_cpu_millis(root: Path, affinity: Callable[[], int]) -> int:
    """Returns the CPUs this process may use, in thousandths: affinity, cut by every control group above it."""
    allowed = affinity() * 1000
    for group in _groups(root, "cpu"):
        # Version 2 writes "quota period" into one file, version 1 into two. "max" or -1 is no limit.
        quota, _, period = _read(group / "cpu.max").partition(" ")
        quota_us = _number(quota or _read(group / "cpu.cfs_quota_us"), -1)
        period_us = _number(period or _read(group / "cpu.cfs_period_us"), _PERIOD_US)
        if quota_us > 0 and period_us > 0:
            allowed = min(allowed, quota_us * 1000 // period_us)
    return max(1, allowed)


def read_memory_bytes(root: Path) -> int:
    """Returns the memory this process may use: the host's, cut by every control group above it; 0: unknown."""
    match = re.search(r"^MemTotal:\s+(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE)
    limits = [int(match[1]) * 1024] if match else []
    for group in _groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _number(_read(group / name), -1)
            if limit > 0:
                limits.append(limit)
    # Version 1 says "no limit" by a number larger than any machine, which the host's own total undercuts.
    smallest = min(limits, default=0)
    return smallest if smallest < 1 << 60 else 0


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yields the directories of the control groups that bind this process, the innermost first, of both versions."""
    memberships = _memberships(root)
    for point, top, kind, controllers in _mounts(root):
        own = memberships.get("" if kind == "cgroup2" else controller)
        if own is None or (kind == "cgroup" and controller not in controllers):
            continue
        # In a container the mount may begin in the middle of the tree, and our path may lie outside of it
        # ("/../other"): then what is mounted is all there is to see.
        steps = [step for step in own.removeprefix(top.rstrip("/")).split("/") if step]
        if ".." in steps or not f"{own}/".startswith(top.rstrip("/") + "/"):
            steps = []
        home = root / point.lstrip("/")
        for depth in range(len(steps), -1, -1):
            yield home.joinpath(*steps[:depth])


def _memberships(root: Path) -> dict[str, str]:
    """Returns controller → our path in its hierarchy; "" is version 2."""
    found = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            for controller in parts[1].split(","):
                found[controller] = parts[2]
    return found


def _mounts(root: Path) -> Iterator[tuple[str, str, str, set[str]]]:
    """Yields (mount point, the path in the hierarchy that is mounted there, kind, controllers) of each hierarchy."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if len(left) >= 5 and len(right) >= 3 and right[0] in ("cgroup", "cgroup2"):
            yield _unescape(left[4]), _unescape(left[3]), right[0], set(right[2].split(","))


def _unescape(text: str) -> str:
    r"""The kernel writes a blank in a path as \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _own_affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _number(text: str, otherwise: int) -> int:
    try:
        return int(text)
    except ValueError:
        return otherwise


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip("\0 \n\t")
    except OSError:
        return ""

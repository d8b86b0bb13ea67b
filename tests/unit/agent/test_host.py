"""Host facts, read from made-up hosts."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from lessor_agent.host import read_cpu_millis, read_hardware_id, read_host, read_memory_bytes

GIB = 2**30
UUID = "4c4c4544-0035-3510-8052-b4c04f4d3132"
V2_MOUNT = "24 1 0:22 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate"
V1_CPU_MOUNT = "31 30 0:26 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY_MOUNT = "32 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


def host(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def sixteen() -> int:
    return 16


def test_a_whole_host(tmp_path: Path) -> None:
    root = host(
        tmp_path,
        {
            "proc/sys/kernel/random/boot_id": "705ed552-faf7-461c-bcc0-94ef629ebc0b\n",
            "proc/sys/kernel/hostname": "gpu-7\n",
            "proc/meminfo": "MemTotal:       131072 kB\nMemFree:  5 kB\n",
            "sys/class/dmi/id/product_uuid": UUID.upper() + "\n",
            "etc/machine-id": "3d1219c7c4c5404aaa1f6d2a48adfda4\n",
        },
    )
    facts = read_host(root, sixteen)
    assert facts.boot_id == "705ed552-faf7-461c-bcc0-94ef629ebc0b"
    assert facts.hostname == "gpu-7"
    assert facts.hardware_id == f"dmi-uuid:{UUID}"
    assert facts.cpu_millis == 16_000
    assert facts.memory_bytes == 131072 * 1024


def test_a_host_that_shows_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        facts = read_host(tmp_path, sixteen)
    assert facts.boot_id == ""
    assert facts.hardware_id == ""
    assert facts.hostname
    assert facts.cpu_millis == 16_000
    assert facts.memory_bytes == 0
    assert [record.__dict__["event"] for record in caplog.records] == ["host_unidentified"]


def test_this_host() -> None:
    facts = read_host()
    assert facts.cpu_millis > 0
    assert facts.memory_bytes > 0
    assert facts.hostname == os.uname().nodename
    assert len(facts.hardware_id.encode()) <= 256
    assert len(facts.boot_id.encode()) <= 64


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"product_uuid": "00000000-0000-0000-0000-000000000000", "product_serial": "SN-77"}, "dmi-serial:sn-77"),
        ({"product_uuid": "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF", "product_serial": "SN-77"}, "dmi-serial:sn-77"),
        ({"product_uuid": "03000200-0400-0500-0006-000700080009"}, "machine-id:abc"),
        ({"product_serial": "To Be Filled By O.E.M."}, "machine-id:abc"),
        ({"product_serial": " Default string "}, "machine-id:abc"),
        ({"product_serial": "0123456789"}, "machine-id:abc"),
        ({"product_serial": "GoogleCloud-1F2E"}, "dmi-serial:googlecloud-1f2e"),
        ({"board_asset_tag": "i-0abc123def4567890"}, "instance-id:i-0abc123def4567890"),
        ({"board_asset_tag": "RACK 7"}, "machine-id:abc"),
        ({"product_uuid": "\0\0" + UUID + "\0\xff"}, f"dmi-uuid:{UUID}"),
        ({"product_serial": "xy" * 500}, "dmi-serial:" + ("xy" * 500)[: 256 - len("dmi-serial:")]),
    ],
)
def test_hardware_ids_skip_what_firmware_makes_up(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    dmi = {f"sys/class/dmi/id/{name}": text for name, text in files.items()}
    assert read_hardware_id(host(tmp_path, dmi | {"etc/machine-id": "abc\n"})) == expected


def test_an_unreadable_id_is_passed_over(tmp_path: Path) -> None:
    root = host(tmp_path, {"etc/machine-id": "abc"})
    # A directory in its place reads with an error for root too, as a file without rights does for others.
    (root / "sys/class/dmi/id/product_uuid").mkdir(parents=True)
    assert read_hardware_id(root) == "machine-id:abc"


def test_version_2_limits_of_every_level_count(tmp_path: Path) -> None:
    root = host(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 67108864 kB\n",
            "proc/self/cgroup": "0::/system.slice/agent.service\n",
            "proc/self/mountinfo": V2_MOUNT + "\n",
            "sys/fs/cgroup/system.slice/cpu.max": "250000 100000\n",
            "sys/fs/cgroup/system.slice/agent.service/cpu.max": "max 100000\n",
            "sys/fs/cgroup/system.slice/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/agent.service/memory.max": f"{8 * GIB}\n",
        },
    )
    assert read_cpu_millis(root, sixteen) == 2500
    assert read_memory_bytes(root) == 8 * GIB


def test_affinity_counts_when_it_is_the_smaller(tmp_path: Path) -> None:
    root = host(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT + "\n",
            "sys/fs/cgroup/cpu.max": "800000 100000\n",
        },
    )
    assert read_cpu_millis(root, lambda: 3) == 3000
    assert read_cpu_millis(root, sixteen) == 8000


def test_version_1_limits(tmp_path: Path) -> None:
    root = host(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 67108864 kB\n",
            "proc/self/cgroup": "4:cpu,cpuacct:/jobs\n3:memory:/jobs\n1:name=systemd:/init.scope\n",
            "proc/self/mountinfo": f"{V1_CPU_MOUNT}\n{V1_MEMORY_MOUNT}\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_period_us": "200000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/jobs/memory.limit_in_bytes": f"{2 * GIB}\n",
        },
    )
    assert read_cpu_millis(root, sixteen) == 250
    assert read_memory_bytes(root) == 2 * GIB


def test_version_1_without_a_limit(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "3:memory:/\n",
        "proc/self/mountinfo": V1_MEMORY_MOUNT,
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    assert read_memory_bytes(host(tmp_path, files)) == 0
    assert read_memory_bytes(host(tmp_path, {"proc/meminfo": "MemTotal: 1048576 kB\n"})) == GIB


def test_both_versions_at_once(tmp_path: Path) -> None:
    root = host(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 67108864 kB\n",
            "proc/self/cgroup": "4:memory:/a\n1:cpu:/\n0::/\n",
            "proc/self/mountinfo": (
                f"{V1_MEMORY_MOUNT}\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
                "33 30 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
            ),
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert read_memory_bytes(root) == GIB
    assert read_cpu_millis(root, sixteen) == 4000


@pytest.mark.parametrize(
    ("own", "top"),
    [
        ("/docker/7f", "/docker/7f"),  # The mount begins at our own group.
        ("/docker/7f", "/docker/99"),  # Our path lies outside of what is mounted.
        ("/../../other", "/"),  # Our group lies outside of our namespace.
        ("/docker/7fa", "/docker/7f"),  # Alike, but not below it.
    ],
)
def test_in_a_container_the_mount_is_all_there_is(tmp_path: Path, own: str, top: str) -> None:
    root = host(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 67108864 kB\n",
            "proc/self/cgroup": f"0::{own}\n",
            "proc/self/mountinfo": f"24 1 0:22 {top} /sys/fs/my\\040cgroup ro shared:9 - cgroup2 cgroup rw\n",
            "sys/fs/my cgroup/cpu.max": "150000 100000\n",
            "sys/fs/my cgroup/memory.max": f"{GIB}\n",
            "sys/fs/my cgroup/other/memory.max": "1\n",
            "sys/fs/my cgroup/a/memory.max": "1\n",
        },
    )
    assert read_cpu_millis(root, sixteen) == 1500
    assert read_memory_bytes(root) == GIB


def test_nonsense_is_no_limit(tmp_path: Path) -> None:
    root = host(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 1048576 kB\n",
            "proc/self/cgroup": "nonsense\n0::/\n\n",
            "proc/self/mountinfo": f"nonsense\n{V2_MOUNT}\n1 2 - cgroup2\n",
            "sys/fs/cgroup/cpu.max": "many\n",
            "sys/fs/cgroup/memory.max": "0\n",
        },
    )
    assert read_cpu_millis(root, sixteen) == 16_000
    assert read_memory_bytes(root) == GIB

"""The GPU inventory with the real pynvml, over a stand-in for NVIDIA's library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.nvml import CompilerMissing, NvmlStub, c_compiler

pytest.importorskip("pynvml", reason="needs nvidia-ml-py, of the extra lessor[agent]")

INVENTORY = """
import dataclasses, json, logging, sys
from lessor_agent.gpus import NvmlGpus
logging.basicConfig(format="%(message)s", stream=sys.stderr)
gpus = NvmlGpus()
for line in sys.stdin:
    found = getattr(gpus, line.strip())()
    print(json.dumps([dataclasses.asdict(each) for each in found or []]), flush=True)
"""

Ask = Callable[[str], list[dict[str, Any]]]


class Inventory:
    """A process with an inventory: the library's path must be set before it starts."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as log_file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", INVENTORY],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                text=True,
                env={**os.environ, **environment},
            )

    def ask(self, method: str) -> list[dict[str, Any]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{method}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.log.read_text()
        found: list[dict[str, Any]] = json.loads(answer)
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture
def inventory(nvml_stub: NvmlStub, tmp_path: Path) -> Iterator[Inventory]:
    made = Inventory(nvml_stub.environment, tmp_path / "log")
    yield made
    made.close()


def test_eight_gpus(inventory: Inventory) -> None:
    found = inventory.ask("discover")
    assert [gpu["index"] for gpu in found] == list(range(8))
    assert len({gpu["uuid"] for gpu in found}) == 8
    assert {gpu["model"] for gpu in found} == {"NVIDIA H100 80GB HBM3"}
    assert {gpu["memory_bytes"] for gpu in found} == {85520809984}
    assert inventory.log.read_text() == ""


def test_readings_follow_the_gpus(inventory: Inventory, nvml_stub: NvmlStub) -> None:
    found = inventory.ask("discover")
    nvml_stub.say({"2.utilization": 97, "2.memory_used": 12345678901})
    readings = inventory.ask("read")
    assert [reading["uuid"] for reading in readings] == [gpu["uuid"] for gpu in found]
    assert readings[2] == {
        "uuid": found[2]["uuid"],
        "utilization_percent": 97,
        "memory_used_bytes": 12345678901,
    }
    assert readings[3]["utilization_percent"] == 0


def test_a_lost_gpu_does_not_hide_the_others(inventory: Inventory, nvml_stub: NvmlStub) -> None:
    found = inventory.ask("discover")
    nvml_stub.say({"5.error": 15})
    for _ in range(2):
        assert [reading["uuid"] for reading in inventory.ask("read")] == [
            gpu["uuid"] for gpu in found if gpu["index"] != 5
        ]
    assert [gpu["index"] for gpu in inventory.ask("discover")] == [0, 1, 2, 3, 4, 6, 7]
    assert inventory.log.read_text().splitlines() == [
        f"GPU 5 ({found[5]['uuid']}) does not answer: GPU is lost",
        "GPU 5 is left out: GPU is lost",
    ]
    nvml_stub.say({})
    assert inventory.ask("discover") == found
    assert len(inventory.ask("read")) == 8


def test_what_a_gpu_does_not_support_is_zero(inventory: Inventory, nvml_stub: NvmlStub) -> None:
    nvml_stub.say({"count": 2, "0.utilization_error": 3, "1.memory_error": 3, "1.name_error": 3, "1.utilization": 5})
    found = inventory.ask("discover")
    assert [(gpu["model"], gpu["memory_bytes"]) for gpu in found] == [("NVIDIA H100 80GB HBM3", 85520809984), ("", 0)]
    readings = inventory.ask("read")
    assert [reading["utilization_percent"] for reading in readings] == [0, 5]


def test_a_driver_that_is_not_loaded_is_tried_again(inventory: Inventory, nvml_stub: NvmlStub) -> None:
    nvml_stub.say({"init": 9})
    assert inventory.ask("discover") == []
    assert inventory.ask("discover") == []
    assert inventory.log.read_text() == "no GPUs: the NVIDIA driver cannot be used: Driver Not Loaded\n"
    nvml_stub.say({})
    assert len(inventory.ask("discover")) == 8


def test_a_driver_that_stops_answering(inventory: Inventory, nvml_stub: NvmlStub) -> None:
    assert len(inventory.ask("discover")) == 8
    nvml_stub.say({"count_error": 999})
    assert inventory.ask("discover") == []
    assert inventory.ask("read") == []
    assert "no GPUs: the NVIDIA driver does not answer: Unknown Error" in inventory.log.read_text()
    nvml_stub.say({})
    assert len(inventory.ask("discover")) == 8


def test_after_close_discover_opens_it_again(inventory: Inventory) -> None:
    inventory.ask("discover")
    inventory.ask("close")
    assert inventory.ask("read") == []
    assert len(inventory.ask("discover")) == 8


def test_no_library_is_an_ordinary_host(tmp_path: Path) -> None:
    if any(Path(place, "libnvidia-ml.so.1").exists() for place in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64")):
        pytest.skip("this host has NVIDIA's library")
    inventory = Inventory({"LD_LIBRARY_PATH": ""}, tmp_path / "log")
    try:
        assert inventory.ask("discover") == []
        assert inventory.ask("read") == []
    finally:
        inventory.close()
    assert inventory.log.read_text() == "no GPUs: the NVIDIA driver cannot be used: NVML Shared Library Not Found\n"


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(CompilerMissing, match="needs a C compiler: cc, gcc or clang, or pip install ziglang"):
        c_compiler()

"""GPU inventories: the fake one, and the real one before drivers of every bad kind."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from lessor_agent.gpus import FakeGpus, Gpu, GpuInventory, GpuReading, NvmlGpus


class NvmlError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"code {value}")
        self.value = value


class Driver:
    """Stands in for the module pynvml. Each answer is a value, or an exception to raise."""

    NVMLError = NvmlError
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_FUNCTION_NOT_FOUND = 13
    NVML_ERROR_NO_PERMISSION = 4

    def __init__(self, **answers: Any) -> None:
        self.answers: dict[str, Any] = {
            "init": None,
            "shutdown": None,
            "count": 1,
            "uuid": "GPU-1",
            "name": "H100",
            "memory": SimpleNamespace(total=100, used=7),
            "rates": SimpleNamespace(gpu=42),
            **answers,
        }
        self.calls: list[str] = []

    def answer(self, name: str) -> Any:
        self.calls.append(name)
        value = self.answers[name]
        if isinstance(value, Exception):
            raise value
        return value

    def nvmlInit(self) -> None:
        self.answer("init")

    def nvmlShutdown(self) -> None:
        self.answer("shutdown")

    def nvmlDeviceGetCount(self) -> Any:
        return self.answer("count")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> Any:
        return self.answer("uuid")

    def nvmlDeviceGetName(self, handle: int) -> Any:
        return self.answer("name")

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return self.answer("memory")

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return self.answer("rates")


def gpus_of(driver: Driver) -> NvmlGpus:
    return NvmlGpus(lambda: driver)


def test_both_are_inventories() -> None:
    inventories: list[GpuInventory] = [NvmlGpus(), FakeGpus(1, agent_id="a")]
    assert len(inventories) == 2


def test_without_the_module_there_are_no_gpus_and_one_line_says_why(caplog: pytest.LogCaptureFixture) -> None:
    def load() -> None:
        raise ImportError("No module named 'pynvml'")

    gpus = NvmlGpus(load)
    with caplog.at_level(logging.WARNING):
        assert gpus.discover() == []
        assert gpus.discover() == []
        assert gpus.read() == []
        gpus.close()
    assert [record.getMessage() for record in caplog.records] == [
        "no GPUs: nvidia-ml-py is not installed (No module named 'pynvml'): pip install 'lessor[agent]'"
    ]


def test_a_driver_that_comes_later_is_found(caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver(init=NvmlError(9))
    gpus = gpus_of(driver)
    with caplog.at_level(logging.WARNING):
        assert gpus.discover() == []
        assert gpus.discover() == []
    assert [record.getMessage() for record in caplog.records] == ["no GPUs: the NVIDIA driver cannot be used: code 9"]
    driver.answers["init"] = None
    assert gpus.discover() == [Gpu("GPU-1", 0, "H100", 100)]
    assert gpus.read() == [GpuReading("GPU-1", 42, 7)]


def test_a_driver_that_goes_is_let_go_and_opened_again() -> None:
    driver = Driver()
    gpus = gpus_of(driver)
    assert len(gpus.discover()) == 1
    driver.answers["count"] = NvmlError(1)
    assert gpus.discover() == []
    assert gpus.read() == []
    assert driver.calls.count("shutdown") == 1
    driver.answers["count"] = 1
    assert len(gpus.discover()) == 1
    assert driver.calls.count("init") == 2


def test_close_is_quiet_and_final_until_the_next_discover() -> None:
    driver = Driver(shutdown=NvmlError(1))
    gpus = gpus_of(driver)
    gpus.discover()
    gpus.close()
    gpus.close()
    assert gpus.read() == []
    assert driver.calls.count("shutdown") == 1
    assert len(gpus.discover()) == 1


def test_old_versions_that_return_bytes() -> None:
    assert gpus_of(Driver(uuid=b"GPU-1", name=b"Tesla \xff")).discover() == [Gpu("GPU-1", 0, "Tesla \ufffd", 100)]


def test_a_name_that_is_no_text_leaves_the_gpu_out() -> None:
    broken = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    assert gpus_of(Driver(uuid=broken)).discover() == []


@pytest.mark.parametrize("value", [3, 4, 13])
def test_what_a_gpu_does_not_tell_is_zero(value: int) -> None:
    gpus = gpus_of(Driver(name=NvmlError(value), memory=NvmlError(value), rates=NvmlError(value)))
    assert gpus.discover() == [Gpu("GPU-1", 0, "", 0)]
    assert gpus.read() == [GpuReading("GPU-1", 0, 0)]


def test_utilization_stays_in_range() -> None:
    gpus = gpus_of(Driver(rates=SimpleNamespace(gpu=4_294_967_295)))
    gpus.discover()
    assert gpus.read()[0].utilization_percent == 100


def test_fake_gpus_are_stable_and_belong_to_one_agent() -> None:
    one = FakeGpus(8, agent_id="agent-1").discover()
    again = FakeGpus(8, agent_id="agent-1").discover()
    other = FakeGpus(8, agent_id="agent-2").discover()
    assert one == again
    assert [gpu.index for gpu in one] == list(range(8))
    assert len({gpu.uuid for gpu in one + other}) == 16
    assert {gpu.model for gpu in one} == {"Fake GPU"}
    assert all(gpu.uuid.startswith("GPU-") and len(gpu.uuid) == 40 for gpu in one)
    # Fewer of them are the first of them: a restart with another number moves no job to another GPU.
    assert FakeGpus(3, agent_id="agent-1").discover() == one[:3]


def test_fake_gpus_are_idle() -> None:
    gpus = FakeGpus(2, agent_id="agent-1", model="A100", memory_bytes=40)
    assert gpus.read() == []
    found = gpus.discover()
    assert found[0].model == "A100"
    assert found[0].memory_bytes == 40
    assert gpus.read() == [GpuReading(gpu.uuid, 0, 0) for gpu in found]
    gpus.close()
    assert gpus.read() == []


@pytest.mark.parametrize(("count", "memory_bytes"), [(-1, 1), (1025, 1), (1, 0)])
def test_fake_gpus_out_of_range_are_refused(count: int, memory_bytes: int) -> None:
    with pytest.raises(ValueError, match="fake GPUs"):
        FakeGpus(count, agent_id="agent-1", memory_bytes=memory_bytes)

"""The host's real GPUs, through NVML (``nvidia-ml-py``, module ``pynvml``).

A host without the library, the driver or any GPU is an ordinary host: the
inventory is empty, one log line says why, and CPU jobs run. A GPU that fails
does not hide the others.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lessor_agent.gpus.inventory import Gpu, GpuReading

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Device:
    """A GPU and the handle that NVML knows it by."""

    gpu: Gpu
    handle: Any


class NvmlGpus:
    """The GPUs that the NVIDIA driver of this host shows. A :class:`GpuInventory`.

    The library is loaded by the first :meth:`discover`, and tried again by each
    later one while it fails: a driver that is installed while the agent runs is found.
    """

    def __init__(self, load: Callable[[], Any] = lambda: importlib.import_module("pynvml")) -> None:
        """``load`` returns the module ``pynvml``, or raises ImportError."""
        self._load = load
        # NVML itself is safe to use from several threads; what we remember of it is not.
        self._lock = threading.Lock()
        self._nvml: Any = None
        self._devices: list[_Device] = []
        self._told: dict[str, str] = {}

    def discover(self) -> list[Gpu]:
        """Returns the GPUs that answer, by index; [] when there is no working driver."""
        with self._lock:
            if not self._open():
                return []
            try:
                count = self._nvml.nvmlDeviceGetCount()
            except self._nvml.NVMLError as error:
                self._tell("driver", f"no GPUs: the NVIDIA driver does not answer: {error}")
                self._shut()
                return []
            found = [self._describe(index) for index in range(count)]
            self._devices = [device for device in found if device is not None]
            return [device.gpu for device in self._devices]

    def read(self) -> list[GpuReading]:
        """Returns a reading of each GPU found that answers; a lost one is left out."""
        with self._lock:
            if self._nvml is None:
                return []
            readings = [self._read(device) for device in self._devices]
            return [reading for reading in readings if reading is not None]

    def close(self) -> None:
        """Lets go of the driver."""
        with self._lock:
            self._shut()

    def _open(self) -> bool:
        if self._nvml is not None:
            return True
        try:
            nvml = self._load()
        except ImportError as error:
            self._tell("driver", f"no GPUs: nvidia-ml-py is not installed ({error}): pip install 'lessor[agent]'")
            return False
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            self._tell("driver", f"no GPUs: the NVIDIA driver cannot be used: {error}")
            return False
        self._told.pop("driver", None)
        self._nvml = nvml
        return True

    def _shut(self) -> None:
        nvml, self._nvml, self._devices = self._nvml, None, []
        if nvml is None:
            return
        try:
            nvml.nvmlShutdown()
        except nvml.NVMLError as error:
            _log.debug("NVML did not shut down", extra={"event": "nvml_shutdown_failed", "error": str(error)})

    def _describe(self, index: int) -> _Device | None:
        """Asks what GPU ``index`` is; None: it does not say who it is, so it cannot be leased."""
        nvml = self._nvml
        subject = f"gpu {index}"
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = _text(nvml.nvmlDeviceGetUUID(handle))
            model = _text(self._ask(nvml.nvmlDeviceGetName, handle, ""))
            memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle, None)
        # pynvml decodes names itself; a name that is not UTF-8 is a ValueError.
        except (nvml.NVMLError, ValueError) as error:
            self._tell(subject, f"GPU {index} is left out: {error}")
            return None
        self._told.pop(subject, None)
        return _Device(Gpu(uuid, index, model, int(memory.total) if memory is not None else 0), handle)

    def _read(self, device: _Device) -> GpuReading | None:
        nvml = self._nvml
        gpu = device.gpu
        try:
            rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, device.handle, None)
            memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, device.handle, None)
        except nvml.NVMLError as error:
            self._tell(gpu.uuid, f"GPU {gpu.index} ({gpu.uuid}) does not answer: {error}")
            return None
        self._told.pop(gpu.uuid, None)
        busy = min(100, int(rates.gpu)) if rates is not None else 0
        return GpuReading(gpu.uuid, busy, int(memory.used) if memory is not None else 0)

    def _ask(self, question: Callable[[Any], Any], handle: Any, otherwise: Any) -> Any:
        """Asks what some GPUs do not know: partitioned ones no utilisation, integrated ones no memory."""
        nvml = self._nvml
        try:
            return question(handle)
        except nvml.NVMLError as error:
            unknown = (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND, nvml.NVML_ERROR_NO_PERMISSION)
            if getattr(error, "value", None) in unknown:
                return otherwise
            raise

    def _tell(self, subject: str, message: str) -> None:
        """Logs a trouble once, not at every reading, until it is another or over."""
        if self._told.get(subject) != message:
            self._told[subject] = message
            _log.warning("%s", message, extra={"event": "gpu_unavailable", "gpu": subject})


def _text(value: str | bytes) -> str:
    """Old versions of pynvml return bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value

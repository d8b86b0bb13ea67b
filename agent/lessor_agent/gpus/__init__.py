"""The GPUs of this host: what there is and what each does."""

from lessor_agent.gpus.fake import FakeGpus
from lessor_agent.gpus.inventory import Gpu, GpuInventory, GpuReading
from lessor_agent.gpus.nvml import NvmlGpus

__all__ = ["FakeGpus", "Gpu", "GpuInventory", "GpuReading", "NvmlGpus"]

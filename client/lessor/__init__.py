"""Lessor: leases GPUs to jobs."""

__version__ = "0.1.0"

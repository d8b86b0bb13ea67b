"""Runtimes: how a job is executed on or behind this host."""

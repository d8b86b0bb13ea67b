"""Reproducible benchmarks of Lessor, with its peers and its own store in the same run; see docs/benchmarks.md."""

"""Chaos: real processes under faults, and a checker of what they left behind. See docs/verification.md."""

"""Deterministic simulation: the production protocol core, services and SQL under seeded faults, in virtual time.

See docs/verification.md, "Simulation". ``python -m tests.simulation --help`` runs it by hand.
"""

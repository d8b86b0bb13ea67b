"""Agents' streams: sessions, renewals, grants and revokes, what agents report."""

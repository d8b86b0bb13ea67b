"""What a keeper is told when it is forked: everything about one attempt."""

from __future__ import annotations

import json
from typing import NamedTuple


class Identity(NamedTuple):
    """Whom the workload runs as. Numbers only: a keeper asks no directory service."""

    name: str
    uid: int
    gid: int
    groups: list[int]


class KeeperSpec(NamedTuple):
    """One attempt. Times are nanoseconds; paths are absolute."""

    lease_id: int
    boot_id: str
    state_dir: str
    directory: str
    argv: list[str]
    env: dict[str, str]
    """The whole environment of the workload."""
    working_dir: str | None
    """None: ``work`` in the lease's directory."""
    identity: Identity | None
    """None: as the keeper."""
    grace_ns: int
    run_timeout_ns: int | None
    open_files: int | None = None
    """Soft limit of open files for the workload; None: the keeper's."""
    on_lost: str = "stop"
    """What becomes of the tree at the deadline: one of the words of :mod:`.verdict`."""

    def to_text(self) -> str:
        """Returns the form that travels: JSON."""
        return json.dumps(self._asdict())

    @classmethod
    def from_text(cls, text: str | bytes | bytearray) -> KeeperSpec:
        """Reads that form."""
        spec = cls(**json.loads(text))
        return spec._replace(identity=None if spec.identity is None else Identity(*spec.identity))

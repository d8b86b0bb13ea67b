"""Other queues, measured on the same host in the same run; each is installed by the benchmark itself."""

from __future__ import annotations

from benchmarks.peers import graphile
from benchmarks.peers.celery import Celery
from benchmarks.peers.peer import Peer, PeerFigures
from benchmarks.peers.pgqueuer import PgQueuer
from benchmarks.peers.procrastinate import Procrastinate

__all__ = ["PEERS", "Peer", "PeerFigures"]

PEERS: tuple[Peer, ...] = (graphile.LOCAL, graphile.PLAIN, PgQueuer(), Procrastinate(), Celery())

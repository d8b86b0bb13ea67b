"""The Celery application that is measured: one no-op task that writes into a pipe when it began.

Loaded by Celery's worker, in its environment. Environment: ``PEER_BROKER``, the broker's URL; ``PEER_PIPE``, a named
pipe that somebody reads.
"""

from __future__ import annotations

import os
import struct
import time

from celery import Celery  # type: ignore[import-not-found,unused-ignore]

app = Celery("peer", broker=os.environ["PEER_BROKER"])
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    task_default_delivery_mode="transient",
    worker_prefetch_multiplier=128,
    worker_send_task_events=False,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
)

_pipe = os.open(os.environ["PEER_PIPE"], os.O_WRONLY)


def noop() -> None:
    """The job. A write of eight bytes into a pipe is atomic, whichever worker process does it."""
    os.write(_pipe, struct.pack("=q", time.monotonic_ns()))


task = app.task(name="noop")(noop)

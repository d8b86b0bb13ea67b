"""A job that writes down when it lived: ``python ticker.py DIRECTORY SECONDS``.

Each attempt writes a file of its own, named by its fencing token, with a line of
CLOCK_BOOTTIME nanoseconds when it starts, every 20 ms, and when it ends; the
instants of all attempts on one host can be compared.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def main(directory: str, seconds: str) -> None:
    now = lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME)  # noqa: E731
    end = now() + int(float(seconds) * 1e9)
    with (Path(directory) / os.environ["LESSOR_FENCING_TOKEN"]).open("a", buffering=1) as file:
        print("start", now(), file=file)
        print("ticking", flush=True)
        while now() < end:
            print("tick", now(), file=file)
            time.sleep(0.02)  # The job's own pace.
        print("end", now(), file=file)


main(*sys.argv[1:])

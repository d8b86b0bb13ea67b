"""``python -m benchmarks.peers``: installs the peers, so that no measurement waits for a registry."""

from __future__ import annotations

import argparse
import time

from benchmarks.peers import PEERS
from benchmarks.system import Unavailable


def main() -> None:
    """Installs every peer into the user's cache; one that cannot be is named with the reason."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="those of the quick run only")
    options = parser.parse_args()
    for peer in PEERS:
        if options.quick and peer.quick_jobs is None:
            continue
        began = time.monotonic()
        try:
            peer.install()
        except Unavailable as missing:
            print(f"{peer.name}: not installed: {missing}")
        else:
            print(f"{peer.name}: installed ({time.monotonic() - began:.1f} s)")


if __name__ == "__main__":
    main()

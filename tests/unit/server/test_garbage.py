"""The garbage collector as a server sets it."""

from __future__ import annotations

import subprocess
import sys

_SETTLED = """
import gc
from lessor_server import garbage

class Node:
    pass

kept = Node()
kept.me = kept
garbage.settle()
assert gc.get_freeze_count() > 1000, gc.get_freeze_count()
assert gc.get_threshold() == garbage.THRESHOLDS
assert not any(found is kept for found in gc.get_objects()), "what was there is looked at again"

for _ in range(3 * garbage.THRESHOLDS[0]):
    node = Node()
    node.me = node
del node
left = sum(type(found) is Node for found in gc.get_objects())
assert left <= garbage.THRESHOLDS[0] + 1, f"{left} young cycles were not found"
"""


def test_what_is_there_is_left_alone_and_young_cycles_are_found() -> None:
    done = subprocess.run([sys.executable, "-c", _SETTLED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

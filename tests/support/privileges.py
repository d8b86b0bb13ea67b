"""Root that is bound by the modes of files, as everybody else is: what must be refused can be tried as root, too."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2
_PR_CAPBSET_DROP = 24
_VERSION = 0x20080522
_WORDS = 6
"""Effective, permitted and inheritable, twice 32 bits each."""

_libc = ctypes.CDLL(None, use_errno=True)


def bound_by_modes(work: Callable[[], T]) -> T:
    """Runs something in a thread that may only do to files what their modes say, as may the threads that it starts."""

    def bound() -> T:
        if os.geteuid() == 0:
            _give_up_in_this_thread()
        return work()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(bound).result()


def bind_by_modes() -> None:
    """The same for a program that is about to be started: for ``preexec_fn``."""
    if os.geteuid() == 0:
        for capability in (_DAC_OVERRIDE, _DAC_READ_SEARCH):
            _call(_libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0))


def _give_up_in_this_thread() -> None:
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    sets = (ctypes.c_uint32 * _WORDS)()
    _call(_libc.capget(header, sets))
    # All of a capability's words below 32 are the first three.
    for index in range(3):
        sets[index] &= ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)
    _call(_libc.capset(header, sets))


def _call(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

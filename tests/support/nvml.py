"""A stand-in for NVIDIA's management library, so that the real pynvml code runs on a host without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

_SOURCE = Path(__file__).parent / "nvml_stub" / "nvml_stub.c"
_SONAME = "libnvidia-ml.so.1"


class CompilerMissing(Exception):
    """There is no C compiler on this host; the message names what was looked for."""


def c_compiler() -> list[str]:
    """Returns the command of a C compiler: the host's, or the one in the PyPI package ziglang.

    Raises:
        CompilerMissing: There is none.
    """
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return [found]
    if find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    raise CompilerMissing("the NVML stub needs a C compiler: cc, gcc or clang, or pip install ziglang")


class NvmlStub:
    """A built library with a state file that tests write."""

    def __init__(self, library_dir: Path, state_file: Path) -> None:
        self._library_dir = library_dir
        self._state_file = state_file
        self.say({})

    def say(self, state: Mapping[str, object]) -> None:
        """Sets what the GPUs say from now on, in all processes: key → value, see nvml_stub.c."""
        fresh = self._state_file.with_suffix(".new")
        fresh.write_text("".join(f"{key} {value}\n" for key, value in state.items()))
        fresh.replace(self._state_file)

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a process that shall see the GPUs. They must be set before it starts."""
        found_first = [str(self._library_dir), os.environ.get("LD_LIBRARY_PATH", "")]
        return {
            "LD_LIBRARY_PATH": os.pathsep.join(path for path in found_first if path),
            "NVML_STUB_STATE": str(self._state_file),
        }


def build_nvml_stub(library_dir: Path) -> None:
    """Compiles the stub into ``library_dir``.

    Raises:
        CompilerMissing: There is no C compiler.
    """
    subprocess.run(
        [
            *c_compiler(),
            "-shared",
            "-fPIC",
            "-O1",
            "-Wall",
            "-Wextra",
            f"-Wl,-soname,{_SONAME}",
            "-o",
            str(library_dir / _SONAME),
            str(_SOURCE),
        ],
        check=True,
        timeout=120,
    )

"""What an author says of a runtime: how it is made, how its jobs find things, how exact its clock is, what it lacks."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

from lessor_agent.runtimes.base import Handle, Runtime, RuntimeContext
from lessor_agent.testing.conformance.checks import Check


class Subject:
    """A runtime that is held to the suite. Override what is not true of yours.

    Raises:
        TypeError: When a subclass is defined whose ``unsupported`` names something
            that is no check, or gives no reason.
    """

    runtime_class: ClassVar[type[Runtime]]
    """Made for each check as an agent makes it: ``runtime_class(context)``; see :meth:`make`."""

    title: ClassVar[str] = ""
    """What reports call it; empty: the runtime's name. Two ways to set up one runtime need two titles."""

    unsupported: ClassVar[Mapping[Check, str]] = {}
    """Check → why this runtime does not keep it, in a few words for its users. It is skipped, and told in the table."""

    env_allow: ClassVar[Sequence[str]] = ("PATH", "LANG", "LC_*")
    """Variables of the host that jobs need, in addition to those of the checks."""

    gpu_uuids: ClassVar[Sequence[str]] = (
        "GPU-4f0c2b1e-7a55-4f6c-9d20-0a3a51f0e9b1",
        "GPU-0b7f9d3c-1c62-4be0-8a0e-5d1f7c6a2e44",
    )
    """Two GPUs. Where the runtime looks whether they exist: two that do."""

    other_user: ClassVar[str] = "nobody"
    """An account other than the agent's, where the runtime can set the user."""

    patience: ClassVar[timedelta] = timedelta(seconds=60)
    """How long whatever has to happen may take before the check fails."""

    observe: ClassVar[timedelta] = timedelta(milliseconds=300)
    """How long what must not happen is waited for. Workloads show every 5 ms that they run."""

    lease: ClassVar[timedelta] = timedelta(seconds=2)
    """The ttl of leases that are to run out. Longer ones are tried, up to 27 times as long, if starts take longer."""

    late: ClassVar[timedelta] = timedelta(seconds=1)
    """How much later than its deadline a tree may be gone or stand still: nothing is promised of it,
    but a host that is busy, and a file system between two hosts, show it late."""

    many: ClassVar[int] = 20
    """Leases at once, in ``many-at-once``."""

    large_mb: ClassVar[int] = 100
    """Megabytes (10⁶ bytes) of output, in ``output-large``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for check, reason in cls.unsupported.items():
            if not isinstance(check, Check):
                raise TypeError(f"{cls.__name__}.unsupported: {check!r} is no Check; use Check.EXIT_CODE, …")
            if not isinstance(reason, str) or not reason.strip():
                raise TypeError(f"{cls.__name__}.unsupported[{check}]: {reason!r} is no reason; say why in a few words")

    def make(self, context: RuntimeContext) -> Runtime:
        """Makes the runtime of an agent whose state directory is ``context.state_dir``; it is not opened."""
        # What a runtime is made with is the agent's promise, not the interface's: see RuntimeContext.
        return self.runtime_class(context)  # type: ignore[call-arg]

    def python(self) -> Sequence[str]:
        """Returns the arguments that start Python (3.8 or newer) where jobs run."""
        return [sys.executable]

    def there(self, path: Path) -> str:
        """Returns where jobs find ``path``, which lies in the directory that suite and jobs share."""
        return str(path)

    def parent_dir(self) -> Path | None:
        """Returns where state and shared directories are made; None: where temporary files go.

        Jobs must be able to read and write there. Every check has directories of
        its own below it, which are removed when it is over.
        """
        return None

    async def vanish(self, context: RuntimeContext, handle: Handle) -> None:
        """Removes every trace of an execution that has ended, while no agent runs, as an accident would.

        The default removes the files that the runtime has in ``state_dir / "leases"``.
        """
        remove_leases(context)

    def make_cleaner(self, context: RuntimeContext) -> Runtime | None:
        """Makes the runtime that ends what a check has left, not opened; None: the agent of the check does that."""
        return None

    def ran_against(self) -> str:
        """Returns what the runtime runs jobs on, with its version, for the table."""
        release = ".".join(platform.release().split(".")[:2])
        return f"{platform.system()} {release}, Python {platform.python_version()}"

    @classmethod
    def called(cls) -> str:
        """Returns what reports call it."""
        return cls.title or cls.runtime_class.name


def remove_leases(context: RuntimeContext) -> None:
    """Removes what a runtime keeps of its leases in its agent's state directory."""
    shutil.rmtree(context.state_dir / "leases", ignore_errors=True)

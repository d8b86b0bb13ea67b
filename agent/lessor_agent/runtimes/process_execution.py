"""One attempt that runs as processes of this host, as the agent sees it.

The keeper is the authority: this object passes orders on and hears of changes
over the keeper's socket, and reads the outcome from its file when the keeper is
gone. Nothing is lost if the agent dies at any point: another object for the
same lease is made from the directory.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from lessor_agent.keeper.directory import LeaseDirectory, Outcome, connect_homeless, peer
from lessor_agent.keeper.kernel import read_title
from lessor_agent.keeper.link import Link
from lessor_agent.keeper.record import DeadlineRecord
from lessor_agent.keeper.tree import end_lease_processes
from lessor_agent.runtimes.base import Execution, Exit, Handle, OutputFiles, StopCause

log = logging.getLogger(__name__)

HANDLE_VERSION = 1
RUNTIME_NAME = "process"

_SWEEP_PATIENCE_S = 2.0
_SEARCH_AGAIN_S = 1.0
_LOCK_POLL_S = (0.005, 0.1)
"""Between two looks for a keeper that has hung up: at first, and at most."""
_PREPARED, _RUNNING, _ENDED = "prepared", "running", "ended"


class ExecutionHome(Protocol):
    """What an execution needs of the runtime it belongs to."""

    boot_id: str
    state_dir: Path

    async def remove(self, path: Path) -> None:
        """Removes a lease's directory, whatever the workload made of it.

        Raises:
            OSError: Something cannot be removed.
        """

    async def sweep(self) -> None:
        """Returns once the zygote has ended what it caught of dead keepers' trees. Never fails."""

    def forgotten(self, lease_id: int) -> None:
        """The execution has removed itself."""


class ProcessExecution(Execution):
    """An attempt with its keeper, or with the outcome a keeper left."""

    def __init__(self, lease_id: int, path: Path, home: ExecutionHome) -> None:
        """Makes one that knows nothing yet; :meth:`connect` or :meth:`conclude` must follow.

        Args:
            lease_id: The lease.
            path: Its directory.
            home: What it needs of its runtime.
        """
        self.lease_id = lease_id
        self.path = path
        self.output = OutputFiles(stdout=path / "stdout", stderr=path / "stderr", events=path / "events")
        self.handle = Handle(RUNTIME_NAME, HANDLE_VERSION, {"lease_id": lease_id})
        self._home = home
        self._record: DeadlineRecord | None = None
        self._link: Link | None = None
        self._keeper_gone = asyncio.Event()
        """No keeper guards the lease any more: it has exited, or let go."""
        self._conclusion: asyncio.Task[None] | None = None
        self._state = _PREPARED
        self._changed = asyncio.Event()
        self._begin_sent = False
        self._frozen = False
        self._ran = False
        self._started_at_ns: int | None = None
        self._main_pid: int | None = None
        self._exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()

    def connect(self, connection: socket.socket) -> None:
        """Takes over ``connection``, at whose other end is the keeper, or was until this very moment."""
        keeper_pid, _ = peer(connection)
        self.handle = Handle(RUNTIME_NAME, HANDLE_VERSION, {"lease_id": self.lease_id, "keeper_pid": keeper_pid})
        self._open_record()
        self._link = Link(connection, hear=self._hear, lost=self._on_hung_up)

    def conclude(self, outcome: Outcome) -> None:
        """Takes note of how it ended. No keeper guards it any more."""
        self._keeper_gone.set()
        self._end(outcome)

    # -- Execution -----------------------------------------------------------

    async def begin(self) -> bool:
        """Lets the workload run; returns whether it does, or did: see :meth:`Execution.begin`."""
        if not self._begin_sent and self._state == _PREPARED:
            self._begin_sent = True
            self._order({"op": "begin"})
        while self._state == _PREPARED:
            self._changed.clear()
            await self._changed.wait()
        return self._ran

    async def wait(self) -> Exit:
        """Returns how it ended; see :meth:`Execution.wait`. Cancelled if the runtime is closed before."""
        return await asyncio.shield(self._exit)

    async def stop(self, cause: StopCause, grace: timedelta | None = None) -> None:
        """Asks it to stop; see :meth:`Execution.stop`."""
        grace_ms = None if grace is None else max(0, round(grace / timedelta(milliseconds=1)))
        self._order({"op": "stop", "cause": str(cause), "grace_ms": grace_ms})

    def renew(self, deadline_ns: int) -> None:
        """Moves the deadline forward; see :meth:`Execution.renew`."""
        if self._record is not None:
            self._record.renew(deadline_ns)

    async def forget(self) -> None:
        """Removes the lease's directory, once no keeper guards it."""
        await self._keeper_gone.wait()
        await self.let_go()
        await self._home.remove(self.path)
        self._home.forgotten(self.lease_id)

    async def let_go(self) -> None:
        """Closes what this object holds. The execution itself goes on."""
        if self._conclusion is not None:
            self._conclusion.cancel()
            await asyncio.gather(self._conclusion, return_exceptions=True)
            self._conclusion = None
        self._hang_up()
        self._keeper_gone.set()
        if self._record is not None:
            self._record.close()
            self._record = None
        if not self._exit.done():
            self._exit.cancel()
        self._state = _ENDED
        self._changed.set()

    @property
    def ended(self) -> bool:
        """Whether it has ended; see :meth:`Execution.ended`."""
        return self._exit.done()

    # -- the keeper ------------------------------------------------------------

    def _open_record(self) -> None:
        try:
            directory = LeaseDirectory(str(self.path), self.lease_id)
        except OSError:
            # The directory was deleted. The keeper tells where the record can still be reached.
            return
        try:
            self._record = directory.map_record(self._home.boot_id)
        except (OSError, ValueError):
            log.warning("no deadline record", extra={"event": "record_missing", "lease_id": self.lease_id})
        finally:
            directory.close()

    def _open_record_of_keeper(self, record_fd: int) -> None:
        """Maps a record whose file was deleted: the keeper still has it open."""
        try:
            fd = os.open(f"/proc/{self.handle.data['keeper_pid']}/fd/{record_fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return
        try:
            self._record = DeadlineRecord(fd, self.lease_id, self._home.boot_id)
        except (OSError, ValueError):
            return
        finally:
            os.close(fd)

    def _hang_up(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _order(self, order: dict[str, object]) -> None:
        if self._link is not None and not self._exit.done():
            self._link.order(order)

    def _on_hung_up(self, error: Exception | None) -> None:
        self._conclusion = asyncio.create_task(self._conclude(error), name=f"conclude-{self.lease_id}")

    async def _conclude(self, error: Exception | None) -> None:
        """Finds out how it ended where the keeper did not say. Whatever fails, an end is told."""
        if error is not None:
            log.error(
                "a keeper is not understood",
                exc_info=error,
                extra={"event": "keeper_garbled", "lease_id": self.lease_id},
            )
            # It goes on guarding; its outcome is in its file once it has ended what nobody can follow any more.
            await self.stop(StopCause.KEEPER_DIED)
        await self._await_unguarded()
        try:
            outcome = self._stored_outcome()
            if outcome is None:
                log.error("keeper died", extra={"event": "keeper_died", "lease_id": self.lease_id})
                # At once, too, for the zygote may stand still; once more after it, for what hung below it unmarked.
                await asyncio.gather(self._home.sweep(), _end_processes(self.path, self.lease_id, self._main_pid))
                outcome = await end_orphaned(self.path, self.lease_id, self._main_pid, self._started_at_ns)
        except Exception:
            log.exception("the end of a job is unknown", extra={"event": "end_unknown", "lease_id": self.lease_id})
            outcome = _keeper_died(self.lease_id, self._started_at_ns)
        self._end(outcome)

    async def _await_unguarded(self) -> None:
        """Returns once no keeper guards the lease: then the lock is free, and the outcome stored if there is one."""
        pause_s = _LOCK_POLL_S[0]
        while self._is_guarded():
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOCK_POLL_S[1])
        self._keeper_gone.set()

    def _is_guarded(self) -> bool:
        try:
            directory = LeaseDirectory(str(self.path), self.lease_id)
        except (FileNotFoundError, NotADirectoryError):
            # Deleted. A keeper is known by its title then, until it exits or guards something else.
            title = (self.lease_id, str(self._home.state_dir))
            return read_title(int(self.handle.data["keeper_pid"])) == title
        except OSError:
            # Not to be told (no descriptor left, say), which is no reason to believe that it is gone.
            return True
        try:
            return directory.locked()
        except OSError:
            return True
        finally:
            directory.close()

    def _hear(self, status: dict[str, object]) -> None:
        self._main_pid = _number(status["pid"])
        self._started_at_ns = _number(status["started_at_ns"])
        record_fd = _number(status["record_fd"])
        if self._record is None and record_fd is not None:
            self._open_record_of_keeper(record_fd)
        if isinstance(outcome := status["outcome"], dict):
            # It comes when the tree is gone, the outcome is stored, and the lock is free.
            self._end(Outcome.from_json(outcome))
            self._keeper_gone.set()
            self._hang_up()
        frozen = status.get("frozen") is True
        if frozen is not self._frozen and status["outcome"] is None:
            self._note_frozen(frozen=frozen)
        if status["state"] == _RUNNING:
            self._ran = True
            self._state = _RUNNING
            self._changed.set()

    def _note_frozen(self, *, frozen: bool) -> None:
        self._frozen = frozen
        fields = {"event": "frozen" if frozen else "thawed", "lease_id": self.lease_id}
        if frozen:
            log.warning("the lease was not renewed in time: the job is frozen until the server answers", extra=fields)
        else:
            log.info("the lease stands: the job goes on", extra=fields)

    def _stored_outcome(self) -> Outcome | None:
        try:
            directory = LeaseDirectory(str(self.path), self.lease_id)
        except OSError:
            return None
        try:
            return directory.read_outcome()
        except (OSError, ValueError) as error:
            fields = {"event": "outcome_damaged", "lease_id": self.lease_id, "error": str(error)}
            log.error("outcome is damaged", extra=fields)
            return None
        finally:
            directory.close()

    def _end(self, outcome: Outcome) -> None:
        self._state = _ENDED
        self._ran |= outcome.started_at_ns is not None
        if not self._exit.done():
            self._exit.set_result(exit_of(outcome))
        self._changed.set()


async def end_orphaned(path: Path, lease_id: int, session: int | None, started_at_ns: int | None) -> Outcome:
    """Ends what runs of a lease whose keeper was killed, and stores that as its outcome.

    Returns only when nothing of it is left.

    Args:
        path: The lease's directory; it need not exist any more.
        lease_id: The lease.
        session: The workload's session, if it was this very agent that saw the keeper die; else None.
        started_at_ns: When the workload began, in Unix nanoseconds; None: never.
    """
    await _end_processes(path, lease_id, session)
    outcome = _keeper_died(lease_id, started_at_ns)
    try:
        directory = LeaseDirectory(str(path), lease_id)
    except OSError:
        return outcome
    try:
        await asyncio.to_thread(directory.write_outcome, outcome)
    except OSError:
        log.warning("outcome not stored", extra={"event": "outcome_not_stored", "lease_id": lease_id}, exc_info=True)
    finally:
        directory.close()
    return outcome


async def _end_processes(path: Path, lease_id: int, session: int | None) -> None:
    while True:
        try:
            if await asyncio.to_thread(end_lease_processes, str(path), session, patience_s=_SWEEP_PATIENCE_S):
                return
            log.warning("processes cannot be killed yet", extra={"event": "unkillable", "lease_id": lease_id})
        except OSError as error:
            # No descriptor left to look through /proc, say: nothing is proved until one is.
            fields = {"event": "unsearchable", "lease_id": lease_id, "error": str(error)}
            log.warning("processes cannot be looked for", extra=fields)
            await asyncio.sleep(_SEARCH_AGAIN_S)


def _keeper_died(lease_id: int, started_at_ns: int | None) -> Outcome:
    return Outcome(
        lease_id=lease_id,
        exit_code=None,
        signal=0,
        stop_cause=StopCause.KEEPER_DIED.value,
        start_error=None,
        started_at_ns=started_at_ns,
        ended_at_ns=time.time_ns(),
    )


def exit_of(outcome: Outcome) -> Exit:
    """Returns an outcome in the agent's terms."""
    return Exit(
        exit_code=outcome.exit_code,
        signal=outcome.signal,
        stop_cause=None if outcome.stop_cause is None else StopCause(outcome.stop_cause),
        start_error=outcome.start_error,
        started_at=None if outcome.started_at_ns is None else _utc(outcome.started_at_ns),
        ended_at=_utc(outcome.ended_at_ns),
    )


def connect_keeper(path: Path, lease_id: int) -> socket.socket | None:
    """Connects to the keeper that serves ``path``; None if none listens there."""
    try:
        directory = LeaseDirectory(str(path), lease_id)
    except OSError:
        return None
    try:
        return directory.connect()
    except OSError:
        return None
    finally:
        directory.close()


def connect_keeper_by_pid(pid: int) -> socket.socket | None:
    """Connects to a keeper whose directory was deleted; None if it ended meanwhile."""
    try:
        return connect_homeless(pid)
    except OSError:
        return None


def _utc(unix_ns: int) -> datetime:
    return datetime.fromtimestamp(unix_ns // 1000 / 1_000_000, UTC)


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None

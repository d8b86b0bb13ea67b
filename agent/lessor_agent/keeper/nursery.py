"""The agent's end of the zygote: starts it, asks it for keepers, starts it again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from lessor_agent.keeper.kernel import TITLE_RESERVE
from lessor_agent.keeper.link import Link
from lessor_agent.keeper.spec import KeeperSpec

log = logging.getLogger(__name__)

START_TIMEOUT_S = 20.0
ANSWER_TIMEOUT_S = 30.0
_CLOSE_TIMEOUT_S = 5.0


class NurseryFault(Exception):
    """Base of what can go wrong with the zygote.

    NurseryFault
    ├── ZygoteUnavailable   it cannot be started, or does not answer
    ├── ZygoteLost          it died, or was killed for its silence: what was asked may have happened
    └── KeeperRefused       the keeper could not be made; nothing is left of it
        └── KeeperTaken     because the lease has one, or its directory was just removed
    """


class ZygoteUnavailable(NurseryFault):
    """The zygote cannot be started, or does not answer."""


class ZygoteLost(NurseryFault):
    """The zygote died, or was killed for its silence: what was asked may have happened, and will not happen later."""


class KeeperRefused(NurseryFault):
    """The keeper could not be made; nothing is left of it. The message says why."""


class KeeperTaken(KeeperRefused):
    """The lease has a keeper already, or its directory was just removed: look again."""


class _Zygote:
    """One zygote process and the connection to it."""

    outliving: ClassVar[list[subprocess.Popen[bytes]]] = []
    """Those that were hung up on and stay until their keepers have ended, so that each is buried if that is soon."""

    def __init__(
        self, process: subprocess.Popen[bytes], connection: socket.socket, lost: Callable[[_Zygote], None]
    ) -> None:
        """Takes over both; ``lost`` is called when it hangs up or cannot be understood."""
        self.process = process
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting: dict[int, asyncio.Future[dict[str, object]]] = {}
        self.lost = False
        self._on_lost = lost
        self._said = asyncio.create_task(_log_errors(process), name="zygote-stderr")
        # It ends when the zygote has nothing to say any more: it has ended, or outlives this connection.
        self.link = Link(connection, hear=self._hear, lost=self._hung_up)

    def _hear(self, answer: dict[str, object]) -> None:
        if "ready" in answer:
            self.ready.set_result(None)
        elif (future := self.waiting.get(int(str(answer["id"])))) is not None and not future.done():
            future.set_result(answer)

    def _hung_up(self, error: Exception | None) -> None:
        self.lost = True
        if error is not None:
            log.error("the zygote is not understood", exc_info=error, extra={"event": "zygote_garbled"})
            self.process.kill()
        self._disappoint("the zygote died before it answered")
        self._on_lost(self)

    def _disappoint(self, reason: str) -> None:
        if not self.ready.done():
            self.ready.set_exception(ZygoteLost(reason))
            # Read, so that a failure nobody waits for any more is no complaint.
            self.ready.exception()
        for future in self.waiting.values():
            if not future.done():
                future.set_exception(ZygoteLost(reason))

    async def end(self) -> None:
        """Hangs up. Returns once it has ended, or only stays until its keepers have."""
        self.lost = True
        self._disappoint("the zygote was ended before it answered")
        self.link.close()
        if not (await asyncio.wait([self._said], timeout=_CLOSE_TIMEOUT_S))[0]:
            self.process.kill()
            # A keeper that was just forked, and stands still, may have its standard error as well.
            await asyncio.wait([self._said], timeout=_CLOSE_TIMEOUT_S)
            self._said.cancel()
        self.outliving.append(self.process)
        self.outliving[:] = [process for process in self.outliving if process.poll() is None]


class Nursery:
    """Makes keepers. The agent itself never forks."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._zygote: _Zygote | None = None
        self._starting = asyncio.Lock()
        self._next_id = 0
        self._closed = False
        self._revival: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Starts the zygote.

        Raises:
            ZygoteUnavailable: It cannot be started; the message says why.
        """
        self._closed = False
        await self._living()

    async def close(self) -> None:
        """Hangs up on the zygote, which ends with the last of its keepers; they go on."""
        self._closed = True
        if self._revival is not None:
            self._revival.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._revival
        async with self._starting:
            zygote, self._zygote = self._zygote, None
            if zygote is not None:
                await zygote.end()

    async def fork(self, spec: KeeperSpec) -> int:
        """Makes a keeper for ``spec`` and returns its pid once it guards the lease.

        Raises:
            KeeperTaken: The lease has a keeper already.
            KeeperRefused: It could not be made; nothing is left of it but the directory.
            ZygoteLost: It may or may not have been made: its lock tells.
            ZygoteUnavailable: No zygote can be started; nothing was asked of any.
        """
        answer = await self._ask(
            {"op": "fork", "spec": spec.to_text(), "own": spec.identity is not None}, end_if_silent=True
        )
        if "error" in answer:
            kind = KeeperTaken if answer.get("taken") else KeeperRefused
            raise kind(str(answer["error"]))
        return int(str(answer["pid"]))

    async def sweep(self) -> None:
        """Returns once nothing is left of the trees whose keepers died below this zygote.

        Raises:
            ZygoteLost: It died; the trees must be found by other means.
            ZygoteUnavailable: It does not answer.
        """
        await self._ask({"op": "sweep"})

    @property
    def pid(self) -> int | None:
        """The zygote's pid; None while there is none."""
        return None if self._zygote is None else self._zygote.process.pid

    async def _ask(self, request: dict[str, object], *, end_if_silent: bool = False) -> dict[str, object]:
        zygote = await self._living()
        self._next_id += 1
        number = self._next_id
        answer: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()
        zygote.waiting[number] = answer
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                zygote.link.order({"id": number, **request})
                return await answer
        except TimeoutError:
            if end_if_silent:
                # Else it could do what was asked after its asker has given up.
                zygote.lost = True
                zygote.process.kill()
                raise ZygoteLost(f"the zygote did not answer within {ANSWER_TIMEOUT_S:g} s and was killed") from None
            raise ZygoteUnavailable(f"the zygote did not answer within {ANSWER_TIMEOUT_S:g} s") from None
        finally:
            zygote.waiting.pop(number, None)
            if answer.done() and not answer.cancelled():
                # Read, so that an answer nobody waits for any more is no complaint.
                answer.exception()

    async def _living(self) -> _Zygote:
        async with self._starting:
            if self._closed:
                raise ZygoteUnavailable("the process runtime is closed")
            if self._zygote is not None and self._zygote.lost:
                lost, self._zygote = self._zygote, None
                await lost.end()
            if self._zygote is None:
                self._zygote = await self._start()
            return self._zygote

    async def _start(self) -> _Zygote:
        ours, theirs = socket.socketpair()
        try:
            process = self._start_process(theirs)
        except OSError as error:
            ours.close()
            raise ZygoteUnavailable(f"cannot start {sys.executable}: {error.strerror}") from None
        finally:
            theirs.close()
        ours.setblocking(False)
        zygote = _Zygote(process, ours, self._on_lost)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await zygote.ready
        except (TimeoutError, ZygoteLost):
            await zygote.end()
            raise ZygoteUnavailable("the zygote does not come up; the agent's log says why") from None
        except BaseException:
            await zygote.end()
            raise
        log.debug("zygote started", extra={"event": "zygote_started", "pid": zygote.process.pid})
        return zygote

    def _start_process(self, connection: socket.socket) -> subprocess.Popen[bytes]:
        entry = Path(__file__).with_name("__main__.py")
        # Nothing of the agent's environment goes along: a job of the same user could read it in /proc.
        env = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        # None of asyncio's subprocesses: those are killed when their event loop is closed.
        return subprocess.Popen(
            [
                sys.executable, "-I", "-S", "-X", "utf8", str(entry),
                "--state-dir", str(self._state_dir), "--socket", str(connection.fileno()), TITLE_RESERVE,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(connection.fileno(),),
            start_new_session=True,
            cwd="/",
            env=env,
        )  # fmt: skip

    def _on_lost(self, zygote: _Zygote) -> None:
        if zygote is self._zygote and not self._closed:
            log.warning("zygote died, starting another", extra={"event": "zygote_died", "pid": zygote.process.pid})
            self._revival = asyncio.create_task(self._revive(), name="zygote-revival")

    async def _revive(self) -> None:
        try:
            await self._living()
        except ZygoteUnavailable as error:
            # The next request tries again and tells its caller.
            log.error("zygote cannot be started", extra={"event": "zygote_unavailable", "error": str(error)})


async def _log_errors(process: subprocess.Popen[bytes]) -> None:
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), process.stderr
    )
    try:
        while line := await reader.readline():
            text = line.decode(errors="replace").rstrip()
            log.error("zygote says", extra={"event": "zygote_stderr", "text": text})
    finally:
        transport.close()

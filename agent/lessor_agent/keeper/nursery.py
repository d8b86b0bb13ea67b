"""The agent's end of the zygote: starts it, asks it for keepers, starts it again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
from pathlib import Path

from lessor_agent.keeper.kernel import TITLE_RESERVE
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

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self.reader = reader
        self.writer = writer
        self.waiting: dict[int, asyncio.Future[dict[str, object]]] = {}
        self.tasks: list[asyncio.Task[None]] = []
        self.lost = False


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
        """Ends the zygote; the keepers go on."""
        self._closed = True
        if self._revival is not None:
            self._revival.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._revival
        async with self._starting:
            zygote, self._zygote = self._zygote, None
            if zygote is not None:
                await _end(zygote)

    async def fork(self, spec: KeeperSpec) -> int:
        """Makes a keeper for ``spec`` and returns its pid once it guards the lease.

        Raises:
            KeeperTaken: The lease has a keeper already.
            KeeperRefused: It could not be made; nothing is left of it but the directory.
            ZygoteLost: It may or may not have been made: its lock tells.
            ZygoteUnavailable: No zygote can be started; nothing was asked of any.
        """
        answer = await self._ask({"op": "fork", "spec": spec.to_json()}, end_if_silent=True)
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
                zygote.writer.write(json.dumps({"id": number, **request}).encode() + b"\n")
                await zygote.writer.drain()
                return await answer
        except ConnectionError:
            raise ZygoteLost("the zygote died before it answered") from None
        except TimeoutError:
            if end_if_silent:
                # Else it could do what was asked after its asker has given up.
                zygote.lost = True
                with contextlib.suppress(ProcessLookupError):
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
                await _end(self._zygote)
                self._zygote = None
            if self._zygote is None:
                self._zygote = await self._start()
            return self._zygote

    async def _start(self) -> _Zygote:
        ours, theirs = socket.socketpair()
        entry = Path(__file__).with_name("__main__.py")
        # Nothing of the agent's environment goes along: a job of the same user could read it in /proc.
        env = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", "-X", "utf8", str(entry),
                "--state-dir", str(self._state_dir), "--socket", str(theirs.fileno()), TITLE_RESERVE,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd="/",
                env=env,
            )  # fmt: skip
        except OSError as error:
            ours.close()
            raise ZygoteUnavailable(f"cannot start {sys.executable}: {error.strerror}") from None
        finally:
            theirs.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        zygote = _Zygote(process, reader, writer)
        zygote.tasks.append(asyncio.create_task(_log_errors(process), name="zygote-stderr"))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                hello = await reader.readline()
        except TimeoutError:
            hello = b""
        except BaseException:
            await _end(zygote)
            raise
        if not hello:
            await _end(zygote)
            raise ZygoteUnavailable(f"the zygote ended at once (exit {process.returncode}); the agent's log says why")
        zygote.tasks.append(asyncio.create_task(self._read(zygote), name="zygote-reader"))
        log.debug("zygote started", extra={"event": "zygote_started", "pid": process.pid})
        return zygote

    async def _read(self, zygote: _Zygote) -> None:
        try:
            while line := await zygote.reader.readline():
                answer = json.loads(line)
                future = zygote.waiting.get(answer["id"])
                if future is not None and not future.done():
                    future.set_result(answer)
        except ConnectionError:
            # The same as its end of file.
            pass
        zygote.lost = True
        for future in zygote.waiting.values():
            if not future.done():
                future.set_exception(ZygoteLost("the zygote died before it answered"))
        if not self._closed:
            log.warning("zygote died, starting another", extra={"event": "zygote_died", "pid": zygote.process.pid})
            self._revival = asyncio.create_task(self._revive(), name="zygote-revival")

    async def _revive(self) -> None:
        try:
            await self._living()
        except ZygoteUnavailable as error:
            # The next request tries again and tells its caller.
            log.error("zygote cannot be started", extra={"event": "zygote_unavailable", "error": str(error)})


async def _log_errors(process: asyncio.subprocess.Process) -> None:
    assert process.stderr is not None
    while line := await process.stderr.readline():
        log.error("zygote says", extra={"event": "zygote_stderr", "text": line.decode(errors="replace").rstrip()})


async def _end(zygote: _Zygote) -> None:
    zygote.lost = True
    for task in zygote.tasks[1:]:
        task.cancel()
    for answer in zygote.waiting.values():
        if not answer.done():
            answer.set_exception(ZygoteLost("the zygote was ended before it answered"))
    zygote.writer.close()
    try:
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await zygote.process.wait()
    except TimeoutError:
        zygote.process.kill()
        await zygote.process.wait()
    await asyncio.gather(*zygote.tasks, return_exceptions=True)

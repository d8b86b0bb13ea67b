"""Several server processes on one address: ``lessor server --workers N``.

The process that was started serves nothing. It claims the address, starts N
workers, each a replica like any other (its own pools; one replica leads), and
starts one again when it ends: leases stand meanwhile, and its agents come back
to another worker. All of them listen with SO_REUSEPORT: the kernel gives each
new connection to one of them, by a hash of its addresses and ports.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import signal
import socket
from typing import Any, Self

from lessor_server import children
from lessor_server.config import ListenError, ServerSettings, parse_listen

logger = logging.getLogger(__name__)

_STOP_S = 25.0
"""A worker that was asked to stop is killed after this: before systemd kills everything (30 s), and later than
a worker needs."""

ERROR = "error: "
"""Begins the line in which a worker tells its parent why it ends."""


class WorkerError(Exception):
    """A worker cannot start; the message is what it said, ``code`` its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Claim:
    """A port that belongs to this process and its workers; others are refused it until :meth:`close`.

    What holds it are sockets that are bound and never listen, so that no connection ends up with them and the
    port stays ours while no worker runs.
    """

    def __init__(self, host: str, port: int) -> None:
        """
        Args:
            host: A name or an address; all its addresses are claimed.
            port: 0 takes a free one.

        Raises:
            OSError: Somebody else has the port, or the host is none of ours.
        """
        self.port = port
        """The port that was claimed."""
        self._sockets: list[socket.socket] = []
        absent: OSError | None = None
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, _, _, _, address in found:
                try:
                    made = _hold(family, (address[0], self.port, *address[2:]))
                except OSError as error:
                    # ``localhost`` may have an address of a family that this host does not speak.
                    if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        raise
                    absent = error
                    continue
                self._sockets.append(made)
                self.port = made.getsockname()[1]
            if absent is not None and not self._sockets:
                raise absent
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives the port up."""
        for held in self._sockets:
            held.close()
        self._sockets.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _hold(family: socket.AddressFamily | int, address: tuple[Any, ...]) -> socket.socket:
    with socket.socket(family, socket.SOCK_STREAM) as exclusive:
        # As any server: connections of an earlier one that are still in TIME_WAIT do not matter.
        exclusive.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        exclusive.bind(address)
        # Of two that are about to share this port with their workers, one must fail. Only a listener excludes
        # all others; it lives for some microseconds, while nobody knows yet that there is a server.
        exclusive.listen(1)
        exclusive.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held = socket.socket(family, socket.SOCK_STREAM)
        try:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind(exclusive.getsockname())
            # With it, a server that does not share its port could bind beside a socket that does not listen.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        except BaseException:
            held.close()
            raise
    return held


class Backoff:
    """How long to wait before a worker that ended is started again.

    Half a second, twice as long after each further end, at most 30 s; one that ran for a minute begins anew.
    """

    FIRST_S = 0.5
    MOST_S = 30.0
    STEADY_S = 60.0

    def __init__(self) -> None:
        self._next_s = self.FIRST_S

    def delay_s(self, lived_s: float) -> float:
        """Returns the seconds to wait after a worker that lived ``lived_s`` seconds."""
        delay_s = self.FIRST_S if lived_s >= self.STEADY_S else self._next_s
        self._next_s = min(self.MOST_S, 2 * delay_s)
        return delay_s


class Worker:
    """One worker: at most one process at a time, started and ended here."""

    def __init__(self, number: int, environment: dict[str, str]) -> None:
        """
        Args:
            number: From 1; its log lines carry it.
            environment: With all settings.
        """
        self.number = number
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Starts a process and waits until it listens.

        Raises:
            WorkerError: It ended before.
        """
        # From the main thread: the kernel ends a child together with the thread that started it.
        self._process = await asyncio.create_subprocess_exec(
            # -P: what lies in the working directory is not to be imported.
            *children.command(["-P", "-m", "lessor_server.worker", str(self.number)], os.getpid()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            # Ctrl-C reaches this process alone, which tells the workers.
            process_group=0,
        )
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line or line.startswith(ERROR.encode()):
            code, why = await self.ended()
            why = line.decode(errors="replace").strip().removeprefix(ERROR) or why
            # A code below 0 is a signal, and no exit code.
            raise WorkerError(why or f"worker {self.number} ended with code {code} before it listened", max(code, 1))

    async def ended(self) -> tuple[int, str]:
        """Waits until the process has ended.

        Returns:
            Its exit code (-N: signal N), and what it said of why; empty if nothing.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        said = (await self._process.stdout.read()).decode(errors="replace").strip()
        return await self._process.wait(), said.removeprefix(ERROR)

    async def stop(self) -> None:
        """Ends the process, if there is one: SIGTERM, and SIGKILL if it takes too long."""
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_S)
        except TimeoutError:
            logger.warning("a worker does not stop and is killed", extra={"event": "killed", "worker": self.number})
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


class Workers:
    """The workers of one address. :meth:`start` them, :meth:`stop` them; in between they are kept running."""

    def __init__(self, settings: ServerSettings, port: int) -> None:
        """``port`` is the one that is claimed for them."""
        environment = _environment(settings, port)
        self._workers = [Worker(number, environment) for number in range(1, settings.workers + 1)]
        self._keepers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Starts all and waits until all listen. From then on one that ends is started again.

        Raises:
            WorkerError: One cannot start; the others may run.
        """
        starting = [asyncio.create_task(worker.start()) for worker in self._workers]
        try:
            # Raises what the first of them to fail raises.
            await asyncio.gather(*starting)
        finally:
            await _cancel(starting)
        self._keepers = [asyncio.create_task(_keep(worker)) for worker in self._workers]

    async def failed(self) -> None:
        """Waits until a part of this process breaks, which is never meant to happen.

        Raises:
            Exception: What broke it.
        """
        await asyncio.gather(*self._keepers)

    async def stop(self) -> None:
        """Stops all, gracefully and at once."""
        await _cancel(self._keepers)
        await asyncio.gather(*(worker.stop() for worker in self._workers))


async def _keep(worker: Worker) -> None:
    """Starts a worker again whenever it has ended, until cancelled."""
    backoff = Backoff()
    clock = asyncio.get_running_loop().time
    began_s = clock()
    while True:
        code, why = await worker.ended()
        while True:
            delay_s = backoff.delay_s(clock() - began_s)
            logger.warning(
                "a worker ended and is started again",
                extra={"event": "worker_ended", "worker": worker.number, "code": code, "why": why, "in_s": delay_s},
            )
            await asyncio.sleep(delay_s)
            began_s = clock()
            try:
                await worker.start()
            except WorkerError as error:
                # The others serve; whatever it is (a database that is away, a newer schema) may pass.
                code, why = error.code, str(error)
            else:
                break


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _environment(settings: ServerSettings, port: int) -> dict[str, str]:
    """Returns a worker's environment: ours, and all settings by ``LESSOR_SERVER_*``.

    Not by its command line, which shows the database's password to every user of the host.
    """
    prefix = settings.model_config["env_prefix"]
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(prefix)}
    values = settings.model_dump(mode="json") | {"listen": f"{settings.listen.rpartition(':')[0]}:{port}"}
    for name, value in values.items():
        environment[prefix + name.upper()] = value if isinstance(value, str) else json.dumps(value)
    return environment


async def serve(settings: ServerSettings) -> None:
    """Runs the workers until SIGTERM or SIGINT.

    Prints the line with the address once all of them listen, and nothing else.

    Raises:
        ListenError: The address cannot be used.
        WorkerError: A worker cannot start. One that could, and ends later, is started again.
    """
    address = parse_listen(settings.listen, insecure=settings.insecure)
    try:
        claim = Claim(address.host, address.port)
    except OSError as error:
        raise ListenError.refused(settings.listen, error) from None
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    with claim:
        workers = Workers(settings, claim.port)
        asked = asyncio.create_task(stopped.wait())
        work = asyncio.create_task(_run(workers, f"{settings.listen.rpartition(':')[0]}:{claim.port}"))
        try:
            await asyncio.wait({asked, work}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        finally:
            asked.cancel()
            work.cancel()
            await asyncio.gather(asked, work, return_exceptions=True)
            await workers.stop()


async def _run(workers: Workers, address: str) -> None:
    await workers.start()
    # Whoever started this process reads the port from here.
    print(f"lessor server listens on {address}", flush=True)
    await workers.failed()

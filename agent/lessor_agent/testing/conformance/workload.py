"""What the suite runs as jobs: ``python3 -I workload.py VERB ARGUMENT…``, standard library only, Python 3.8 or newer.

It is copied into the directory that suite and jobs share, so that it needs
neither Lessor nor a network where it runs. The suite imports it as well, for
what it writes. No process of it lives longer than :data:`LIFE_S`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LIFE_S = 600
"""A runtime that fails to end a job must not leave it for ever."""
TICK_S = 0.005

BINARY = bytes(range(256)) * 64 + b"\r\n\n\0\xff\xfe\xc3(\xf0\x28\x8c\x28 no newline"

EVENTS = (
    b'{"type": "progress", "fraction": 0.25, "message": "epoch 1 of 4 \xe2\x80\x93 f\xc3\xbcr dich"}\n',
    b'{"type":"metrics","values":{"loss":0.031,"lr":1e-4},"time":1767225600.0}\n',
    b'{"type":"checkpoint","cursor":"/data/run 7/epoch-1.pt"}\n',
    b"this is no JSON \x00\xff\n",
    b'{"type":"error","error":{"type":"ValueError","message":"bad shard 7","retryable":false}}\n',
    b'{"type":"progress","fraction":0.5}\n',
    b'{"type":"result","value":{"text":"' + b"x" * 100_000 + b'"}}\n',
    b'{"type":"checkpoint","cursor":"last line, no newline"}',
)


def block(number: int) -> bytes:
    """Returns 1 MB of text that only block ``number`` has."""
    line = b"%08d " % number + b"0123456789abcdefghijklmnopqrstuvwxyz" * 3
    return (line[:99] + b"\n") * 10_000


def write(fd: int, data: bytes) -> None:
    """Writes all of ``data``."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def append(path: str, data: bytes) -> None:
    """Adds ``data`` to a file in one write, so that what several processes add does not mix."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def leave(code: str) -> None:
    """Ends with that exit code."""
    sys.exit(int(code))


def say(text: str, code: str) -> None:
    """Prints ``text`` and ends with ``code``."""
    write(1, text.encode())
    sys.exit(int(code))


def die(number: str) -> None:
    """Dies of a signal."""
    if int(number) != signal.SIGKILL:
        signal.signal(int(number), signal.SIG_DFL)
    os.kill(os.getpid(), int(number))
    while True:
        signal.pause()


def lines(count: str) -> None:
    """Writes numbered lines to both, by turns."""
    for number in range(int(count)):
        write(1, b"out %d\n" % number)
        write(2, b"err %d\n" % number)


def binary() -> None:
    """Writes every byte there is to both."""
    write(1, BINARY)
    write(2, BINARY[::-1])


def flood(blocks: str) -> None:
    """Writes so many blocks of 1 MB."""
    for number in range(int(blocks)):
        write(1, block(number))


def stdin() -> None:
    """Tells what is on standard input."""
    write(1, b"read %d" % len(os.read(0, 65536)))


def tell(*_: str) -> None:
    """Tells what it was started with, as JSON, bytes in hexadecimal; and leaves a file in its working directory."""
    events, cancel = os.environ.get("LESSOR_EVENTS", ""), os.environ.get("LESSOR_CANCEL", "")
    told: dict[str, object] = {
        "argv": [os.fsencode(argument).hex() for argument in sys.argv[2:]],
        "environ": {name.hex(): value.hex() for name, value in os.environb.items()},
        "listing": os.listdir(),
        "events_exist": os.path.exists(events),
        "cancel_exists": os.path.exists(cancel),
    }
    if not told["listing"]:
        # A next attempt that is given the same directory finds it.
        append("left", b"behind\n")
    write(1, json.dumps(told).encode())


def begun(directory: str) -> None:
    """Notes that it ran, one line each time."""
    append(directory + "/begun", b"begun\n")


def tick(path: str) -> None:
    """Appends the time (CLOCK_BOOTTIME, nanoseconds) to a file for ever, deaf to polite signals."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.alarm(LIFE_S)
    while True:
        append(path, b"%d\n" % time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        time.sleep(TICK_S)


def start_child(directory: str) -> None:
    """Starts a child that ticks into ``directory/child``."""
    if os.fork() == 0:
        tick(directory + "/child")


def start_runaway(directory: str) -> None:
    """Starts a process with another session, no parent, no variable and no open file of ours: ``directory/runaway``."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.closerange(0, 64)
            for _ in range(3):
                os.open(os.devnull, os.O_RDWR)
            os.chdir("/")
            os.execve(
                sys.executable,
                [sys.executable, "-I", "-S", os.path.abspath(__file__), "tick", directory + "/runaway"],
                {},
            )
        os._exit(0)
    os.wait()


def stand(directory: str, manner: str, *family: str) -> None:
    """Runs, ticking into ``directory/main`` and printing numbered lines, until ``directory/go`` holds an exit code.

    When it hears SIGTERM it notes in ``directory/heard`` whether it finds the
    cancel file; then it exits with 5 if its manner is ``polite``, goes on if
    ``deaf``. With ``child`` and ``runaway`` it starts these first.
    """
    heard = threading.Event()
    polite = manner == "polite"
    cancel = os.environ.get("LESSOR_CANCEL", "")
    early = os.path.exists(cancel)

    def hear(*_: object) -> None:
        if not heard.is_set():
            heard.set()
            found = b"cancel file" if os.path.exists(cancel) and not early else b"no cancel file"
            append(directory + "/heard", found)
            if polite:
                os._exit(5)

    signal.signal(signal.SIGTERM, hear)
    begun(directory)
    if "child" in family:
        start_child(directory)
    if "runaway" in family:
        start_runaway(directory)
    number = 0
    while not os.path.exists(directory + "/go"):
        append(directory + "/main", b"%d\n" % time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        write(1, b"line %d\n" % number)
        number += 1
        time.sleep(TICK_S)
    with open(directory + "/go") as file:
        code = int(file.read())
    write(1, b"over after %d\n" % number)
    append(directory + "/over", b"over\n")
    os._exit(code)


def events(directory: str) -> None:
    """Writes events, each line in one write, and waits for ``directory/go`` before the last of them."""
    for line in EVENTS[:-1]:
        append(os.environ["LESSOR_EVENTS"], line)
    begun(directory)
    while not os.path.exists(directory + "/go"):
        time.sleep(TICK_S)
    append(os.environ["LESSOR_EVENTS"], EVENTS[-1])


VERBS: tuple[Callable[..., None], ...] = (
    leave,
    say,
    die,
    lines,
    binary,
    flood,
    stdin,
    tell,
    begun,
    tick,
    stand,
    events,
)


def main(verb: str, *arguments: str) -> None:
    """Does what is asked."""
    os.umask(0)
    signal.alarm(LIFE_S)
    {each.__name__: each for each in VERBS}[verb](*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""README's commands, run as they stand there, on what is installed.

A comment before a fenced block says what becomes of it: ``<!-- tour -->`` and
``<!-- by hand -->`` are typed into one shell each, block after block, and
``<!-- tour: NAME -->`` saves the block as the file NAME. The lines below a command
are what it must print: ids may differ, ``…`` stands for anything in a line, and
a line of nothing but ``…`` for any lines.
"""

from __future__ import annotations

import os
import pty
import queue
import re
import shlex
import socket
import subprocess
import sysconfig
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest

from tests.support.cluster import processes_of

README = Path(__file__).resolve().parents[2] / "README.md"
DIRECTORY = "/tmp/lessor-tour"
DEV_ADDRESS = "127.0.0.1:7780"
SERVER_ADDRESS = "127.0.0.1:7790"
DATABASE_URL = "postgresql://lessor:secret@localhost/lessor"
"""What README says, and this test replaces by its own."""

_BLOCK = re.compile(r"<!-- (tour|by hand)(?:: (\S+))? -->\n```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_ERASED = re.compile(r"[^\n]*\r\x1b\[2K")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PATTERNS = {
    r"\bj[0-9abcdefghjkmnpqrstvwxyz]{13}\b": r"j[0-9a-z]{13}",
    r"GPU-[0-9a-f-]{36}": r"GPU-[0-9a-f-]{36}",
    r"127\.0\.0\.1:\d+": r"127\.0\.0\.1:\d+",
    r"…": r".*",
    r" +": r" +",
}
_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Command:
    """One command of a block, and what it prints."""

    text: str
    expected: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Block:
    """A fenced block that a comment marks."""

    part: str
    file: str | None
    text: str

    def commands(self) -> Iterator[Command]:
        """Yields the commands behind ``$``, continued by ``>``, with the lines that follow them."""
        command: Command | None = None
        for line in self.text.splitlines():
            if line.startswith("$ "):
                if command is not None:
                    yield command
                command = Command(line.removeprefix("$ "))
            elif line.startswith("> ") and command is not None and not command.expected:
                command.text += "\n" + line.removeprefix("> ")
            else:
                assert command is not None, f"a block must begin with a command: {line!r}"
                command.expected.append(line)
        if command is not None:
            yield command


def blocks(part: str) -> list[Block]:
    """Returns README's marked blocks of one part, in order."""
    text = README.read_text(encoding="utf-8")
    return [Block(match[1], match[2], match[4]) for match in _BLOCK.finditer(text) if match[1] == part]


def pattern(lines: list[str]) -> re.Pattern[str]:
    """Returns what matches the printed lines that README shows as ``lines``."""
    made = []
    for line in lines:
        if line.strip() == "…":
            made.append(r"(?:.*\n)*?")
            continue
        # From the table, each piece that may differ; everything else word for word.
        pieces = re.split("|".join(f"({known})" for known in _PATTERNS), line.strip())
        made.append(r"^ *" + "".join(_piece(piece) for piece in pieces if piece) + r" *\n")
    return re.compile("".join(made), re.MULTILINE)


def _piece(piece: str) -> str:
    for known, wanted in _PATTERNS.items():
        if re.fullmatch(known, piece):
            return wanted
    return re.escape(piece)


class Shell:
    """A bash with a terminal for its output, as a reader of README has one."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._directory = directory
        self._number = 0
        self._text = ""
        self._output: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._terminal, terminal_of_bash = pty.openpty()
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=terminal_of_bash,
            stderr=terminal_of_bash,
            start_new_session=True,
        )
        os.close(terminal_of_bash)
        threading.Thread(target=self._read, name="terminal", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._bash.stdin is not None
        self._bash.stdin.close()
        try:
            self._bash.wait(20)
        finally:
            for pid in processes_of(self._directory):
                subprocess.run(["kill", "-KILL", str(pid)], check=False, capture_output=True)
            self._bash.kill()
            self._bash.wait()

    def run(self, text: str) -> tuple[int, str]:
        """Runs a command; returns its exit code and what was printed until then."""
        self._number += 1
        file = self._directory / f".command-{self._number}"
        file.write_text(text + "\n", encoding="utf-8")
        mark = f"<{self._number} ended "
        self._type(f". {shlex.quote(str(file))} </dev/null; echo; echo '{mark}'$?'>'")
        match = self._wait(re.compile(rf"\n?{mark}(\d+)>\n"))
        file.unlink()
        printed, self._text = self._text[: match.start()], self._text[match.end() :]
        return int(match[1]), printed + "\n" if printed and not printed.endswith("\n") else printed

    def expect(self, wanted: re.Pattern[str], printed: str) -> re.Match[str]:
        """Waits until ``printed`` and what follows it match."""
        self._text = printed + self._text
        match = self._wait(wanted)
        self._text = self._text[match.end() :]
        return match

    def _type(self, line: str) -> None:
        assert self._bash.stdin is not None
        self._bash.stdin.write(line.encode() + b"\n")
        self._bash.stdin.flush()

    def _wait(self, wanted: re.Pattern[str]) -> re.Match[str]:
        while (match := wanted.search(self._text)) is None:
            try:
                data = self._output.get(timeout=_TIMEOUT_S)
            except queue.Empty:
                data = b""
            assert data, f"nothing like {wanted.pattern!r} in:\n{self._text}"
            text = (self._text + data.decode(errors="replace")).replace("\r\n", "\n")
            self._text = _ESCAPES.sub("", _ERASED.sub("", text))
        return match

    def _read(self) -> None:
        try:
            while data := os.read(self._terminal, 65536):
                self._output.put(data)
        except OSError:
            # The last process with this terminal has gone.
            self._output.put(b"")
        finally:
            os.close(self._terminal)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The variables of a reader who has activated the environment that Lessor is installed in."""
    kept = {name: os.environ[name] for name in ("HOME", "USER", "LOGNAME", "LANG", "TMPDIR") if name in os.environ}
    return {
        **kept,
        "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
        "TERM": "xterm",
        "NO_COLOR": "1",
        "COLUMNS": "140",
        "PYTHONUTF8": "1",
        "XDG_DATA_HOME": str(tmp_path / "data"),
    }


def follow(part: str, shell: Shell, directory: Path, replaced: dict[str, str]) -> int:
    """Does what README says; returns how many commands that were."""
    done = 0
    for block in blocks(part):
        for shown, ours in replaced.items():
            block.text = block.text.replace(shown, ours)
        if block.file is not None:
            (directory / block.file).write_text(block.text, encoding="utf-8")
            continue
        for command in block.commands():
            code, printed = shell.run(command.text)
            if command.expected:
                shell.expect(pattern(command.expected), printed)
            assert code == 0, f"{command.text}: exit code {code}\n{printed}"
            done += 1
    return done


def free_address() -> str:
    """Returns an address nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_the_tour(tmp_path: Path, environment: dict[str, str]) -> None:
    address = free_address()
    replaced = {DIRECTORY: str(tmp_path), "lessor dev ": f"lessor dev --listen {address} ", DEV_ADDRESS: address}
    with Shell(tmp_path, environment) as shell:
        assert follow("tour", shell, tmp_path, replaced) > 20


def test_a_server_and_an_agent_by_hand(tmp_path: Path, environment: dict[str, str], empty_database_url: str) -> None:
    replaced = {DATABASE_URL: empty_database_url, SERVER_ADDRESS: free_address()}
    with Shell(tmp_path, environment) as shell:
        assert follow("by hand", shell, tmp_path, replaced) > 5


def test_every_block_is_run_or_is_about_the_installation() -> None:
    text = README.read_text(encoding="utf-8")
    run = {match[4] for match in _BLOCK.finditer(text)}
    others = [
        line
        for block in re.findall(r"^```(?:console|python|yaml|sh)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        if block not in run
        for line in block.splitlines()
    ]
    outside = re.compile(r"\$ (make|pip|python3 -m venv) ")
    assert [line for line in others if not outside.match(line)] == []

"""``lessor agent drain`` and ``undrain``: a host's own way to be left alone, without knowing its agent's name."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lessor.cli.main import main as run_command
from lessor_agent.state_dir import StateDirError, read_agent_id

COMMANDS = ("drain", "undrain")


def main(argv: Sequence[str]) -> int:
    """Runs ``drain`` or ``undrain``, named by the first of ``argv``, for this host's agent; returns the exit code.

    0: done. 2: the arguments are wrong, or no agent has lived in the state
    directory. Else those of ``lessor drain``: 3 the server does not know the
    agent, 4 it cannot be reached, 124 jobs were still running at the timeout.
    """
    command, *rest = argv
    try:
        flags = _parser(command).parse_args(rest)
    except SystemExit as asked:
        return asked.code if isinstance(asked.code, int) else 2
    if not flags.state_dir:
        print("error: --state-dir: is needed (or LESSOR_AGENT_STATE_DIR)", file=sys.stderr)
        return 2
    try:
        agent_id = read_agent_id(Path(flags.state_dir).expanduser().absolute())
    except StateDirError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    words = [command, agent_id]
    if flags.address:
        words += ["--address", flags.address]
    if flags.json:
        words.append("--json")
    if command == "drain" and not flags.no_wait:
        words.append("--wait")
        if flags.timeout is not None:
            words += ["--timeout", flags.timeout]
    return run_command(words)


def _parser(command: str) -> argparse.ArgumentParser:
    drains = command == "drain"
    parser = argparse.ArgumentParser(
        prog=f"lessor agent {command}",
        description=(
            "Has no more jobs placed on this host, and waits until those it has are over. "
            "The agent itself goes on; stop it afterwards if the host is to go."
            if drains
            else "Takes a drain back: this host gets jobs again."
        ),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--state-dir",
        metavar="DIR",
        default=os.environ.get("LESSOR_AGENT_STATE_DIR"),
        help="that of the agent (default: $LESSOR_AGENT_STATE_DIR)",
    )
    add(
        "--address",
        metavar="HOST:PORT",
        default=os.environ.get("LESSOR_AGENT_ADDRESS"),
        help="the server (default: $LESSOR_AGENT_ADDRESS, else $LESSOR_ADDRESS, else 127.0.0.1:7780)",
    )
    add("--json", action="store_true", help="print JSON instead of text")
    if drains:
        add("--no-wait", action="store_true", help="do not wait for the jobs that run")
        add("--timeout", metavar="DURATION", help="wait no longer than this (exit code 124): 2h")
    return parser

"""What every command shares: the options ``--address`` and ``--json``, and the call to the server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, TypeVar

import typer

from lessor.cli.output import Output
from lessor.sdk.aio import AsyncClient

T = TypeVar("T")

FIRST_CONTACT = timedelta(seconds=3)
"""How long a command tries to reach a server that has not answered yet."""

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT",
        help="The server. Default: $LESSOR_ADDRESS, else 127.0.0.1:7780.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@dataclass(slots=True)
class Globals:
    """Options given before the command."""

    address: str | None = None
    json: bool = False


@dataclass(frozen=True, slots=True)
class Session:
    """One command's way to the server and to standard output."""

    address: str | None
    output: Output

    @classmethod
    def of(cls, context: typer.Context, address: str | None, json: bool) -> Session:
        """Returns the session of a command; its own options go before those given ahead of it."""
        given = context.find_object(Globals) or Globals()
        return cls(address or given.address, Output.to_stdout(json or given.json))

    def client(self) -> AsyncClient:
        """Returns a client for the server; nothing is sent yet."""
        return AsyncClient(self.address, connect_timeout=FIRST_CONTACT)

    def call(self, work: Callable[[AsyncClient], Awaitable[T]]) -> T:
        """Runs ``work`` with a client, to its end."""

        async def run() -> T:
            async with self.client() as client:
                return await work(client)

        return asyncio.run(run())

"""``lessor server``: runs a server, migrates its database, or recovers it."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
import uvloop
from pydantic import ValidationError

from lessor import log
from lessor.errors import InvalidArgument
from lessor.open_files import raise_open_files
from lessor.units import parse_duration
from lessor_server import garbage
from lessor_server import workers as worker_processes
from lessor_server.config import ListenError, ServerSettings
from lessor_server.domain.errors import DatabaseUnavailable, LessorServerError

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="lessor server",
    add_completion=False,
    no_args_is_help=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)

DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        help="postgresql://user:password@host:port/name [env: LESSOR_SERVER_DATABASE_URL]", show_default=False
    ),
]


class StartError(Exception):
    """The server cannot start or go on; the message says why and what to do."""


class Refused(Exception):
    """The command was understood and cannot be carried out as things are; the message says why and what to do."""


def _settings(**flags: Any) -> ServerSettings:
    try:
        settings = ServerSettings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StartError(f"{where}: {first['msg']} (got {first['input']!r})") from None
    if not settings.database_url:
        raise StartError(
            "no database: give --database-url postgresql://user:password@host:port/name, "
            "or set LESSOR_SERVER_DATABASE_URL; `lessor dev` brings its own"
        )
    return settings


@app.callback()
def serve(
    context: typer.Context,
    database_url: DatabaseUrl = None,
    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT; port 0 takes a free one  [default: 127.0.0.1:7780]")
    ] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Listen where other hosts can reach it, without encryption.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Server processes that share the address, each with its own pools  [default: 1]"),
    ] = None,
    pool_size: Annotated[
        int | None, typer.Option(help="Database connections in each of a process's two pools  [default: 10]")
    ] = None,
    keep_jobs_days: Annotated[int | None, typer.Option(help="Keep ended jobs this long  [default: 90]")] = None,
    storm_brake_max: Annotated[
        str | None,
        typer.Option(
            help="Let lease time stand still at most this long while most agents are silent at once; 0: never  "
            "[default: 1m]"
        ),
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="console or json  [default: console]")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error  [default: info]")] = None,
) -> None:
    """Runs a server on a migrated database, until SIGTERM or Ctrl-C."""
    if context.invoked_subcommand is not None:
        return
    settings = _settings(
        database_url=database_url,
        listen=listen,
        insecure=insecure,
        workers=workers,
        pool_size=pool_size,
        keep_jobs_days=keep_jobs_days,
        storm_brake_max=storm_brake_max,
        log_format=log_format,
        log_level=log_level,
    )
    configure_logging(settings)
    if settings.workers > 1:
        asyncio.run(worker_processes.serve(settings))
    else:
        uvloop.run(serve_here(settings))


@app.command("migrate")
def migrate_command(
    database_url: DatabaseUrl = None,
    patience: Annotated[
        str, typer.Option(help="Try again for this long while other sessions hold what it needs")
    ] = "1m",
) -> None:
    """Brings the database to this version's schema. Running servers of the previous version go on.

    It waits for nobody for long, so that nobody waits behind it: it gives way, and tries again.
    """
    from lessor_server.store import migrate

    settings = _settings(database_url=database_url)
    try:
        waits = parse_duration(patience, field="--patience")
    except InvalidArgument as error:
        raise ValueError(str(error)) from None
    schema = migrate.upgrade(settings.database_url, patience=waits)
    typer.echo(f"the database is at schema {schema}")


@app.command("recover")
def recover_command(database_url: DatabaseUrl = None) -> None:
    """Makes a database that lost commits safe to serve. Stop every server first.

    Run it after a fail-over to a standby that was behind, and after a backup was restored, before the first server
    starts: it raises the numbers of leases, sessions and terms above all that agents may still hold. It takes some
    3 s, in which it makes sure that no server is alive. Running it twice, or without need, is harmless.
    """
    from lessor_server.store.recover import RecoveryRefused, recover

    settings = _settings(database_url=database_url)
    try:
        done = asyncio.run(recover(settings.database_url))
    except RecoveryRefused as error:
        raise Refused(str(error)) from None
    typer.echo(str(done))


def configure_logging(settings: ServerSettings) -> None:
    """Sets up logging as the settings say.

    Raises:
        ValueError: Unknown level.
    """
    log.configure(settings.log_format, settings.log_level)
    # It tells on INFO which of its own plugins it has found.
    logging.getLogger("alembic").setLevel(logging.WARNING)


async def serve_here(settings: ServerSettings) -> None:
    """Runs one replica in this process until SIGTERM or SIGINT.

    Prints the line with the address once it listens.

    Raises:
        StartError: A part of it broke.
        Exception: It cannot start; see :meth:`lessor_server.server.Server.start`.
    """
    # Imported here: `lessor server --help` and `migrate` need none of it.
    from lessor_server.server import Server

    raise_open_files()
    server = Server(settings)
    await server.start()
    garbage.settle()
    # Whoever started this process reads the port from here.
    print(f"lessor server listens on {settings.listen.rpartition(':')[0]}:{server.port}", flush=True)
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    waiter = asyncio.create_task(stopped.wait())
    failure = asyncio.create_task(server.failed())
    done, _ = await asyncio.wait({waiter, failure}, return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    failure.cancel()
    broken = failure.exception() if failure in done else None
    if broken is not None:
        # A broken invariant: say what it was and go down; another replica takes over.
        logger.critical("a part of the server failed", exc_info=broken, extra={"event": "failed"})
    await server.stop()
    if broken is not None:
        raise StartError(f"a part of the server failed: {type(broken).__name__}: {broken}")


def main(argv: list[str]) -> int:
    """Runs ``lessor server`` with these arguments. Returns the exit code: 0, 1 (it cannot run) or 2 (usage)."""
    code, message = outcome(lambda: app(args=argv, prog_name="lessor server", standalone_mode=False))
    if message:
        print(f"error: {message}", file=sys.stderr)
    return code


def outcome(run: Callable[[], object]) -> tuple[int, str]:
    """Runs it; returns the exit code, and in one line what went wrong and what to do (empty: nothing did).

    Raises:
        Exception: What nobody expected.
    """
    try:
        run()
    except (StartError, ListenError, ValueError) as error:
        return 2, str(error)
    except Refused as error:
        return 1, str(error)
    except worker_processes.WorkerError as error:
        return error.code, str(error)
    except DatabaseUnavailable as error:
        return 1, (
            f"the database does not answer ({error.details['cause']}): is it running, and is --database-url "
            "(or LESSOR_SERVER_DATABASE_URL) right?"
        )
    except LessorServerError as error:
        return 1, error.message
    except typer.Exit as leave:
        return leave.exit_code, ""
    except typer.Abort:
        return 130, ""
    except Exception as error:
        # Click's usage errors carry their own text and code.
        if hasattr(error, "format_message"):
            return 2, error.format_message()
        raise
    return 0, ""

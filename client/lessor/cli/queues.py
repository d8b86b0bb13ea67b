"""``lessor queues``: list, create, update, pause, resume."""

from __future__ import annotations

from typing import Annotated

import typer

from lessor.cli.output import Output
from lessor.cli.session import Address, Globals, Json, Session
from lessor.errors import InvalidArgument
from lessor.sdk.aio import NO_LIMIT
from lessor.sdk.fleet import Queue

app = typer.Typer(rich_markup_mode=None, add_completion=False)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The queue.", show_default=False)]


@app.callback(invoke_without_command=True)
def queues(context: typer.Context, address: Address = None, json: Json = False) -> None:
    """List queues; with a subcommand, make and change them.

    Example: lessor queues

    Example: lessor queues create night --max-gpus 16
    """
    if context.invoked_subcommand is not None:
        # Options given here hold for the subcommand too.
        given = context.find_object(Globals) or Globals()
        context.obj = Globals(address or given.address, json or given.json)
        return
    session = Session.of(context, address, json)
    found = session.call(lambda client: client.queues())
    if session.output.json:
        session.output.document({"queues": found})
    else:
        session.output.table(
            ("NAME", "STATE", "QUEUED", "RUNNING", "MAX RUNNING", "GPUS", "MAX GPUS"), [_row(queue) for queue in found]
        )


@app.command()
def create(
    context: typer.Context,
    name: Name,
    max_running: Annotated[
        int | None, typer.Option("--max-running", help="Jobs it may run at once. Default: any number.")
    ] = None,
    max_gpus: Annotated[
        int | None, typer.Option("--max-gpus", help="GPUs it may hold at once. Default: any number.")
    ] = None,
    paused: Annotated[bool, typer.Option("--paused", help="Start no job of it yet.")] = False,
    address: Address = None,
    json: Json = False,
) -> None:
    """Make a queue.

    Example: lessor queues create night --max-running 4 --max-gpus 16
    """
    session = Session.of(context, address, json)
    _say(
        session.output,
        session.call(
            lambda client: client.create_queue(name, paused=paused, max_running=max_running, max_gpus=max_gpus)
        ),
    )


@app.command()
def update(
    context: typer.Context,
    name: Name,
    max_running: Annotated[
        str | None, typer.Option("--max-running", metavar="N|none", help="Jobs it may run at once.")
    ] = None,
    max_gpus: Annotated[
        str | None, typer.Option("--max-gpus", metavar="N|none", help="GPUs it may hold at once.")
    ] = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Change the limits of a queue; "none" takes one away.

    Example: lessor queues update night --max-gpus none
    """
    session = Session.of(context, address, json)
    running, gpus = _limit("--max-running", max_running), _limit("--max-gpus", max_gpus)
    if running is None and gpus is None:
        raise InvalidArgument("nothing to change was given", remedy="give --max-running or --max-gpus")
    _say(
        session.output,
        session.call(lambda client: client.update_queue(name, max_running=running, max_gpus=gpus)),
    )


@app.command()
def pause(context: typer.Context, name: Name, address: Address = None, json: Json = False) -> None:
    """Start no more jobs of a queue. What runs goes on.

    Example: lessor queues pause night
    """
    session = Session.of(context, address, json)
    _say(session.output, session.call(lambda client: client.update_queue(name, paused=True)))


@app.command()
def resume(context: typer.Context, name: Name, address: Address = None, json: Json = False) -> None:
    """Start jobs of a paused queue again.

    Example: lessor queues resume night
    """
    session = Session.of(context, address, json)
    _say(session.output, session.call(lambda client: client.update_queue(name, paused=False)))


def _limit(flag: str, text: str | None) -> int | None:
    if text is None:
        return None
    if text.lower() == "none":
        return NO_LIMIT
    if not (text.isascii() and text.isdigit()):
        raise InvalidArgument(violations={flag: f"{text!r} is no limit"}, remedy='give 0 or more, or "none"')
    return int(text)


def _say(output: Output, queue: Queue) -> None:
    if output.json:
        output.document(queue)
    elif output.terminal:
        running = "any number of" if queue.max_running is None else queue.max_running
        gpus = "any number of" if queue.max_gpus is None else queue.max_gpus
        print(f"{queue.name} is {_state(queue)}: {running} running jobs, {gpus} GPUs")
    else:
        output.table((), [_row(queue)])


def _state(queue: Queue) -> str:
    return "paused" if queue.paused else "active"


def _row(queue: Queue) -> tuple[object, ...]:
    return (queue.name, _state(queue), queue.queued, queue.running, queue.max_running, queue.gpus, queue.max_gpus)

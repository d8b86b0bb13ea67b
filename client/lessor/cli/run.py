"""``lessor run`` and ``lessor submit``."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

import typer

from lessor.cli.flags import JobFlags, takes_job_flags
from lessor.cli.follow import INTERRUPTED, Follower, Interrupts
from lessor.cli.screen import JsonView, TextView, View
from lessor.cli.session import Address, Json, Session
from lessor.errors import InvalidArgument
from lessor.sdk.aio import AsyncClient
from lessor.sdk.jobs import Submission
from lessor.sdk.specs import JobSpec

Command = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- CMD [ARG]…", help="Program and arguments; no shell is involved.", show_default=False),
]


@takes_job_flags
def run(
    context: typer.Context,
    flags: JobFlags,
    command: Command = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Run a command as a job: submit it, follow its log, exit with its exit code.

    Ctrl-C asks whether to detach or to cancel; in a pipe it detaches. The exit
    code is the job's own, 128 + the signal that killed it, 1 if it failed
    without one, 130 if it was cancelled or you left.

    Example: lessor run --gpus 1 --memory 4GiB -- python train.py --epochs 3
    """
    session = Session.of(context, address, json)
    spec = flags.spec(_given(command))
    raise typer.Exit(asyncio.run(_run(session, spec)))


async def _run(session: Session, spec: JobSpec) -> int:
    view: View = (
        JsonView(session.output)
        if session.output.json
        else TextView(sys.stdout.buffer, sys.stderr.buffer, live=sys.stderr.isatty())
    )
    interrupts = Interrupts()
    with interrupts.listening():
        async with session.client() as client:
            submitting = asyncio.create_task(client.submit(spec))
            interrupted = asyncio.create_task(interrupts.first.wait())
            try:
                await asyncio.wait({submitting, interrupted}, return_when=asyncio.FIRST_COMPLETED)
                if not submitting.done():
                    view.note("interrupted while submitting; `lessor ps` shows whether the job is there")
                    return INTERRUPTED
                submission = await submitting
            finally:
                submitting.cancel()
                interrupted.cancel()
                await asyncio.gather(submitting, interrupted, return_exceptions=True)
            try:
                view.submitted(submission)
                can_ask = sys.stdin.isatty() and sys.stderr.isatty() and not session.output.json
                return await Follower(client, submission.id, view, interrupts, can_ask=can_ask).follow()
            finally:
                view.close()


@takes_job_flags
def submit(
    context: typer.Context,
    flags: JobFlags,
    command: Command = None,
    file: Annotated[
        str | None,
        typer.Option("--file", "-f", metavar="FILE", help="Job file, YAML or JSON; - is standard input."),
    ] = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Submit a job, or all jobs of a file, and print the ids.

    Once an id is printed, the job survives any crash. The jobs of a file are
    submitted in one transaction: all of them or none.

    Example: lessor submit --queue night --gpus 8 -- torchrun train.py

    Example: lessor submit -f job.yaml
    """
    session = Session.of(context, address, json)
    if file is None:
        specs = [flags.spec(_given(command))]
    else:
        if command or flags:
            extra = "a command" if command else ", ".join(flags.flags())
            raise InvalidArgument(f"-f and {extra} exclude each other", remedy="put it into the file")
        from lessor.jobfile import read_job_file

        specs = read_job_file(file)

    async def work(client: AsyncClient) -> list[Submission]:
        if len(specs) == 1:
            return [await client.submit(specs[0])]
        return await client.submit_many(specs)

    submissions = session.call(work)
    if session.output.json:
        documents = [{"job_id": submission.id, "existing": submission.existing} for submission in submissions]
        session.output.document(documents[0] if file is None else {"jobs": documents})
        return
    for submission in submissions:
        print(submission.id)


def _given(command: list[str] | None) -> list[str]:
    if not command:
        raise InvalidArgument("no command was given", remedy="write it after --: lessor run -- python train.py")
    return command

"""``ps``, ``show``, ``logs``, ``wait``, ``cancel``, ``retry``, ``explain``."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from lessor.cli.flags import pairs
from lessor.cli.output import Output, bytes_text, one_line, span_text, time_text
from lessor.cli.screen import ending_text, log_line
from lessor.cli.session import Address, Json, Session
from lessor.errors import InvalidArgument, JobNotFound
from lessor.sdk.aio import AsyncClient
from lessor.sdk.enums import CancelResult, JobState, LogStream, word
from lessor.sdk.jobs import Attempt, Explained, Explanation, Job
from lessor.timing import DEFAULT_MAX_FAILURES, DEFAULT_MAX_LOSSES
from lessor.units import format_bytes, format_cpu, format_duration, parse_duration

JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.", show_default=False)]
JobIds = Annotated[list[str], typer.Argument(metavar="JOB…", help="The jobs' ids.", show_default=False)]

_SETTLE = timedelta(milliseconds=300)
"""Changes that come together are shown together."""

_IDLE = timedelta(seconds=5)
"""A watched list is read again at least this often: ages move on, and a change between list and watch shows."""


def ps(
    context: typer.Context,
    state: Annotated[
        list[str] | None,
        typer.Option("--state", metavar="STATE", help="queued, leased, running, succeeded, failed or cancelled."),
    ] = None,
    queue: Annotated[str, typer.Option("--queue", help="Of this queue.", show_default=False)] = "",
    label: Annotated[list[str] | None, typer.Option("--label", metavar="K=V", help="With this label.")] = None,
    name: Annotated[str, typer.Option("--name", help="Of exactly this name.", show_default=False)] = "",
    since: Annotated[
        str | None, typer.Option("--since", metavar="DURATION|TIME", help="Submitted since: 2h, 2026-05-01T12:00Z.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many.")] = 50,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on and show changes.")] = False,
    address: Address = None,
    json: Json = False,
) -> None:
    """List jobs, newest first.

    Example: lessor ps --state running --state queued --queue night
    """
    session = Session.of(context, address, json)
    states = [_state(text) for text in state or []]
    labels = pairs("--label", label)
    after = _since(since)

    async def found(client: AsyncClient) -> list[Job]:
        jobs = client.list(states=states, queue=queue, labels=labels, name=name, submitted_after=after, limit=limit)
        return [job async for job in jobs]

    if watch:
        session.call(lambda client: JobList(client, session.output, found, queue, labels).watch())
        return
    jobs = session.call(found)
    if session.output.json:
        session.output.document({"jobs": jobs})
    else:
        session.output.table(COLUMNS, [job_row(job, session.output) for job in jobs], empty="No such jobs.")


def show(context: typer.Context, job: JobId, address: Address = None, json: Json = False) -> None:
    """Show a job: where it stands, its attempts, its error or result, and why it is not running.

    Example: lessor show j00000000001ab
    """
    session = Session.of(context, address, json)

    async def work(client: AsyncClient) -> tuple[Job, list[Attempt], Explained | None]:
        found = await client.get(job)
        pending = found.state in (JobState.QUEUED, JobState.LEASED)
        return found, await client.attempts(job), await client.explain(job) if pending else None

    found, attempts, explained = session.call(work)
    output = session.output
    if output.json:
        explanations = explained.explanations if explained else None
        output.document({"job": found, "attempts": attempts, "explanations": explanations})
        return
    output.fields(_job_fields(found, output))
    if explained is not None:
        output.fields(("waiting", _explanation_text(item)) for item in explained.explanations)
    if found.error is not None and found.error.traceback:
        print(found.error.traceback.rstrip())
    if attempts:
        print()
        output.table(
            ("ATTEMPT", "LEASE", "STATE", "AGENT", "GPUS", "STARTED", "TIME", "EXIT", "LOG", "ERROR"),
            [_attempt_row(attempt, output) for attempt in attempts],
        )


def logs(
    context: typer.Context,
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    tail: Annotated[int, typer.Option("--tail", "-n", min=0, help="Only the last lines.", show_default=False)] = 0,
    attempt: Annotated[
        int, typer.Option("--attempt", min=0, help="Of this attempt. Default: the latest.", show_default=False)
    ] = 0,
    address: Address = None,
    json: Json = False,
) -> None:
    """Print a job's log: its standard output to standard output, its standard error to standard error.

    With --json, one object per chunk: attempt, offset, stream, data, time.

    Example: lessor logs -f --tail 100 j00000000001ab
    """
    session = Session.of(context, address, json)

    async def work(client: AsyncClient) -> None:
        async with aclosing(client.logs(job, attempt=attempt, tail=tail, follow=follow)) as chunks:
            async for chunk in chunks:
                if session.output.json:
                    session.output.line(log_line(chunk))
                else:
                    stream = sys.stderr.buffer if chunk.stream is LogStream.STDERR else sys.stdout.buffer
                    stream.write(chunk.data)
                    stream.flush()

    session.call(work)


def wait(
    context: typer.Context,
    jobs: JobIds,
    timeout: Annotated[
        str | None, typer.Option("--timeout", metavar="DURATION", help="Give up after so long: 10m.")
    ] = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Wait until jobs have ended.

    Exit code 0 if all of them succeeded, 1 if one did not, 124 if the timeout
    passed first.

    Example: lessor wait --timeout 2h j00000000001ab j00000000001ac
    """
    session = Session.of(context, address, json)
    limit = None if timeout is None else parse_duration(timeout, field="--timeout")
    ended = session.call(lambda client: client.wait(jobs, timeout=limit))
    if session.output.json:
        session.output.document({"jobs": ended})
    elif session.output.terminal:
        for found in ended:
            print(one_line(ending_text(found)))
    else:
        session.output.table((), [(found.id, word(found.state), found.exit_status) for found in ended])
    raise typer.Exit(0 if all(found.state is JobState.SUCCEEDED for found in ended) else 1)


_CANCEL_TEXT = {
    CancelResult.CANCELLED: "cancelled",
    CancelResult.REQUESTED: "asked to stop",
    CancelResult.ALREADY_TERMINAL: "had ended before",
    CancelResult.NOT_FOUND: "no such job",
}


def cancel(context: typer.Context, jobs: JobIds, address: Address = None, json: Json = False) -> None:
    """Cancel jobs. A waiting one is cancelled at once, a running one is asked to stop.

    Example: lessor cancel j00000000001ab j00000000001ac
    """
    session = Session.of(context, address, json)
    results = session.call(lambda client: client.cancel(jobs))
    output = session.output
    if output.json:
        output.document({"jobs": [{"job_id": job, "result": result} for job, result in results.items()]})
    elif output.terminal:
        for job, result in results.items():
            print(f"{job}: {_CANCEL_TEXT.get(result, word(result))}")
    else:
        output.table((), [(job, word(result)) for job, result in results.items()])
    unknown = [job for job, result in results.items() if result is CancelResult.NOT_FOUND]
    if unknown:
        raise JobNotFound(f"no such job: {', '.join(unknown)}", remedy="`lessor ps` lists jobs")


def retry(context: typer.Context, job: JobId, address: Address = None, json: Json = False) -> None:
    """Submit an ended job again, as a new job, and print the new id.

    Example: lessor retry j00000000001ab
    """
    session = Session.of(context, address, json)
    submission = session.call(lambda client: client.retry(job))
    if session.output.json:
        session.output.document({"job_id": submission.id, "retry_of": job})
    else:
        print(submission.id)


def explain(context: typer.Context, job: JobId, address: Address = None, json: Json = False) -> None:
    """Tell why a job is not running, in numbers, the deciding reason first.

    Example: lessor explain j00000000001ab
    """
    session = Session.of(context, address, json)
    explained = session.call(lambda client: client.explain(job))
    output = session.output
    if output.json:
        output.document({"job_id": job, "state": explained.state, "explanations": explained.explanations})
    elif output.terminal:
        print(f"{job} is {word(explained.state)}")
        for item in explained.explanations:
            print(f"  {_explanation_text(item)}")
    else:
        rows = [
            (word(item.reason) if item.reason else None, item.message, item.remedy) for item in explained.explanations
        ]
        output.table((), rows)


COLUMNS = ("ID", "STATE", "NAME", "QUEUE", "ATTEMPT", "AGENT", "GPUS", "SUBMITTED", "TIME")


def job_row(job: Job, output: Output) -> tuple[object, ...]:
    """Returns a job's cells under :data:`COLUMNS`."""
    return (
        job.id,
        word(job.state),
        job.spec.name,
        job.spec.queue,
        job.attempt,
        job.agent,
        job.spec.gpus,
        time_text(job.submit_time, terminal=output.terminal),
        _ran(job.start_time, job.end_time, output),
    )


class JobList:
    """A list of jobs that shows changes until it is interrupted."""

    def __init__(
        self,
        client: AsyncClient,
        output: Output,
        found: Callable[[AsyncClient], Awaitable[list[Job]]],
        queue: str,
        labels: Mapping[str, str],
    ) -> None:
        """Takes what reads the list (``found``) and what changes to listen to."""
        self._client = client
        self._output = output
        self._found = found
        self._queue = queue
        self._labels = labels
        self._printed: dict[str, tuple[JobState, int]] = {}

    async def watch(self) -> None:
        """Shows the list, and again whenever a job of it changes; on a terminal in place, else as lines."""
        async with aclosing(self._client.watch(queue=self._queue, labels=self._labels)) as changes:
            upcoming = asyncio.ensure_future(anext(changes))
            try:
                with self._screen() as show:
                    while True:
                        show(await self._found(self._client))
                        await asyncio.wait({upcoming}, timeout=_IDLE.total_seconds())
                        loop = asyncio.get_running_loop()
                        settled = loop.time() + _SETTLE.total_seconds()
                        while upcoming.done():
                            upcoming.result()
                            upcoming = asyncio.ensure_future(anext(changes))
                            await asyncio.wait({upcoming}, timeout=max(0.0, settled - loop.time()))
            finally:
                # The generator can only be closed once nobody waits for its next item.
                upcoming.cancel()
                await asyncio.wait({upcoming})

    @contextmanager
    def _screen(self) -> Iterator[Callable[[list[Job]], None]]:
        """Yields what shows a list."""
        if not self._output.terminal:
            yield self._print
            return
        from rich.console import Console
        from rich.live import Live

        with Live(console=Console(), auto_refresh=False) as live:

            def redraw(jobs: list[Job]) -> None:
                rows = [job_row(job, self._output) for job in jobs]
                live.update(self._output.render(COLUMNS, rows), refresh=True)

            yield redraw

    def _print(self, jobs: list[Job]) -> None:
        """Prints the jobs that changed since the last list, oldest first."""
        for job in reversed(jobs):
            if self._printed.get(job.id) != (job.state, job.attempt):
                self._printed[job.id] = (job.state, job.attempt)
                if self._output.json:
                    self._output.line(job)
                else:
                    self._output.table(COLUMNS, [job_row(job, self._output)])
                    sys.stdout.flush()


def _state(text: str) -> JobState:
    try:
        return JobState[text.upper()]
    except KeyError:
        words = ", ".join(word(state) for state in JobState)
        raise InvalidArgument(violations={"--state": f"{text!r} is no state"}, remedy=f"give one of {words}") from None


def _since(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        with suppress(InvalidArgument):
            return datetime.now(UTC) - parse_duration(text)
        with suppress(ValueError):
            return datetime.fromisoformat(text).astimezone(UTC)
    except OverflowError:
        raise InvalidArgument(violations={"--since": f"{text!r} is before the year 1"}, remedy="leave it out") from None
    raise InvalidArgument(
        violations={"--since": f"{text!r} is neither a duration nor a time"}, remedy="write 2h or 2026-05-01T12:00Z"
    )


def _ran(start: datetime | None, end: datetime | None, output: Output) -> str | None:
    """Returns how long it ran, or has been running."""
    if start is None:
        return None
    span = (end or datetime.now(UTC)) - start
    return span_text(span) if output.terminal else f"{max(0.0, span.total_seconds()):.3f}"


def _explanation_text(item: Explanation) -> str:
    reason = word(item.reason) if item.reason else "unnamed"
    return f"{reason}: {item.message}{f' ({item.remedy})' if item.remedy else ''}"


def _job_fields(job: Job, output: Output) -> list[tuple[str, object]]:
    spec = job.spec
    resources = [
        None if spec.cpu_millis is None else f"cpu {format_cpu(spec.cpu_millis)}",
        f"memory {format_bytes(spec.memory_bytes)}" if spec.memory_bytes else None,
        f"gpus {spec.gpus}" if spec.gpus else None,
        f"model {spec.gpu_model}" if spec.gpu_model else None,
        f"gpu memory {format_bytes(spec.gpu_memory_bytes)}" if spec.gpu_memory_bytes else None,
        *(f"selector {selector}" for selector in spec.to_dict().get("selectors", [])),  # type: ignore[union-attr]
    ]
    timeouts = [
        f"{name} {format_duration(value)}"
        for name, value in (("queue", spec.queue_timeout), ("start", spec.start_timeout), ("run", spec.timeout))
        if value is not None
    ]
    progress = None
    if job.progress is not None:
        parts = [] if job.progress.fraction is None else [f"{job.progress.fraction:.0%}"]
        parts += [job.progress.message] if job.progress.message else []
        parts += [f"{name}={value:.6g}" for name, value in sorted(job.progress.metrics.items())]
        progress = ", ".join(parts) or None
    error = None
    if job.error is not None:
        error = f"{job.error.type}: {job.error.message}" if job.error.message else job.error.type
    return [
        ("id", job.id),
        ("name", spec.name),
        ("state", word(job.state) + (", cancel requested" if job.cancel_requested else "")),
        ("queue", spec.queue),
        ("priority", spec.priority or None),
        ("command", shlex.join(spec.argv)),
        ("runtime", spec.runtime or None),
        ("resources", ", ".join(part for part in resources if part) or None),
        ("labels", ", ".join(f"{key}={value}" for key, value in sorted(spec.labels.items())) or None),
        ("timeouts", ", ".join(timeouts) or None),
        ("attempt", job.attempt),
        ("failures", f"{job.failures} of {spec.max_failures or DEFAULT_MAX_FAILURES}"),
        ("losses", f"{job.losses} of {spec.max_losses or DEFAULT_MAX_LOSSES}"),
        ("retry of", job.retry_of),
        ("submitted", time_text(job.submit_time, terminal=output.terminal)),
        ("started", time_text(job.start_time, terminal=output.terminal)),
        ("ended", time_text(job.end_time, terminal=output.terminal)),
        ("not before", time_text(job.not_before, terminal=output.terminal)),
        ("agent", job.agent),
        ("lease", job.lease_id),
        ("gpus", ", ".join(job.gpu_uuids) or None),
        ("last outcome", word(job.outcome) if job.outcome else None),
        ("exit code", job.exit_code),
        ("signal", job.signal),
        ("error", error),
        ("progress", progress),
        ("result", job.result_json.decode(errors="replace") or None),
    ]


def _attempt_row(attempt: Attempt, output: Output) -> tuple[object, ...]:
    standing = attempt.outcome or attempt.phase
    log = bytes_text(attempt.log_bytes) if output.terminal else attempt.log_bytes
    truncated = f"{log} (cut)" if attempt.logs_truncated_at is not None and output.terminal else log
    return (
        attempt.attempt,
        attempt.lease_id,
        word(standing) if standing else None,
        attempt.agent,
        len(attempt.gpu_uuids),
        time_text(attempt.start_time, terminal=output.terminal),
        _ran(attempt.start_time, attempt.end_time, output),
        f"signal {attempt.signal}" if attempt.signal else attempt.exit_code,
        truncated,
        attempt.error.message or attempt.error.type if attempt.error else None,
    )

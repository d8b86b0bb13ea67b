"""What ``lessor run`` shows: logs on their own streams, news and a progress bar on standard error; or JSON lines."""

from __future__ import annotations

import shutil
import signal
from datetime import UTC, datetime
from io import StringIO
from typing import BinaryIO, Protocol

from lessor.cli.output import Output, one_line, span_text
from lessor.sdk.enums import JobState, LogStream, word
from lessor.sdk.jobs import Explained, Job, LogChunk, Progress, Submission

_ERASE_LINE = b"\r\x1b[2K"
_BAR_WIDTH = 30


class View(Protocol):
    """Receives what happens to the job that is followed."""

    def submitted(self, submission: Submission) -> None:
        """The job is there."""

    def log(self, chunk: LogChunk) -> None:
        """It wrote something."""

    def changed(self, job: Job) -> None:
        """It moved to another state or attempt."""

    def progressed(self, job_id: str, progress: Progress) -> None:
        """It told its progress."""

    def explained(self, job_id: str, explained: Explained) -> None:
        """It waits, and this is why."""

    def ended(self, job: Job) -> None:
        """It is over."""

    def note(self, text: str) -> None:
        """Tells people something."""

    def close(self) -> None:
        """Leaves the screen as it should stay."""


class TextView:
    """For people and pipes."""

    def __init__(self, out: BinaryIO, err: BinaryIO, *, live: bool) -> None:
        """Takes the two streams; ``live``: standard error is a terminal that can show a bar."""
        self._out = out
        self._err = err
        self._live = live
        self._progress: Progress | None = None
        self._began = datetime.now(UTC)
        self._drawn = False
        self._at_line_start = True

    def submitted(self, submission: Submission) -> None:
        """Says the id."""
        self.note(f"job {submission.id}{' (submitted before)' if submission.existing else ''}")

    def log(self, chunk: LogChunk) -> None:
        """Writes the bytes, unchanged, where the job wrote them."""
        self._erase()
        target = self._err if chunk.stream is LogStream.STDERR else self._out
        target.write(chunk.data)
        target.flush()
        self._at_line_start = chunk.data.endswith((b"\n", b"\r"))
        self._draw()

    def changed(self, job: Job) -> None:
        """Says where it runs, or why it waits again."""
        if job.state is JobState.RUNNING:
            self._began = job.start_time or self._began
            self.note(f"attempt {job.attempt} runs on {job.agent}")
        elif job.state is JobState.QUEUED and job.attempt:
            self._progress = None
            outcome = word(job.outcome) if job.outcome else "over"
            why = f": {job.error.message}" if job.error and job.error.message else ""
            self.note(f"attempt {job.attempt} is {outcome}{why}; the job waits to run again")

    def progressed(self, job_id: str, progress: Progress) -> None:
        """Moves the bar."""
        self._progress = progress
        self._draw()

    def explained(self, job_id: str, explained: Explained) -> None:
        """Says what it waits for."""
        first = explained.explanations[0] if explained.explanations else None
        if first is not None:
            self.note(f"waiting: {first.message}{f' ({first.remedy})' if first.remedy else ''}")

    def ended(self, job: Job) -> None:
        """Says how it ended."""
        self._progress = None
        self.note(ending_text(job))

    def note(self, text: str) -> None:
        """Writes a line of our own to standard error."""
        self._erase()
        if not self._at_line_start:
            self._err.write(b"\n")
        self._err.write(f"lessor: {one_line(text)}\n".encode(errors="replace"))
        self._err.flush()
        self._at_line_start = True
        self._draw()

    def close(self) -> None:
        """Takes the bar away."""
        self._progress = None
        self._erase()
        self._err.flush()

    def _erase(self) -> None:
        if self._drawn:
            self._err.write(_ERASE_LINE)
            self._err.flush()
            self._drawn = False

    def _draw(self) -> None:
        """Draws the bar, but never into a line that a job has not finished."""
        if not self._live or self._progress is None or not self._at_line_start:
            return
        width = max(20, shutil.get_terminal_size().columns - 1)
        line = bar_text(self._progress, span_text(datetime.now(UTC) - self._began), width)
        self._err.write(_ERASE_LINE + line.encode(errors="replace"))
        self._err.flush()
        self._drawn = True


class JsonView:
    """For programs: one JSON object per line on standard output, each with a ``type``."""

    def __init__(self, output: Output) -> None:
        """Takes the output in its JSON form."""
        self._output = output

    def submitted(self, submission: Submission) -> None:
        """``{"type": "submitted", "job_id", "existing"}``."""
        self._output.line({"type": "submitted", "job_id": submission.id, "existing": submission.existing})

    def log(self, chunk: LogChunk) -> None:
        """``{"type": "log", "attempt", "offset", "stream", "data", "time"}``."""
        self._output.line({"type": "log", **log_line(chunk)})

    def changed(self, job: Job) -> None:
        """``{"type": "state", "job_id", "state", "attempt", "agent"}``."""
        self._output.line(
            {"type": "state", "job_id": job.id, "state": job.state, "attempt": job.attempt, "agent": job.agent}
        )

    def progressed(self, job_id: str, progress: Progress) -> None:
        """``{"type": "progress", "job_id", "fraction", "message", "metrics"}``."""
        self._output.line(
            {
                "type": "progress",
                "job_id": job_id,
                "fraction": progress.fraction,
                "message": progress.message,
                "metrics": progress.metrics,
            }
        )

    def explained(self, job_id: str, explained: Explained) -> None:
        """``{"type": "pending", "job_id", "state", "explanations"}``."""
        self._output.line(
            {
                "type": "pending",
                "job_id": job_id,
                "state": explained.state,
                "explanations": explained.explanations,
            }
        )

    def ended(self, job: Job) -> None:
        """``{"type": "ended", "job"}``."""
        self._output.line({"type": "ended", "job": job})

    def note(self, text: str) -> None:
        """``{"type": "note", "message"}``."""
        self._output.line({"type": "note", "message": text})

    def close(self) -> None:
        """Nothing stays."""


def log_line(chunk: LogChunk) -> dict[str, object]:
    """Returns a chunk for JSON lines. Data that is no UTF-8 by itself comes as ``{"base64": …}``."""
    return {
        "attempt": chunk.attempt,
        "offset": chunk.offset,
        "stream": chunk.stream,
        "data": chunk.data,
        "time": chunk.time,
    }


def ending_text(job: Job) -> str:
    """Returns one line about how a terminal job ended."""
    took = f" after {span_text(job.end_time - job.start_time)}" if job.end_time and job.start_time else ""
    text = f"job {job.id} {'was ' if job.state is JobState.CANCELLED else ''}{word(job.state)}{took}"
    if job.state is JobState.FAILED:
        if job.error is not None and job.error.message:
            text += f": {job.error.message}"
        elif job.signal:
            text += f": killed by {_signal_name(job.signal)}"
        elif job.exit_code is not None:
            text += f": exit code {job.exit_code}"
    return text


def bar_text(progress: Progress, elapsed: str, width: int) -> str:
    """Returns the bar as terminal text of at most ``width`` columns."""
    # Loaded here, as it takes longer than anything else that a pipe needs.
    from rich.console import Console
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    buffer = StringIO()
    console = Console(file=buffer, force_terminal=True, width=width, highlight=False, legacy_windows=False)
    grid = Table.grid(padding=(0, 1))
    cells: list[Text | ProgressBar] = []
    left = width
    if progress.fraction is not None:
        bar_width = min(_BAR_WIDTH, width // 3)
        cells.append(ProgressBar(total=1.0, completed=progress.fraction, width=bar_width))
        cells.append(Text(f"{progress.fraction:4.0%}", style="bold"))
        left -= bar_width + 1 + 5 + 1
    cells.append(Text(elapsed))
    left -= len(elapsed) + 1
    details = [f"{name} {value:.4g}" for name, value in progress.metrics.items()]
    if progress.message:
        details.insert(0, one_line(progress.message))
    text = Text("  ".join(details))
    # What the job says gives way to a narrow terminal, not how far it is.
    text.truncate(max(0, left), overflow="ellipsis")
    cells.append(text)
    for _ in cells:
        grid.add_column(no_wrap=True)
    grid.add_row(*cells)
    console.print(grid, end="")
    return buffer.getvalue().rstrip("\n")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

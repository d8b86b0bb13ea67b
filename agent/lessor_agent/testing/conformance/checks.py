"""The checks: what a runtime promises, each with an id that stays.

An id is what reports and tables know a check by: it is never given another
meaning. A check that is not needed any more goes, and its id with it.
"""

from __future__ import annotations

from enum import Enum, StrEnum


class Topic(StrEnum):
    """What a check is about."""

    EXIT = "how it ended"
    OUTPUT = "output"
    ENVIRONMENT = "what it is started with"
    START = "starting"
    STOP = "stopping"
    DEADLINE = "deadlines"
    ADOPTION = "agent restarts"
    EVENTS = "events"


class Check(Enum):
    """A promise, and the test that holds a runtime to it: ``test_exit_code`` for ``exit-code``."""

    EXIT_CODE = ("exit-code", Topic.EXIT, "The exit code is told as it was: 0, 7, 255")
    EXIT_SIGNAL = ("exit-signal", Topic.EXIT, "Death by a signal is told as that signal, without an exit code")
    EXIT_TIMES = ("exit-times", Topic.EXIT, "It began after `begin` was asked for and ended after it began, in UTC")
    WAIT_AGAIN = ("wait-again", Topic.EXIT, "`wait` answers several tasks, and again after the end, with the same")
    START_ERROR_MISSING = (
        "start-error-missing",
        Topic.EXIT,
        "A program that does not exist is a `start_error`, no exit code; `begin` is false",
    )
    START_ERROR_PERMISSION = (
        "start-error-permission",
        Topic.EXIT,
        "A file that may not be executed is a `start_error`, no exit code; `begin` is false",
    )
    START_ERROR_DIRECTORY = (
        "start-error-directory",
        Topic.EXIT,
        "A working directory that does not exist is a `start_error`, no exit code; `begin` is false",
    )

    OUTPUT_APART = ("output-apart", Topic.OUTPUT, "stdout and stderr arrive apart, each in order")
    OUTPUT_BINARY = (
        "output-binary",
        Topic.OUTPUT,
        "Every byte arrives as it was: NUL, invalid UTF-8, CR, no newline at the end",
    )
    OUTPUT_LARGE = ("output-large", Topic.OUTPUT, "100 MB of output arrive whole by the time `wait` returns")
    OUTPUT_LIVE = ("output-live", Topic.OUTPUT, "Output arrives while the job runs")
    OUTPUT_FILES = ("output-files", Topic.OUTPUT, "The output files exist, empty, from `prepare` on")
    STDIN_EMPTY = ("stdin-empty", Topic.OUTPUT, "There is nothing on standard input: it ends at once")

    ARGV = (
        "argv",
        Topic.ENVIRONMENT,
        "Arguments arrive byte for byte: empty, spaces, quotes, newlines, wildcards, Unicode",
    )
    ENV_OF_JOB = ("env-of-job", Topic.ENVIRONMENT, "The job's own variables arrive byte for byte")
    ENV_OF_LESSOR = (
        "env-of-lessor",
        Topic.ENVIRONMENT,
        "`LESSOR_JOB_ID`, `_ATTEMPT`, `_FENCING_TOKEN`, `_EVENTS`, `_CANCEL` are there, and the job cannot forge them",
    )
    ENV_OF_HOST = ("env-of-host", Topic.ENVIRONMENT, "Variables of the agent's host arrive if allow-listed, else not")
    ENV_NO_CREDENTIALS = (
        "env-no-credentials",
        Topic.ENVIRONMENT,
        "The agent's `LESSOR_*` settings and credentials do not reach a job, whatever is allow-listed",
    )
    CHECKPOINT = (
        "checkpoint",
        Topic.ENVIRONMENT,
        "The checkpoint cursor, up to 64 KiB, is in `LESSOR_CHECKPOINT`; without one the variable is not set",
    )
    WORKING_DIR_GIVEN = ("working-dir-given", Topic.ENVIRONMENT, "It runs in the working directory that the job names")
    WORKING_DIR_FRESH = ("working-dir-fresh", Topic.ENVIRONMENT, "Else each attempt has an empty directory of its own")
    GPUS = ("gpus", Topic.ENVIRONMENT, "The attempt's GPUs are named by UUID, in order, and the job cannot widen that")
    NO_GPUS = ("no-gpus", Topic.ENVIRONMENT, "A job without GPUs is told an empty list, not none")
    USER = ("user", Topic.ENVIRONMENT, "It runs as the user asked for; refused where the runtime cannot do that")
    USER_UNKNOWN = ("user-unknown", Topic.ENVIRONMENT, "A user that does not exist is refused")

    PREPARE_RUNS_NOTHING = ("prepare-runs-nothing", Topic.START, "Nothing of the job runs before `begin`")
    PREPARE_ONCE = ("prepare-once", Topic.START, "Two starts of one lease at once are one execution")
    PREPARE_AGAIN = (
        "prepare-again",
        Topic.START,
        "A start that a crash has made forget is one execution with the start that repeats it",
    )
    PREPARE_ENDED = ("prepare-ended", Topic.START, "A lease that has run does not run again when it is started again")
    BEGIN_TWICE = ("begin-twice", Topic.START, "`begin` again, also at the same time, changes nothing")
    START_REFUSED = ("start-refused", Topic.START, "What is refused (no program, NUL in an argument) leaves nothing")
    MANY_AT_ONCE = ("many-at-once", Topic.START, "20 leases started at once keep apart: exit codes and output")

    STOP_COOPERATIVE = (
        "stop-cooperative",
        Topic.STOP,
        "A stop is SIGTERM with the cancel file there, and what the job then makes of it counts",
    )
    STOP_FORCED = ("stop-forced", Topic.STOP, "What does not end is killed after the grace, not before")
    STOP_TREE = (
        "stop-tree",
        Topic.STOP,
        "When the end is told the whole tree is gone, children in other sessions included",
    )
    STOP_SHORTENS = ("stop-shortens", Topic.STOP, "A second stop can only shorten the grace")
    STOP_CAUSE = ("stop-cause", Topic.STOP, "The first cause of a stop is kept")
    STOP_BEFORE_BEGIN = ("stop-before-begin", Topic.STOP, "Stopped before `begin`, it never runs")
    STOP_ENDED = ("stop-ended", Topic.STOP, "A stop or a renewal after the end changes nothing")
    LEFTOVERS = ("leftovers", Topic.STOP, "What the main process leaves running is ended before the end is told")
    RUN_TIMEOUT = ("run-timeout", Topic.STOP, "The run timeout ends it, counted from its begin, and is told as cause")

    DEADLINE_STOP = ("deadline-stop", Topic.DEADLINE, "Not renewed, the whole tree is gone by the deadline")
    DEADLINE_ALONE = ("deadline-alone", Topic.DEADLINE, "That holds without an agent, too")
    DEADLINE_UNBEGUN = ("deadline-unbegun", Topic.DEADLINE, "Prepared and never begun, it ends by the deadline unrun")
    DEADLINE_RENEWED = ("deadline-renewed", Topic.DEADLINE, "A renewal keeps it until the new deadline, and no longer")
    RENEW_NEVER_BACK = ("renew-never-back", Topic.DEADLINE, "A renewal never moves the deadline back")
    DEADLINE_CONTINUE = ("deadline-continue", Topic.DEADLINE, "With `continue` it runs on past the deadline")
    DEADLINE_FREEZE = (
        "deadline-freeze",
        Topic.DEADLINE,
        "With `freeze` the whole tree stands still by the deadline, and goes on after a renewal",
    )
    FROZEN_STOP = ("frozen-stop", Topic.DEADLINE, "What is stopped while it stands still is killed as it stands")

    HANDLE_JSON = ("handle-json", Topic.ADOPTION, "A handle that was written as JSON and read again finds it")
    ADOPT_RUNNING = (
        "adopt-running",
        Topic.ADOPTION,
        "Adopted while it runs, it goes on as if nothing was, its output complete",
    )
    ADOPT_ENDED = ("adopt-ended", Topic.ADOPTION, "Ended while there was no agent, its end and output are told")
    ADOPT_PREPARED = ("adopt-prepared", Topic.ADOPTION, "Prepared and not begun, it waits for `begin` of a next agent")
    ADOPT_STOPPED = ("adopt-stopped", Topic.ADOPTION, "An adopted one can be renewed and stopped")
    ADOPT_VANISHED = ("adopt-vanished", Topic.ADOPTION, "One of which nothing is left is told as `ExecutionVanished`")
    ADOPT_UNKNOWN = ("adopt-unknown", Topic.ADOPTION, "So is one that never was, and a handle of another runtime")
    STRAYS = ("strays", Topic.ADOPTION, "`strays` finds each execution that is not forgotten: prepared, running, ended")
    STRAYS_APART = ("strays-apart", Topic.ADOPTION, "Those of another agent's state directory are none of its strays")
    FORGET = ("forget", Topic.ADOPTION, "`forget` removes all of it, may be called twice, and then it has vanished")

    EVENTS_EXACT = (
        "events-exact",
        Topic.EVENTS,
        "Progress, metrics, checkpoints, results and errors arrive byte for byte and in order",
    )
    EVENTS_LIVE = ("events-live", Topic.EVENTS, "Events arrive while the job runs")

    def __init__(self, id: str, topic: Topic, promise: str) -> None:
        self.id = id
        self.topic = topic
        self.promise = promise
        """One line of Markdown without a full stop."""

"""The command ``lessor``.

Exit codes: 0 done; 1 an error; 2 wrong usage or a wrong value; 3 no such job,
queue or agent; 4 the server cannot be reached or cannot answer now; 124 a wait
timed out; 130 interrupted; 141 the reader of the output went away. ``lessor
run`` exits with the job's own exit code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from lessor import __version__
from lessor.cli import external, fleet, jobs, queues, run, streams
from lessor.cli.follow import INTERRUPTED
from lessor.cli.output import Output, one_line
from lessor.cli.session import Address, Globals, Json
from lessor.errors import InvalidArgument, LessorError, NotFound, Unavailable, WaitTimeout

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_NOT_FOUND = 3
EXIT_UNAVAILABLE = 4
EXIT_TIMEOUT = 124
EXIT_PIPE = 141

_UsageFault: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""What the parser raises; typer brings its own copy of click from some version on."""


def exit_code_of(error: LessorError) -> int:
    """Returns the exit code of a command that failed with ``error``."""
    match error:
        case InvalidArgument():
            return EXIT_USAGE
        case NotFound():
            return EXIT_NOT_FOUND
        case Unavailable():
            return EXIT_UNAVAILABLE
        case WaitTimeout():
            return EXIT_TIMEOUT
        case _:
            return EXIT_ERROR


class LessorGroup(TyperGroup):
    """The top of the commands: dispatches those of other parts, and turns every error into one line."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs the command line ``args`` (default: the process's) and exits with its code."""
        argv = list(sys.argv[1:] if args is None else args)
        try:
            code = self._run(argv, prog_name or "lessor", complete_var, windows_expand_args, extra)
            # Here and not at exit, where Python's own flush would print a traceback.
            sys.stdout.flush()
        except BrokenPipeError:
            streams.discard(sys.stdout)
            code = EXIT_PIPE
        except OSError as error:
            if not streams.is_full(error):
                raise
            streams.discard(sys.stdout)
            streams.complain(f"error: the output cannot be written: {error.strerror}")
            code = EXIT_ERROR
        if not standalone_mode:
            return code
        sys.exit(code)

    def _run(
        self, argv: list[str], prog_name: str, complete_var: str | None, expand: bool, extra: dict[str, Any]
    ) -> int:
        try:
            # Before any parsing: their arguments are theirs.
            if argv and not argv[0].startswith("-") and argv[0] not in self.commands and argv[0] in external.names():
                return external.run(argv[0], argv[1:])
            result = super().main(
                args=argv,
                prog_name=prog_name,
                complete_var=complete_var,
                standalone_mode=False,
                windows_expand_args=expand,
                **extra,
            )
            return result if isinstance(result, int) else 0
        except LessorError as error:
            streams.complain(f"error: {one_line(error)}")
            return exit_code_of(error)
        except _UsageFault as error:
            return _usage(error)
        except (KeyboardInterrupt, typer.Abort):
            streams.complain("interrupted")
            return INTERRUPTED

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Runs the parsed command; an interrupt or a reader gone away is an exit code, no traceback."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # A second write at exit must not complain either.
            streams.discard(sys.stdout)
            raise typer.Exit(EXIT_PIPE) from None
        except KeyboardInterrupt:
            streams.complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        return result

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Lists Lessor's own commands, then those of other parts."""
        return [*super().list_commands(ctx), *external.names()]

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        """Returns a command; one of another part only so that it is listed and completed."""
        command = super().get_command(ctx, cmd_name)
        if command is None and cmd_name in external.names():
            return _listed(cmd_name)
        return command


def _listed(name: str) -> Any:
    """Returns a stand-in for a command of another part, for help and completion."""
    listing = typer.Typer(rich_markup_mode=None, add_completion=False)

    @listing.command(
        name=name,
        help=external.help_of(name),
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    )
    def stand_in(context: typer.Context) -> None:
        raise InvalidArgument(f"options of {name!r} come after it", remedy=f"write lessor {name} …")

    return typer.main.get_command(listing)


def _usage(error: Exception) -> int:
    """Prints a mistake in the command line as one line and returns its exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return EXIT_USAGE
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "lessor"
    message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
    streams.complain(f"error: {one_line(message)}{_value_given(error)} (see `{path} --help`)")
    return EXIT_USAGE


def _value_given(error: Exception) -> str:
    """Returns ``, not 'two'`` for a value that typer checked with pydantic, whose message leaves the value out."""
    errors = getattr(error.__cause__, "errors", None)
    if errors is None:
        return ""
    shown = repr(errors()[0]["input"])
    return f", not {shown if len(shown) <= 100 else shown[:97] + '...'}"


app = typer.Typer(
    cls=LessorGroup,
    name="lessor",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def top(context: typer.Context, address: Address = None, json: Json = False) -> None:
    """Lessor leases GPUs to jobs.

    Start with `lessor dev` on this machine, then `lessor run -- python train.py`.

    Exit codes: 0 done, 1 an error, 2 a wrong option or value, 3 no such job, queue
    or agent, 4 the server cannot be reached or cannot answer now, 124 a wait timed
    out, 130 interrupted. `lessor run` exits with the job's own exit code.
    """
    context.obj = Globals(address, json)
    if context.invoked_subcommand is None:
        print(context.get_help())


def version(context: typer.Context, json: Json = False) -> None:
    """Print the version of this client.

    Example: lessor version
    """
    given = context.find_object(Globals)
    output = Output.to_stdout(json or (given is not None and given.json))
    if output.json:
        output.document({"version": __version__})
    else:
        print(f"lessor {__version__}")


_UNPARSED = {"allow_interspersed_args": False}
"""What follows the first word that is no flag belongs to the job."""

app.command(context_settings=_UNPARSED)(run.run)
app.command(context_settings=_UNPARSED)(run.submit)
app.command()(jobs.ps)
app.command()(jobs.show)
app.command()(jobs.logs)
app.command()(jobs.wait)
app.command()(jobs.cancel)
app.command()(jobs.retry)
app.command()(jobs.explain)
app.command()(fleet.agents)
app.command()(fleet.drain)
app.command()(fleet.undrain)
app.add_typer(queues.app, name="queues")
app.command()(version)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``lessor`` with ``argv`` (default: the process's) and returns the exit code."""
    streams.open_missing()
    code = typer.main.get_command(app).main(args=argv, prog_name="lessor", standalone_mode=False)
    return code if isinstance(code, int) else 0

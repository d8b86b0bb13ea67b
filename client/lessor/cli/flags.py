"""The flags that describe a job, shared by ``run`` and ``submit``."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from lessor.errors import InvalidArgument
from lessor.sdk.specs import JobSpec

_RESOURCES = "What it needs"
_POLICY = "Retries, timeouts, lease"


def _flag(name: str, help: str, *, panel: str | None = None, metavar: str | None = None) -> Any:
    return typer.Option(name, help=help, rich_help_panel=panel, metavar=metavar, show_default=False)


def _job_flags(
    name: Annotated[str | None, _flag("--name", "A name for people. Default: the program's.")] = None,
    queue: Annotated[str | None, _flag("--queue", 'Its queue. Default: "default".')] = None,
    label: Annotated[list[str] | None, _flag("--label", "To find it by; again for more.", metavar="K=V")] = None,
    env: Annotated[
        list[str] | None,
        _flag("--env", "Environment variable; K alone takes it from here. Again for more.", metavar="K=V"),
    ] = None,
    workdir: Annotated[str | None, _flag("--workdir", "Absolute path on the agent's host.")] = None,
    user: Annotated[str | None, _flag("--user", "User on the agent's host.")] = None,
    runtime: Annotated[str | None, _flag("--runtime", 'What runs it. Default: "process".')] = None,
    priority: Annotated[int | None, _flag("--priority", "-1000 to 1000, higher first. Default: 0.")] = None,
    cpu: Annotated[str | None, _flag("--cpu", 'Cores: 2, 0.25, 500m. Default: "1".', panel=_RESOURCES)] = None,
    memory: Annotated[str | None, _flag("--memory", "Host memory: 4GiB, 512M.", panel=_RESOURCES)] = None,
    gpus: Annotated[int | None, _flag("--gpus", "Whole GPUs. Default: 0.", panel=_RESOURCES)] = None,
    gpu_model: Annotated[str | None, _flag("--gpu-model", "Part of the model's name: H200.", panel=_RESOURCES)] = None,
    gpu_memory: Annotated[
        str | None, _flag("--gpu-memory", "Least memory of each GPU: 80GiB.", panel=_RESOURCES)
    ] = None,
    selector: Annotated[
        list[str] | None,
        _flag(
            "--selector",
            'On agents\' labels: "zone=a", "!spot", "zone in (a,b)"; again for more.',
            panel=_RESOURCES,
            metavar="SELECTOR",
        ),
    ] = None,
    max_failures: Annotated[
        int | None, _flag("--max-failures", "Failures until it is FAILED. Default: 1, no retry.", panel=_POLICY)
    ] = None,
    max_losses: Annotated[
        int | None, _flag("--max-losses", "Lost hosts until it is FAILED. Default: 10.", panel=_POLICY)
    ] = None,
    backoff: Annotated[
        str | None, _flag("--backoff", "Before the first retry; doubles: 30s. Default: 1s.", panel=_POLICY)
    ] = None,
    timeout: Annotated[str | None, _flag("--timeout", "From running to the end: 2h.", panel=_POLICY)] = None,
    queue_timeout: Annotated[
        str | None, _flag("--queue-timeout", "From submit to the first grant.", panel=_POLICY)
    ] = None,
    start_timeout: Annotated[str | None, _flag("--start-timeout", "From a grant to running.", panel=_POLICY)] = None,
    ttl: Annotated[
        str | None, _flag("--ttl", "How long its lease stands without a renewal. Default: 60s.", panel=_POLICY)
    ] = None,
    grace: Annotated[str | None, _flag("--grace", "From SIGTERM to SIGKILL. Default: 10s.", panel=_POLICY)] = None,
    on_lease_lost: Annotated[
        str | None,
        _flag(
            "--on-lease-lost",
            "Then freeze, stop or continue. Default: freeze where its runtime can.",
            panel=_POLICY,
        ),
    ] = None,
    dedupe_key: Annotated[
        str | None, _flag("--dedupe-key", "A live or succeeded job with this key answers instead.", panel=_POLICY)
    ] = None,
) -> None:
    """Only its parameters matter."""


_FLAGS = [
    parameter.replace(annotation=get_type_hints(_job_flags, include_extras=True)[name])
    for name, parameter in inspect.signature(_job_flags).parameters.items()
]

_FIELDS = {"label": "labels", "workdir": "working_dir", "selector": "selectors"}
"""Flag → field of the job, where they differ."""
_FLAG_OF = {field: flag for flag, field in _FIELDS.items()}


class JobFlags(dict[str, Any]):
    """The job flags that were given: field of the job → value."""

    def spec(self, command: list[str]) -> JobSpec:
        """Returns the job of ``command`` with these flags.

        Raises:
            InvalidArgument: A value is wrong; named by its flag.
        """
        try:
            return JobSpec.from_dict({"command": command, **self})
        except InvalidArgument as error:
            violations = {_flag_of(field): text for field, text in error.violations.items()}
            raise InvalidArgument(violations=violations, remedy=error.remedy) from None

    def flags(self) -> list[str]:
        """Returns the flags that were given, as written on the command line."""
        return [_flag_of(field) for field in self]


def takes_job_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a typer command the job flags; it receives them as its argument ``flags``."""

    @wraps(command)
    def with_flags(**values: Any) -> None:
        given: dict[str, Any] = {}
        for parameter in _FLAGS:
            value = values.pop(parameter.name)
            if value is not None and value != []:
                given[_FIELDS.get(parameter.name, parameter.name)] = value
        for field in ("labels", "env"):
            if field in given:
                given[field] = _pairs(_flag_of(field), given[field], from_environment=field == "env")
        command(flags=JobFlags(given), **values)

    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "flags"
    ]
    flags = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in _FLAGS]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    with_flags.__signature__ = inspect.Signature([*parameters, *flags])  # type: ignore[attr-defined]
    with_flags.__annotations__ = {parameter.name: parameter.annotation for parameter in [*parameters, *flags]}
    del with_flags.__wrapped__
    return with_flags


def pairs(flag: str, texts: list[str] | None) -> dict[str, str]:
    """Returns what a repeated ``K=V`` flag gives.

    Raises:
        InvalidArgument: One is not of that form.
    """
    return _pairs(flag, texts or [], from_environment=False)


def _pairs(flag: str, texts: list[str], *, from_environment: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals and from_environment and key in os.environ:
            value = os.environ[key]
        elif not equals or not key:
            why = f"{text!r} is not set here" if from_environment and key else f"{text!r} has no key or no value"
            raise InvalidArgument(violations={flag: why}, remedy=f"write {flag} KEY=VALUE")
        found[key] = value
    return found


def _flag_of(field: str) -> str:
    """Returns the flag that gives ``field`` (``memory``, ``selectors[0]``, ``env.X``), or which word of CMD."""
    base = field.partition("[")[0].partition(".")[0]
    if base == "command":
        return "CMD" + field.removeprefix("command").replace("[0]", "")
    return "--" + _FLAG_OF.get(base, base).replace("_", "-")

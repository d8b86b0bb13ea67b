"""The agent's configuration: command line first, then ``LESSOR_AGENT_*`` variables, then defaults."""

from __future__ import annotations

import argparse
import re
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from lessor import timing
from lessor.address import Address, parse_address, resolve_address
from lessor.log import LEVELS, LogFormat
from lessor.units import parse_bytes, parse_cpu, parse_duration

DEFAULT_ENV_ALLOW = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_*", "TZ", "TMPDIR", "LD_LIBRARY_PATH")
"""Host variables that every job sees."""

MIN_HEARTBEAT = timedelta(milliseconds=100)
MAX_HEARTBEAT = timedelta(seconds=300)

_LABEL_KEY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")
_ENV_RULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?|\*")


class ConfigError(ValueError):
    """A setting is wrong; the message is one line that says which, and what to write."""


class AgentConfig(BaseSettings):
    """Settings of ``lessor agent``."""

    model_config = SettingsConfigDict(env_prefix="LESSOR_AGENT_", frozen=True, extra="forbid")

    state_dir: Path
    """Where journal, keepers and output files live. One agent each."""
    address: Annotated[Address, NoDecode] = Field(default_factory=resolve_address)
    """The server. Default: LESSOR_ADDRESS, else 127.0.0.1:7780."""
    name: str = Field(default_factory=socket.gethostname, min_length=1, max_length=128)
    """For people. Default: the host's name."""
    heartbeat: Annotated[timedelta, NoDecode] = timing.DEFAULT_HEARTBEAT_INTERVAL
    """Between two renewals: 100 ms … 5 min, at most a quarter of the shortest ttl to be run here."""
    labels: Annotated[dict[str, str], NoDecode] = Field(default_factory=dict, max_length=256)
    """What selectors match; as a variable ``key=value,key=value``."""
    cpu: Annotated[int | None, NoDecode] = None
    """Milli-CPUs to lease. Default: all this process may use."""
    memory: Annotated[int | None, NoDecode] = None
    """Bytes of memory to lease. Default: all this process may use."""
    fake_gpus: int | None = Field(default=None, ge=0, le=1024)
    """Lease this many GPUs that do not exist, instead of the real ones."""
    env_allow: Annotated[tuple[str, ...], NoDecode] = ()
    """Host variables that jobs see beside :data:`DEFAULT_ENV_ALLOW`; a final ``*`` matches any rest."""
    on_exit: Literal["keep", "stop"] = "keep"
    """What becomes of running jobs when the agent is told to stop: they go on under their keepers, or end with it."""
    insecure: bool = False
    """Connect without TLS to a server that is not on this host."""
    log_format: LogFormat = "console"
    log_level: str = "info"

    @field_validator("state_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("address", mode="before")
    @classmethod
    def _address(cls, value: Any) -> Any:
        return parse_address(value) if isinstance(value, str) else value

    @field_validator("heartbeat", mode="before")
    @classmethod
    def _heartbeat(cls, value: Any) -> timedelta:
        heartbeat = parse_duration(value, field="heartbeat")
        if not MIN_HEARTBEAT <= heartbeat <= MAX_HEARTBEAT:
            raise ValueError("give a heartbeat interval from 100ms to 5m")
        return heartbeat

    @field_validator("cpu", mode="before")
    @classmethod
    def _cpu(cls, value: Any) -> int | None:
        return None if value is None else parse_cpu(value, field="cpu")

    @field_validator("memory", mode="before")
    @classmethod
    def _memory(cls, value: Any) -> int | None:
        return None if value is None else parse_bytes(value, field="memory")

    @field_validator("labels", mode="before")
    @classmethod
    def _labels(cls, value: Any) -> dict[str, str]:
        if isinstance(value, dict):
            return value
        labels = {}
        for item in _items(value):
            key, equals, text = item.partition("=")
            if not equals or not _LABEL_KEY.fullmatch(key):
                raise ValueError(
                    f"{item!r} is no label: write key=value, the key of letters, digits, '.', '_', '/', '-'"
                )
            if len(text) > 256:
                raise ValueError(f"the value of label {key!r} is longer than 256 characters")
            labels[key] = text
        return labels

    @field_validator("env_allow", mode="before")
    @classmethod
    def _env_allow(cls, value: Any) -> tuple[str, ...]:
        names = tuple(_items(value))
        for name in names:
            if not _ENV_RULE.fullmatch(name):
                raise ValueError(f"{name!r} is no variable: write NAME or PREFIX*")
        return names

    @field_validator("log_level")
    @classmethod
    def _log_level(cls, value: str) -> str:
        if value.lower() not in LEVELS:
            raise ValueError(f"give one of {', '.join(LEVELS)}")
        return value.lower()

    @property
    def env_rules(self) -> tuple[str, ...]:
        """Everything of the host's environment that a job may see."""
        return (*DEFAULT_ENV_ALLOW, *self.env_allow)


def parse_arguments(argv: Sequence[str]) -> AgentConfig:
    """Returns the configuration that ``argv`` and the environment make.

    Raises:
        ConfigError: A setting is wrong.
        SystemExit: ``--help`` was asked for, or the flags themselves are wrong; argparse has said so.
    """
    flags = {name: value for name, value in vars(_parser().parse_args(argv)).items() if value is not None}
    try:
        config = AgentConfig(**flags)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not config.address.is_loopback and not config.insecure:
        raise ConfigError(
            f"{config.address} is not on this host, and without TLS everyone on the way could read and change "
            "what is sent; give --insecure if the network is trusted"
        )
    return config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lessor agent",
        description="Runs leased jobs on this host. See also `lessor agent drain --help`.",
        epilog="Every flag is also a variable: --state-dir is LESSOR_AGENT_STATE_DIR.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--address", metavar="HOST:PORT", help="the server (default: $LESSOR_ADDRESS, else 127.0.0.1:7780)")
    add("--state-dir", metavar="DIR", help="where journal, keepers and output live; one agent each")
    add("--name", help="the agent's name (default: the host's)")
    add("--heartbeat", metavar="DURATION", help="between two renewals (default: 5s)")
    add("--label", metavar="KEY=VALUE", action="append", dest="labels", help="a label for selectors; repeatable")
    add("--cpu", metavar="N", help="CPUs to lease, such as 8 or 500m (default: all)")
    add("--memory", metavar="SIZE", help="memory to lease, such as 4GiB (default: all)")
    add("--fake-gpus", metavar="N", help="lease N GPUs that do not exist")
    add(
        "--env-allow", metavar="NAME", action="append", help="a host variable that jobs see; NAME* for many; repeatable"
    )
    add("--on-exit", choices=("keep", "stop"), help="what a stopped agent does with its jobs (default: keep)")
    add("--insecure", action="store_true", default=None, help="connect without TLS to another host")
    add("--log-format", choices=("json", "console"), help="default: console")
    add("--log-level", choices=LEVELS, help="default: info")
    return parser


def _items(value: Any) -> list[str]:
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return [str(item) for item in value]


def _one_line(error: ValidationError) -> str:
    problems = []
    for problem in error.errors(include_url=False):
        field = str(problem["loc"][0]) if problem["loc"] else ""
        flag = "--" + {"labels": "label"}.get(field, field).replace("_", "-")
        # The flag names the field; some messages do as well.
        text = problem["msg"].removeprefix("Value error, ").removeprefix(f"{field}: ")
        if problem["type"] == "missing":
            text = f"is needed (or LESSOR_AGENT_{field.upper()})"
        problems.append(f"{flag}: {text}" if field else text)
    return "; ".join(" ".join(text.split()) for text in problems)

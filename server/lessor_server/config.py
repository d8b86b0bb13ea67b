"""The server's settings, from flags and ``LESSOR_SERVER_*`` variables; flags win."""

from __future__ import annotations

import ipaddress
import socket
from datetime import timedelta
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer
from pydantic_settings import BaseSettings, SettingsConfigDict

from lessor import timing
from lessor.address import DEFAULT_ADDRESS, Address, parse_address
from lessor.errors import InvalidArgument
from lessor.log import LogFormat
from lessor.units import format_duration, parse_duration
from lessor_server.maintenance.housekeeping import Retention

MAX_WORKERS = 64
"""More processes than this on one host are taken for a mistake."""


Duration = Annotated[timedelta, BeforeValidator(parse_duration), PlainSerializer(format_duration, when_used="json")]
"""Written as everywhere else, ``1m30s``, a bare number being seconds; a worker reads it as its parent wrote it."""


class ServerSettings(BaseSettings):
    """Settings of a server: of its one process, or of each of its workers."""

    model_config = SettingsConfigDict(env_prefix="LESSOR_SERVER_", extra="ignore")

    database_url: str = ""
    """postgresql://user:password@host:port/name"""
    listen: str = DEFAULT_ADDRESS
    """host:port; port 0 takes a free one."""
    insecure: bool = False
    """Listen on an address that others can reach, without encryption."""
    workers: int = Field(default=1, ge=1, le=MAX_WORKERS)
    """Processes that share the address; each is a replica with pools of its own."""
    pool_size: int = Field(default=10, ge=4, le=200)
    """Most connections of each of the two pools of a process."""
    log_format: LogFormat = "console"
    log_level: str = "info"
    keep_jobs_days: int = Field(default=90, ge=1)
    """Ended jobs, their attempts and logs are kept this long."""
    storm_brake_max: Duration = Field(default=timing.STORM_BRAKE_MAX, le=timedelta(hours=1))
    """Lease time stands still for at most so long while most agents are silent at once; 0: it never does."""

    @property
    def retention(self) -> Retention:
        """How long what has ended is kept."""
        return Retention(jobs=timedelta(days=self.keep_jobs_days))


class ListenError(ValueError):
    """The address to listen on cannot be used; the message says what to change."""

    @classmethod
    def refused(cls, listen: str, error: OSError) -> ListenError:
        """Returns the error for an address that the system refuses."""
        return cls(
            f"cannot listen on {listen}: {error.strerror or error}; "
            "is another server running there? choose another --listen"
        )


def parse_listen(listen: str, *, insecure: bool) -> Address:
    """Returns the address to listen on, once it is one that others cannot reach, or that is meant to be reached.

    Raises:
        ListenError: It is no address, names no host, or is not loopback and ``insecure`` is not set.
    """
    try:
        address = parse_address(listen, field="--listen")
    except InvalidArgument as error:
        raise ListenError(str(error)) from None
    if insecure:
        return address
    try:
        reached = {entry[4][0] for entry in socket.getaddrinfo(address.host, None)}
    except OSError as error:
        raise ListenError(f"--listen {listen!r}: {address.host!r} cannot be resolved ({error.strerror})") from None
    if not all(ipaddress.ip_address(one).is_loopback for one in reached):
        raise ListenError(
            f"--listen {listen!r} can be reached by other hosts and the traffic would not be encrypted: "
            "listen on 127.0.0.1, or add --insecure on a network you trust"
        )
    return address

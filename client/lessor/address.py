"""Where the server is: ``host:port``."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lessor.errors import InvalidArgument

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 7780
DEFAULT_ADDRESS = f"{DEFAULT_HOST}:{DEFAULT_PORT}"
ENVIRONMENT_VARIABLE = "LESSOR_ADDRESS"

_SCHEME = "lessor://"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\.?")
_REMEDY = f"write host:port, for example {DEFAULT_ADDRESS} or [::1]:{DEFAULT_PORT}"


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port (0–65535; 0 only makes sense to listen on)."""

    host: str
    """A name, an IPv4 address, or an IPv6 address without brackets."""
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """True when only this host can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_address(text: str, *, field: str = "address") -> Address:
    """Returns the address written as ``host:port``, ``host``, ``[v6]:port`` or ``lessor://host:port``.

    Raises:
        InvalidArgument: It is none of these; names ``field`` and the value.
    """
    rest = text.strip().removeprefix(_SCHEME)
    if "://" in rest:
        raise _refuse(field, text, "only lessor:// or no scheme is understood")
    if rest.startswith("["):
        host, bracket, tail = rest[1:].partition("]")
        if not bracket or (tail and not tail.startswith(":")):
            raise _refuse(field, text, "the bracket is not closed")
        port = tail[1:] if tail else str(DEFAULT_PORT)
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise _refuse(field, text, f"{host!r} is not an IPv6 address") from None
    elif rest.count(":") > 1:
        raise _refuse(field, text, "an IPv6 address goes in brackets")
    else:
        host, colon, tail = rest.partition(":")
        port = tail if colon else str(DEFAULT_PORT)
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise _refuse(field, text, f"{port!r} is not a port (0–65535)")
    if ":" not in host and not _HOST.fullmatch(host):
        raise _refuse(field, text, f"{host!r} is not a host name")
    return Address(host, int(port))


def resolve_address(given: str | None = None, environ: Mapping[str, str] | None = None) -> Address:
    """Returns the address ``given``, else the one in LESSOR_ADDRESS, else 127.0.0.1:7780.

    Raises:
        InvalidArgument: It cannot be understood; the message says where it came from.
    """
    if given:
        return parse_address(given)
    variable = (os.environ if environ is None else environ).get(ENVIRONMENT_VARIABLE, "")
    if variable:
        return parse_address(variable, field=ENVIRONMENT_VARIABLE)
    return Address(DEFAULT_HOST, DEFAULT_PORT)


def _refuse(field: str, text: str, why: str) -> InvalidArgument:
    return InvalidArgument(violations={field: f"{text!r} is not an address: {why}"}, remedy=_REMEDY)

"""Where the server is."""

from __future__ import annotations

import pytest

from lessor.address import Address, parse_address, resolve_address
from lessor.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:7780", Address("127.0.0.1", 7780)),
        ("host", Address("host", 7780)),
        ("gpu-1.example.org:1", Address("gpu-1.example.org", 1)),
        ("lessor://host:80", Address("host", 80)),
        ("[::1]:7780", Address("::1", 7780)),
        ("[::1]", Address("::1", 7780)),
        (" host:1 ", Address("host", 1)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", ":80", "host:", "host:x", "host:70000", "::1", "[::1", "[x]:1", "http://host:80", "a b:1", "-a:1", "[::1]x"],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"address: .* is not an address: .*write host:port"):
        parse_address(text)


def test_the_text_of_an_address_is_read_back() -> None:
    for address in (Address("::1", 1), Address("host", 2)):
        assert parse_address(str(address)) == address


def test_loopback() -> None:
    assert all(Address(host, 1).is_loopback for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"))
    assert not any(Address(host, 1).is_loopback for host in ("0.0.0.0", "10.0.0.1", "host", "::"))


def test_where_the_address_comes_from() -> None:
    assert resolve_address("a:1", {"LESSOR_ADDRESS": "b:2"}) == Address("a", 1)
    assert resolve_address(None, {"LESSOR_ADDRESS": "b:2"}) == Address("b", 2)
    assert resolve_address(None, {}) == Address("127.0.0.1", 7780)
    with pytest.raises(InvalidArgument, match=r"LESSOR_ADDRESS: 'b:x'"):
        resolve_address(None, {"LESSOR_ADDRESS": "b:x"})

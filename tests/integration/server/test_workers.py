"""The port that workers share, and how soon one that ended is started again."""

from __future__ import annotations

import errno
import socket

import pytest

from lessor_server.workers import Backoff, Claim

pytestmark = pytest.mark.integration


def listener(port: int, *, shared: bool) -> socket.socket:
    """Listens as grpc does."""
    made = socket.socket()
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
        made.bind(("127.0.0.1", port))
        made.listen()
    except BaseException:
        made.close()
        raise
    return made


def test_a_claimed_port_is_refused_to_all_but_those_who_share_it() -> None:
    with Claim("127.0.0.1", 0) as claim:
        assert claim.port
        with pytest.raises(OSError, match="in use") as refused:
            listener(claim.port, shared=False)
        assert refused.value.errno == errno.EADDRINUSE
        with pytest.raises(OSError, match="in use"):
            Claim("127.0.0.1", claim.port)
        with listener(claim.port, shared=True), listener(claim.port, shared=True):
            with pytest.raises(OSError, match="in use"):
                Claim("127.0.0.1", claim.port)
            with pytest.raises(OSError, match="in use"):
                listener(claim.port, shared=False)
        # While no worker runs, the port stays ours.
        with pytest.raises(OSError, match="in use"):
            listener(claim.port, shared=False)
    listener(claim.port, shared=False).close()


@pytest.mark.parametrize("shared", [False, True])
def test_a_port_that_somebody_listens_on_is_not_claimed(shared: bool) -> None:
    with listener(0, shared=shared) as busy, pytest.raises(OSError, match="in use"):
        Claim("127.0.0.1", busy.getsockname()[1])


@pytest.mark.parametrize("shared", [False, True])
def test_connections_of_an_earlier_server_do_not_stand_in_the_way(shared: bool) -> None:
    with listener(0, shared=shared) as earlier:
        port = earlier.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        # The side that closes first is left in TIME_WAIT.
        earlier.accept()[0].close()
        client.close()
    Claim("127.0.0.1", port).close()


def test_connections_go_to_the_listeners_alone() -> None:
    with Claim("127.0.0.1", 0) as claim, listener(claim.port, shared=True) as only:
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", claim.port), timeout=60):
                only.accept()[0].close()


def test_all_addresses_of_a_name_are_claimed() -> None:
    with Claim("localhost", 0) as claim, pytest.raises(OSError, match="in use"):
        listener(claim.port, shared=False)


def test_an_address_of_another_host_is_refused() -> None:
    with pytest.raises(OSError, match="assign"):
        Claim("192.0.2.1", 0)


def test_a_worker_that_keeps_ending_is_started_ever_later() -> None:
    backoff = Backoff()
    assert [backoff.delay_s(lived_s=0.1) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert backoff.delay_s(lived_s=59.9) == 30
    assert [backoff.delay_s(lived_s=60), backoff.delay_s(lived_s=0)] == [0.5, 1]

"""The wires that the churn tests cut do what their names say."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest
from wires import Way, Wire, Wires

TIMEOUT_S = 10.0
Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def wire() -> Iterator[Wire]:
    with Wires() as wires:
        yield wires.lay(0)


@pytest.fixture
def ends(wire: Wire) -> Iterator[Ends]:
    """Who dialled, and who was dialled, after a byte went each way."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        wire.target_port = server.getsockname()[1]
        with closing(socket.create_connection(("127.0.0.1", wire.port), TIMEOUT_S)) as near:
            server.settimeout(TIMEOUT_S)
            with closing(server.accept()[0]) as far:
                far.settimeout(TIMEOUT_S)
                for one, other in ((near, far), (far, near)):
                    one.sendall(b"?")
                    assert other.recv(1) == b"?"
                yield near, far


def hears_nothing(end: socket.socket) -> bool:
    end.settimeout(0.1)
    try:
        return not end.recv(1)
    except TimeoutError:
        return True
    finally:
        end.settimeout(TIMEOUT_S)


def test_a_reset_is_seen_on_both_sides(wire: Wire, ends: Ends) -> None:
    wire.reset()
    for end in ends:
        with pytest.raises(ConnectionResetError):
            end.recv(1)


def test_half_open_is_seen_by_the_dialled_alone(wire: Wire, ends: Ends) -> None:
    near, far = ends
    wire.leave_half_open()
    with pytest.raises(ConnectionResetError):
        far.recv(1)
    near.sendall(b"anybody?")
    assert hears_nothing(near)
    wire.heal()
    with pytest.raises(ConnectionResetError):
        near.recv(1)


def test_one_way(wire: Wire, ends: Ends) -> None:
    near, far = ends
    wire.silence(Way.THERE)
    near.sendall(b"kept")
    far.sendall(b"!")
    assert near.recv(1) == b"!"
    assert hears_nothing(far)
    wire.heal()
    assert far.recv(4) == b"kept"


def test_slow_comes_late_and_corrupt_comes_altered(wire: Wire, ends: Ends) -> None:
    near, far = ends
    wire.slow(0.05)
    wire.corrupt(Way.BACK)
    far.sendall(b"aaa")
    near.sendall(b"aaa")
    assert far.recv(3) == b"aaa"
    assert near.recv(3) == b"aea"


def test_who_dials_nobody_is_cut(wire: Wire) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        wire.target_port = gone.getsockname()[1]
    with closing(socket.create_connection(("127.0.0.1", wire.port), TIMEOUT_S)) as near, suppress(ConnectionResetError):
        assert not near.recv(1)

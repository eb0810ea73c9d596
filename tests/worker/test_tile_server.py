"""Serving tiles to other workers: to whom, which, and that one who does not read keeps nobody else waiting."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_cluster import entry_of, put

from protocol.errors import ConfigInvalid
from protocol.frames import decode, encode
from protocol.messages import ErrorReport, Heartbeat, TileChunk, TileRequest, WorkerPhase
from protocol.security import KeyPair
from protocol.tiles import TileEntry, TileId, TileKind
from protocol.transport import dial
from worker.addresses import tile_addresses
from worker.config import WorkerConfig
from worker.store import TileStore
from worker.tile_queue import MAX_WAITING, TileQueue, Waiting
from worker.tile_server import TileServer

LOOPBACK = "tcp://127.0.0.1:*"
DEADLINE_MS = 10_000
DATA = bytes(range(256)) * 5_000
FFN = entry_of(TileId(3, TileKind.FFN, 1), DATA)


@dataclass
class Asker:
    """Another worker, with a connection of its own."""

    server: TileServer
    server_keys: KeyPair
    keys: KeyPair = field(default_factory=KeyPair.generate)
    context: zmq.Context[Any] = field(default_factory=zmq.Context)
    sockets: list[zmq.Socket[Any]] = field(default_factory=list)

    def dial(self) -> zmq.Socket[Any]:
        name = f"{id(self)}/{len(self.sockets)}".encode()
        socket = dial(self.context, self.server.address, self.keys, self.server_keys.public, name, 2**21)
        self.sockets.append(socket)
        return socket

    def ask(self, message: object, socket: zmq.Socket[Any] | None = None, wait_ms: int = DEADLINE_MS) -> Any:
        """Return the answer and its payload, None when there is none."""
        socket = socket or self.dial()
        if not socket.poll(wait_ms, zmq.POLLOUT):
            return None
        socket.send_multipart(encode(message))
        return self.hear(socket, wait_ms)

    def hear(self, socket: zmq.Socket[Any], wait_ms: int = DEADLINE_MS) -> Any:
        return decode(socket.recv_multipart()) if socket.poll(wait_ms) else None


Serving = Callable[..., tuple[TileServer, Asker, TileStore]]


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    opened: list[tuple[TileServer, Asker]] = []

    def start(*offered: TileEntry) -> tuple[TileServer, Asker, TileStore]:
        keys, store = KeyPair.generate(), TileStore(tmp_path, 10**8)
        server = TileServer(keys, LOOPBACK, store)
        asker = Asker(server, keys)
        opened.append((server, asker))
        server.admit([asker.keys.public])
        server.offer(offered)
        return server, asker, store

    yield start
    for server, asker in opened:
        for socket in asker.sockets:
            socket.close(linger=0)
        asker.context.term()
        server.close()


def asked(entry: TileEntry, offset: int = 0, length: int = 0) -> TileRequest:
    return TileRequest(digest=entry.digest, offset=offset, length=length or min(entry.num_bytes - offset, 2**20))


def test_a_member_gets_what_is_offered_and_there(serving: Serving) -> None:
    server, asker, store = serving(FFN)
    put(store, FFN, DATA)
    socket = asker.dial()
    for offset, length in ((0, 1000), (1_000_000, 280_000), (7, 2**20)):
        received = asker.ask(asked(FFN, offset, length), socket)
        assert received.message == TileChunk(digest=FFN.digest, offset=offset)
        assert received.payload == DATA[offset : offset + length]
    assert server.num_served_bytes == 1000 + 280_000 + 2**20


@pytest.mark.parametrize("kind", [TileKind.EMBEDDING, TileKind.FINAL_NORM, TileKind.LM_HEAD])
def test_tiles_of_the_head_go_to_nobody(serving: Serving, kind: TileKind) -> None:
    private = entry_of(TileId(-1, kind, 0), DATA)
    _, asker, store = serving(private, FFN)  # the same bytes as a tile of a layer: the stricter rule holds
    put(store, private, DATA)
    answer = asker.ask(asked(private)).message
    assert (answer.code, answer.digest) == ("tile-unavailable", private.digest)


def test_what_no_manifest_named_is_not_handed_out(serving: Serving) -> None:
    _, asker, store = serving()  # the store also holds blocks, of the lm_head too
    put(store, FFN, DATA)
    assert asker.ask(asked(FFN)).message.code == "tile-unavailable"


def test_what_is_not_there_or_out_of_bounds_or_altered_is_told_at_once(serving: Serving) -> None:
    server, asker, store = serving(FFN)
    socket = asker.dial()
    report = asker.ask(asked(FFN), socket).message
    assert isinstance(report, ErrorReport)
    assert (report.code, report.digest) == ("tile-unavailable", FFN.digest)
    put(store, FFN, DATA)
    assert asker.ask(asked(FFN, len(DATA) - 1, 2), socket).message.code == "tile-unavailable"
    path = store.path_of(FFN)
    path.write_bytes(b"?" + DATA[1:])
    store._proven.clear()  # as after a restart
    assert asker.ask(asked(FFN), socket).message.code == "tile-unavailable"
    assert not path.exists()
    assert server.num_served_bytes == 0


def test_a_stranger_and_one_who_was_let_go_are_refused(serving: Serving) -> None:
    server, asker, store = serving(FFN)
    put(store, FFN, DATA)
    stranger = Asker(server, asker.server_keys)
    assert stranger.ask(asked(FFN), wait_ms=300) is None
    for socket in stranger.sockets:
        socket.close(linger=0)
    stranger.context.term()
    live = asker.dial()
    assert asker.ask(asked(FFN, 0, 10), live) is not None
    server.admit([])
    assert asker.ask(asked(FFN, 0, 10), live, wait_ms=300) is None
    server.admit([asker.keys.public])
    assert asker.ask(asked(FFN, 0, 10), live) is not None


def test_garbage_and_other_messages_are_answered_with_an_error(serving: Serving) -> None:
    _, asker, _ = serving(FFN)
    socket = asker.dial()
    beat = Heartbeat(
        sequence=1, epoch=0, phase=WorkerPhase.IDLE, progress=0, resident_bytes=0, weight_bytes=0, kv_bytes=0
    )
    assert asker.ask(beat, socket).message.code == "protocol-violation"
    socket.send_multipart([b"\xc1"])
    assert asker.hear(socket).message.code == "frame-malformed"


def test_one_who_does_not_read_keeps_nobody_waiting(serving: Serving) -> None:
    server, asker, store = serving(FFN)
    put(store, FFN, DATA)
    deaf = asker.dial()
    deaf.setsockopt(zmq.RCVHWM, 1)
    assert deaf.poll(DEADLINE_MS, zmq.POLLOUT)
    for _ in range(MAX_WAITING):
        deaf.send_multipart(encode(asked(FFN, 0, 2**20)))
    other = Asker(server, asker.server_keys)
    server.admit([asker.keys.public, other.keys.public])
    try:
        quick = other.dial()
        for _ in range(20):
            assert other.ask(asked(FFN, 0, 2**20), quick).payload == DATA[: 2**20]
        assert sum(asker.hear(deaf).payload == DATA[: 2**20] for _ in range(MAX_WAITING)) == MAX_WAITING
    finally:
        for socket in other.sockets:
            socket.close(linger=0)
        other.context.term()


def test_an_address_that_is_taken_is_told(serving: Serving) -> None:
    server, _, store = serving()
    with pytest.raises(ConfigInvalid, match="can't listen"):
        TileServer(KeyPair.generate(), server.address, store)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for one thread")
def test_it_gives_way_to_computing(serving: Serving) -> None:
    server, _, _ = serving()
    assert os.getpriority(os.PRIO_PROCESS, server._thread.native_id) > os.getpriority(os.PRIO_PROCESS, 0)


def test_where_it_listens_and_what_is_told() -> None:
    def where(**settings: Any) -> str:
        return WorkerConfig(**settings).tile_address

    assert where(listen="tcp://10.0.0.1:7000") == "tcp://10.0.0.1:*"
    assert (where(tile_listen="none"), where(tile_listen="tcp://[::]:7001")) == ("", "tcp://[::]:7001")
    assert tile_addresses("tcp://0.0.0.0:99", ["pi.lan", "nat.example:7000"], []) == ("pi.lan:99", "nat.example:99")


@settings(max_examples=100, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=60),
    dice=st.randoms(use_true_random=False),
)
def test_everybody_has_a_turn_in_order_and_nothing_is_lost(arrivals: list[tuple[int, int]], dice: Any) -> None:
    queue, now, accepted = TileQueue(most_waiting=8), 0.0, []
    for number, (key, lane) in enumerate(arrivals):
        request = TileRequest(digest=bytes(32), offset=number, length=1)
        waiting = Waiting(b"key%d" % key, b"route%d.%d" % (key, lane), request)
        if queue.add(waiting) is None:
            accepted.append(waiting)
        assert sum(one.key == waiting.key for one in accepted) <= 8
    answered: list[Waiting] = []
    while len(queue):
        wait_s = queue.wait_s(now)
        assert wait_s is not None
        assert (queue.next(now) is None) == (wait_s > 0)
        now += wait_s
        waiting = queue.next(now)
        assert waiting is not None
        match dice.randrange(8):
            case 0:
                queue.hold(waiting, now)
            case 1:
                gone = waiting.route
                queue.forget(gone)
                accepted = [one for one in accepted if one.route != gone or one in answered]
            case _:
                queue.done(waiting)
                answered.append(waiting)
    assert queue.wait_s(now) is None
    assert {id(one) for one in answered} == {id(one) for one in accepted}
    for route in {one.route for one in answered}:
        offsets = [one.asked.offset for one in answered if one.route == route]
        assert offsets == sorted(offsets)

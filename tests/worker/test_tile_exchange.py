"""Tiles from one worker to another over real sockets: from peers first, and never at the mercy of one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio
from test_fetch import FakeBulk, entries_of
from tiny_cluster import entry_of, put

from protocol.errors import TileUnavailable
from protocol.frames import Received
from protocol.ids import WorkerId
from protocol.messages import ErrorReport, Holder, Peer, TileRequest
from protocol.security import Gate, KeyPair
from protocol.specs import Span
from protocol.tiles import TileEntry, TileId, TileKind
from protocol.transport import bind_router, receive
from worker.config import WorkerConfig
from worker.fetch_sources import COORDINATOR
from worker.fetcher import Fetcher
from worker.store import TileStore
from worker.tile_exchange import TileExchange
from worker.tile_server import TileServer
from worker.tile_source import TileDialer

LOOPBACK = "tcp://127.0.0.1:*"
DEADLINE_S = 20.0
OWN = KeyPair.generate()


class Refusing(FakeBulk):
    """A coordinator that serves nothing, or nothing but some tiles."""

    def __init__(self, tiles: dict[TileEntry, bytes] | None = None) -> None:
        super().__init__(tiles or {})

    async def send(self, message: object) -> None:
        assert isinstance(message, TileRequest)
        if message.digest in self.by_digest:
            await super().send(message)
        else:
            self.asked.append(message)
            report = ErrorReport.of(TileUnavailable("the coordinator serves nothing"), digest=message.digest)
            await self.answers.put(Received(report, memoryview(b"")))


@dataclass
class Neighbour:
    """A worker with tiles and a tile server."""

    store: TileStore
    server: TileServer
    holder: Holder


def holder_of(name: str, key: bytes, address: str) -> Holder:
    everything = Span(0, 1000)
    peer = Peer(worker=WorkerId(name), public_key=key, addresses=(address.removeprefix("tcp://"),))
    return Holder(peer=peer, layers=everything, groups=everything, ffn=everything)


@contextmanager
def neighbour(folder: Path, name: str, tiles: dict[TileEntry, bytes]) -> Iterator[Neighbour]:
    keys, store = KeyPair.generate(), TileStore(folder / name, 10**9)
    for entry, data in tiles.items():
        put(store, entry, data)
    server = TileServer(keys, LOOPBACK, store)
    server.admit([OWN.public])
    server.offer(tiles)
    try:
        yield Neighbour(store, server, holder_of(name, keys.public, server.address))
    finally:
        server.close()


Meanwhile = Callable[[int, int], None]


def fetched(
    folder: Path,
    tiles: dict[TileEntry, bytes],
    bulk: FakeBulk,
    holders: list[Holder],
    *,
    meanwhile: Meanwhile = lambda done, total: None,
    beside: Callable[[zmq.asyncio.Context], Awaitable[None]] | None = None,
) -> dict[str, int]:
    """Fetch all tiles into a new store, check them, and return the bytes that came from each source."""

    async def run() -> dict[str, int]:
        context = zmq.asyncio.Context()
        other = asyncio.ensure_future(beside(context)) if beside else None
        try:
            fetcher = Fetcher(bulk, store, tiles, holders, TileDialer(context, OWN, WorkerId("own")))
            async with asyncio.timeout(DEADLINE_S):
                total = await fetcher.run(meanwhile)
            assert total == fetcher.fetched_bytes.total()
            return dict(fetcher.fetched_bytes)
        finally:
            if other is not None:
                other.cancel()
                await asyncio.gather(other, return_exceptions=True)
            context.term()  # hangs when a socket was forgotten

    store = TileStore(folder / "own", 10**9)
    try:
        found = asyncio.run(run())
        assert all(store.read(entry) == data for entry, data in tiles.items())
        return found
    finally:
        store.close()


def test_everything_comes_from_a_neighbour_while_the_coordinator_serves_nothing(tmp_path: Path) -> None:
    tiles = entries_of([3_000_000, 700_000, 10, 500_000])
    with neighbour(tmp_path, "a", tiles) as a:
        found = fetched(tmp_path, tiles, Refusing(), [a.holder])
        assert found == {"a": sum(map(len, tiles.values()))}
        assert a.server.num_served_bytes >= found["a"]


def test_tiles_of_the_head_come_from_the_coordinator_alone(tmp_path: Path) -> None:
    layers = entries_of([50_000] * 4)
    data = b"row" * 30_000
    private = {entry_of(TileId(-1, TileKind.EMBEDDING, 0), data): data}
    with neighbour(tmp_path, "a", layers | private) as a:
        bulk = Refusing(private)
        found = fetched(tmp_path, layers | private, bulk, [a.holder])
        assert found == {"a": sum(map(len, layers.values())), COORDINATOR: len(data)}


def test_a_neighbour_whose_tiles_are_altered_is_asked_no_more(tmp_path: Path, caplog: Any) -> None:
    tiles = entries_of([300_000] * 6)
    with neighbour(tmp_path, "liar", tiles) as liar, neighbour(tmp_path, "honest", tiles) as honest:
        for entry, data in tiles.items():
            liar.store.path_of(entry).write_bytes(b"?" + data[1:])  # after it was proven
        fetched(tmp_path, tiles, Refusing(), [liar.holder, honest.holder])
        lines = [one.getMessage() for one in caplog.records]
        assert any("no more tiles from liar in this fetch" in one and "arrived altered" in one for one in lines)


@pytest.mark.parametrize("what", ["not admitted", "nobody there", "no address at all"])
def test_a_neighbour_that_can_not_be_had_is_passed_by(tmp_path: Path, what: str) -> None:
    tiles = entries_of([200_000] * 3)
    with neighbour(tmp_path, "a", tiles) as a:
        if what == "not admitted":
            a.server.admit([])
        holder = a.holder
        if what == "nobody there":
            holder = holder_of("a", a.holder.peer.public_key, "127.0.0.1:9")
        if what == "no address at all":
            holder = holder_of("a", a.holder.peer.public_key, "?:?")
        found = fetched(tmp_path, tiles, FakeBulk(tiles), [holder])
        assert found == {COORDINATOR: sum(map(len, tiles.values()))}


def test_when_a_neighbour_dies_in_the_middle_others_go_on_where_it_stopped(tmp_path: Path) -> None:
    tiles = entries_of([2_000_000] * 10)
    with neighbour(tmp_path, "a", tiles) as a:

        def kill(done: int, total: int) -> None:
            if done > total / 4:
                a.server.close()

        found = fetched(tmp_path, tiles, FakeBulk(tiles), [a.holder], meanwhile=kill)
        assert found["a"] > 0
        assert found[COORDINATOR] > 0
        assert sum(found.values()) == sum(map(len, tiles.values()))


@pytest.mark.parametrize("frames", [[b"\xc1"], [b"\x91\x01", b"", b""], [b""]])
def test_a_neighbour_that_talks_nonsense_is_dropped(tmp_path: Path, frames: list[bytes]) -> None:
    tiles, keys = entries_of([1000]), KeyPair.generate()
    address: list[str] = []
    with ExitStack() as stack:
        context: Any = zmq.asyncio.Context()
        stack.callback(context.term)
        stack.enter_context(Gate(context, lambda key: True))
        router, bound = bind_router(context, keys, LOOPBACK, 2**20)
        stack.callback(router.close, linger=0)
        address.append(bound)

        async def nonsense(_: zmq.asyncio.Context) -> None:
            while True:
                envelope = await receive(router)
                await router.send_multipart([envelope.routing_id, *frames])

        found = fetched(tmp_path, tiles, FakeBulk(tiles), [holder_of("mad", keys.public, address[0])], beside=nonsense)
        assert found == {COORDINATOR: len(next(iter(tiles.values())))}


def test_one_worker_serves_what_it_fetched_itself(tmp_path: Path) -> None:
    """As the control side runs them: the second fetches from the first what that had from the coordinator."""
    tiles = entries_of([400_000, 20])
    everything = sum(map(len, tiles.values()))

    def told(done: int, total: int) -> None:
        assert done <= total == everything

    async def run() -> None:
        context = zmq.asyncio.Context()
        keys = [KeyPair.generate(), KeyPair.generate()]
        stores = [TileStore(tmp_path / name, 10**9) for name in "ab"]
        config = WorkerConfig(listen=LOOPBACK)
        first, second = (TileExchange(config, key, store, context) for key, store in zip(keys, stores, strict=True))
        (address,) = first.addresses(())
        holders = [
            holder_of("a", keys[0].public, address),
            Holder(
                peer=Peer(worker=WorkerId("b"), public_key=keys[1].public, addresses=second.addresses(())),
                layers=Span(0, 0), groups=Span(0, 0), ffn=Span(0, 0),
            ),
        ]  # fmt: skip
        try:
            for one in (first, second):
                one.ordered(tiles, (), holders[1:])  # who is named in one order
                one.met(holder.peer for holder in holders[:1])  # or another
            async with asyncio.timeout(DEADLINE_S):
                await first.fetch(FakeBulk(tiles), WorkerId("a"), tuple(tiles), holders, on_progress=told)
                await second.fetch(Refusing(), WorkerId("b"), tuple(tiles), holders, on_progress=told, purpose="stock")
            assert (first.from_coordinator_bytes, first.from_peers_bytes) == (everything, 0)
            assert (second.from_coordinator_bytes, second.from_peers_bytes) == (0, everything)
            assert (first.served_bytes, second.served_bytes) == (everything, 0)
        finally:
            for one in (first, second):
                one.close()
            for store in stores:
                store.close()
            context.term()

    asyncio.run(run())

"""(g) Fetching tiles from the coordinator alone and from other workers too, each behind an uplink of limited rate.

Real sockets, CURVE and disks in one process. A tile server stands in for the coordinator as well, so what is compared
is who is asked, not how tiles are made.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zmq.asyncio

from benchmarks.report import scratch, table
from protocol.frames import Received, decode, encode
from protocol.ids import WorkerId
from protocol.messages import Holder, Peer
from protocol.security import KeyPair
from protocol.specs import Span
from protocol.tiles import TileEntry, TileId, TileKind
from protocol.transport import dial, receive_dealer
from worker.fetch_sources import COORDINATOR
from worker.fetcher import Fetcher
from worker.store import TileStore
from worker.tile_server import TileServer
from worker.tile_source import TileDialer

TILE_BYTES = 1 << 20
NUM_TILES = 24
LOOPBACK = "tcp://127.0.0.1:*"
EVERYTHING = Span(0, 10_000)
MBIT = 125_000


@dataclass
class Uplink:
    """Carries TCP connections to a port, and what comes back at this many bytes a second in all; 0: unlimited."""

    target_port: int
    rate: float
    dies_after_bytes: float = float("inf")
    sent_bytes: int = 0
    _free_at: float = 0.0
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def open(self) -> asyncio.Server:
        return await asyncio.start_server(self._connect, "127.0.0.1", 0)

    def cut(self) -> None:
        """Break all connections."""
        for one in self._writers:
            one.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, there = await asyncio.open_connection("127.0.0.1", self.target_port, limit=1 << 16)
        self._writers += [writer, there]
        with contextlib.suppress(OSError, asyncio.CancelledError):  # cut, or the end of the run
            await asyncio.gather(self._carry(reader, there, 0.0), self._carry(back, writer, self.rate))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rate: float) -> None:
        while data := await reader.read(16 << 10):
            if rate:
                now = time.monotonic()
                self._free_at = max(now, self._free_at) + len(data) / rate
                await asyncio.sleep(self._free_at - now)
                self.sent_bytes += len(data)
                if self.sent_bytes > self.dies_after_bytes:
                    self.cut()
            writer.write(data)
            await writer.drain()
        writer.close()


class DirectLine:
    """The bulk connection to the stand-in of the coordinator."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket

    async def send(self, message: object) -> None:
        await self._socket.send_multipart(encode(message))

    async def receive(self) -> Received:
        return decode(await receive_dealer(self._socket))


@dataclass(frozen=True)
class Source:
    """Who has all tiles, behind which uplink."""

    name: str
    rate: float
    lies: bool = False
    dies_after_bytes: float = float("inf")


def make_tiles() -> dict[TileEntry, bytes]:
    """Random tiles, the same at every run."""
    dice = random.Random(1)
    blobs = [dice.randbytes(TILE_BYTES) for _ in range(NUM_TILES)]
    return {
        TileEntry(TileId(index, TileKind.FFN, 0), len(data), hashlib.sha256(data).digest()): data
        for index, data in enumerate(blobs)
    }


@contextlib.contextmanager
def serving(
    folder: Path, source: Source, tiles: dict[TileEntry, bytes], admitted: list[bytes]
) -> Iterator[tuple[KeyPair, int]]:
    """A tile server on a store that has everything; its keys and port."""
    store, keys = TileStore(folder / (source.name or "coordinator"), 10**10), KeyPair.generate()
    for entry, data in tiles.items():
        part = store.open_part(entry)
        part.append(data)
        part.finish()
        if source.lies:
            store.path_of(entry).write_bytes(bytes(len(data)))
    server = TileServer(keys, LOOPBACK, store)
    server.admit(admitted)
    server.offer(tiles)
    try:
        yield keys, int(server.address.rpartition(":")[2])
    finally:
        server.close()


async def fetch_all(folder: Path, sources: Sequence[Source], num_workers: int) -> tuple[float, Counter[str]]:
    """Let so many workers fetch everything at once; return the seconds until the last has it, and who gave how much."""
    tiles = make_tiles()
    own = [KeyPair.generate() for _ in range(num_workers)]
    context = zmq.asyncio.Context()
    with contextlib.ExitStack() as stack:
        stack.callback(context.destroy, linger=0)
        holders: list[Holder] = []
        lines: list[DirectLine] = []
        for source in sources:
            keys, port = stack.enter_context(serving(folder, source, tiles, [one.public for one in own]))
            uplink = Uplink(port, source.rate, source.dies_after_bytes)
            listener = await uplink.open()
            stack.callback(uplink.cut)
            stack.callback(listener.close)
            address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
            if source.name == COORDINATOR:
                for number, mine in enumerate(own):
                    name = f"bench/{number}".encode()
                    lines.append(DirectLine(dial(context, address, mine, keys.public, name, 2 << 20)))
            else:
                peer = Peer(worker=WorkerId(source.name), public_key=keys.public, addresses=(address,))
                holders.append(Holder(peer=peer, layers=EVERYTHING, groups=EVERYTHING, ffn=EVERYTHING))
        stores = [TileStore(folder / f"own{number}", 10**10) for number in range(num_workers)]
        fetchers = [
            Fetcher(line, store, tiles, holders, TileDialer(context, mine, WorkerId(f"own{number}")))
            for number, (line, store, mine) in enumerate(zip(lines, stores, own, strict=True))
        ]
        began = time.perf_counter()
        await asyncio.gather(*(one.run(lambda done, total: None) for one in fetchers))
        took_s = time.perf_counter() - began
        for store in stores:
            store.close()
        return took_s, sum((Counter(one.fetched_bytes) for one in fetchers), Counter())


def measure(sources: Sequence[Source], num_workers: int) -> tuple[float, Counter[str]]:
    """Run one case in an empty folder."""
    folder = scratch("tiles")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        return asyncio.run(fetch_all(folder, sources, num_workers))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Measure each case once: the uplinks set the pace, so runs differ little."""
    slow, up = Source(COORDINATOR, 20 * MBIT), 20 * MBIT
    a, b = Source("a", up), Source("b", up)
    cases: list[tuple[str, list[Source], int]] = [
        ("the coordinator alone", [slow], 1),
        ("and one peer", [slow, a], 1),
        ("and two peers", [slow, a, b], 1),
        ("and two peers, one at 2 Mbit/s", [slow, a, Source("b", 2 * MBIT)], 1),
        ("and two peers, one of which lies", [slow, a, Source("b", up, lies=True)], 1),
        ("and two peers, one dies after 4 MiB", [slow, a, Source("b", up, dies_after_bytes=4 << 20)], 1),
        ("the coordinator alone, three workers fetch", [slow], 3),
        ("and two peers, three workers fetch", [slow, a, b], 3),
        ("no limit: the coordinator alone", [Source(COORDINATOR, 0)], 1),
        ("no limit: and one peer", [Source(COORDINATOR, 0), Source("a", 0)], 1),
    ]
    rows = []
    for words, sources, num_workers in cases:
        took_s, came = measure(sources, num_workers)
        share = 100 * came[COORDINATOR] / came.total()
        rate = NUM_TILES * TILE_BYTES * num_workers / took_s / 1e6
        rows.append((words, num_workers, f"{took_s:.1f}", f"{rate:.1f}", f"{share:.0f} %"))
    table(
        f"(g) {NUM_TILES} tiles of 1 MiB a worker, every uplink 20 Mbit/s (2.5 MB/s) unless said otherwise",
        ("sources", "workers", "seconds", "MB/s in all", "from the coordinator"),
        rows,
    )


if __name__ == "__main__":
    main()

"""Fetching: what is asked for, in which order, and what happens to bytes that are wrong, late or missing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tiny_cluster import entry_of, put

from protocol.errors import DeadlineExceeded, ProtocolViolation, StorageFull, TileUnavailable
from protocol.frames import Received
from protocol.messages import ErrorReport, TileChunk, TileRequest, Welcome
from protocol.tiles import TileEntry, TileId, TileKind
from worker.fetcher import Fetcher
from worker.store import TileStore


def content(index: int, num_bytes: int) -> bytes:
    return bytes((index * 31 + at) % 251 for at in range(num_bytes))


def entries_of(sizes: list[int]) -> dict[TileEntry, bytes]:
    found = {}
    for index, size in enumerate(sizes):
        data = index.to_bytes(2, "little") + content(index, size)
        found[entry_of(TileId(index, TileKind.FFN, 0), data)] = data
    return found


class FakeBulk:
    """A coordinator that answers at once; `spoil` says how often a tile's bytes are wrong."""

    def __init__(self, tiles: dict[TileEntry, bytes], spoil: int = 0, lose: int = 0) -> None:
        self.by_digest = {entry.digest: data for entry, data in tiles.items()}
        self.spoil = spoil
        self.lose = lose
        self.asked: list[TileRequest] = []
        self.answers: asyncio.Queue[Received] = asyncio.Queue()

    async def send(self, message: object) -> None:
        assert isinstance(message, TileRequest)
        self.asked.append(message)
        if self.lose:
            self.lose -= 1
            return
        data = self.by_digest[message.digest][message.offset : message.offset + message.length]
        if self.spoil:
            self.spoil -= 1
            data = bytes(len(data))
        chunk = TileChunk(digest=message.digest, offset=message.offset)
        await self.answers.put(Received(chunk, memoryview(data)))

    async def receive(self) -> Received:
        return await self.answers.get()


def fetch(bulk: FakeBulk, store: TileStore, tiles: dict[TileEntry, bytes], silence_s: float = 5.0) -> int:
    told: list[tuple[int, int]] = []
    try:
        fetched = asyncio.run(Fetcher(bulk, store, tiles).run(lambda *now: told.append(now), silence_s))
    finally:
        store.close()
    total = sum(map(len, tiles.values()))
    assert told[-1] == (total, total)
    for entry, data in tiles.items():
        assert store.read(entry) == data
    return fetched


def test_only_what_is_missing_is_fetched(tmp_path: Path) -> None:
    tiles, store = entries_of([3_000_000, 10, 500]), TileStore(tmp_path, 10**8)
    first, second, third = tiles
    put(store, second, tiles[second])
    part = store.open_part(third)
    part.append(tiles[third][:400])
    part.close()
    assert fetch(FakeBulk(tiles), store, tiles) == len(tiles[first]) + len(tiles[third]) - 400
    assert fetch(FakeBulk(tiles), store, tiles) == 0


def test_altered_bytes_are_asked_for_again_but_not_for_ever(tmp_path: Path) -> None:
    tiles = entries_of([100])
    fetch(FakeBulk(tiles, spoil=2), TileStore(tmp_path / "a", 10**6), tiles)
    with pytest.raises(TileUnavailable, match=r"layer 0 ffn\.0 arrived altered 3 times"):
        fetch(FakeBulk(tiles, spoil=3), TileStore(tmp_path / "b", 10**6), tiles)


def test_silence_ends_the_fetch_and_names_the_tile(tmp_path: Path) -> None:
    tiles = entries_of([100])
    with pytest.raises(DeadlineExceeded, match=r"layer 0 ffn\.0"):
        fetch(FakeBulk(tiles, lose=99), TileStore(tmp_path, 10**6), tiles, silence_s=0.01)


def test_a_request_that_got_lost_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.fetch_sources.STALL_S", 0.01)
    tiles = entries_of([100])
    bulk = FakeBulk(tiles, lose=1)
    fetch(bulk, TileStore(tmp_path, 10**6), tiles)
    assert bulk.asked[0] == bulk.asked[1]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda entry: ErrorReport.of(TileUnavailable("no such tile"), digest=entry.digest), TileUnavailable),
        (lambda entry: ErrorReport.of(StorageFull("anything else")), StorageFull),
        (
            lambda entry: Welcome(version=1, software="", cluster="c", term=1, heartbeat_s=1.0, lease_s=3.0),
            ProtocolViolation,
        ),
    ],
)
def test_other_answers_end_the_fetch(tmp_path: Path, answer: Any, kind: type[Exception]) -> None:
    tiles = entries_of([100])
    bulk = FakeBulk(tiles, lose=1)
    bulk.answers.put_nowait(Received(answer(next(iter(tiles))), memoryview(b"")))
    with pytest.raises(kind):
        fetch(bulk, TileStore(tmp_path, 10**6), tiles)


def test_an_answer_to_an_earlier_fetch_is_dropped(tmp_path: Path) -> None:
    tiles = entries_of([100])
    bulk = FakeBulk(tiles)
    stale = ErrorReport.of(TileUnavailable("of before"), digest=bytes(32))
    bulk.answers.put_nowait(Received(stale, memoryview(b"")))
    fetch(bulk, TileStore(tmp_path, 10**6), tiles)

"""What is fetched when: a plan's tiles before those of a stock order, which waits and goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from protocol.errors import StorageFull, TileUnavailable
from protocol.ids import WorkerId
from protocol.messages import LoadProgress, Stock, Stocked
from protocol.tiles import TileEntry, TileId, TileKind
from worker.connection import Connection
from worker.events import Fetched, FetchFailed, StartFetch
from worker.fetching import STOCK, Fetching, StockOrder
from worker.store import TileStore
from worker.tile_exchange import TileExchange

DEADLINE_S = 20.0
ENTRIES = tuple(TileEntry(TileId(layer, TileKind.FFN, 0), 10, bytes([layer]) * 32) for layer in range(3))


class FakeTiles:
    """Fetches until its gate is opened; `failures` come first."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.begun: list[str] = []
        self.stopped: list[str] = []
        self.failures: list[Exception] = []

    async def fetch(
        self, bulk: object, own: WorkerId, entries: Sequence[TileEntry], holders: object, *,
        on_progress: Callable[[int, int], None], purpose: str = "plan",
    ) -> int:  # fmt: skip
        self.begun.append(purpose)
        on_progress(10, 30)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.stopped.append(purpose)
            raise
        if self.failures:
            raise self.failures.pop(0)
        on_progress(30, 30)
        return 20


class FakeConnection:
    def __init__(self) -> None:
        self.said: list[Any] = []

    def say(self, message: object) -> None:
        self.said.append(message)


class Bench:
    def __init__(self, folder: Path) -> None:
        self.tiles, self.connection = FakeTiles(), FakeConnection()
        self.store = TileStore(folder, 10**6)
        self.ended: list[Fetched | FetchFailed] = []
        self.fetching = Fetching(cast(TileExchange, self.tiles), self.store, self.ended.append)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110  the condition is about what another task has done
                await asyncio.sleep(0)

    def said(self, kind: type) -> list[Any]:
        return [message for message in self.connection.said if isinstance(message, kind)]


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Bench]:
    bench = Bench(folder)
    task = asyncio.create_task(bench.fetching.serve(cast(Connection, bench.connection), WorkerId("w")))
    try:
        yield bench
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        bench.store.close()


def stock(number: int) -> StockOrder:
    return StockOrder(Stock(order=number), ENTRIES)


def plan(epoch: int) -> StartFetch:
    return StartFetch(epoch=epoch, entries=ENTRIES)


@pytest.mark.asyncio
async def test_a_plan_comes_first_and_stock_goes_on_after_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        bench.fetching.stock(stock(1))
        await bench.until(lambda: bench.tiles.begun == ["stock"])
        bench.fetching.for_plan(plan(5))
        await bench.until(lambda: bench.tiles.begun == ["stock", "plan"])
        assert bench.tiles.stopped == ["stock"]
        bench.fetching.stock(stock(2))  # waits its turn
        bench.tiles.gate.set()
        await bench.until(lambda: any(told.is_over for told in bench.said(Stocked)))
        assert bench.ended == [Fetched(epoch=5, fetched_bytes=20)]
        assert bench.tiles.begun == ["stock", "plan", "stock"]
        assert bench.said(LoadProgress)[-1].done_bytes == 30
        last = bench.said(Stocked)[-1]
        assert (last.order, last.done_bytes, last.total_bytes, last.error) == (2, 30, 30, "")


@pytest.mark.asyncio
async def test_a_newer_plan_takes_the_place_of_an_older_one_and_a_stop_ends_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        bench.fetching.for_plan(plan(1))
        await bench.until(lambda: len(bench.tiles.begun) == 1)
        bench.fetching.for_plan(plan(2))
        await bench.until(lambda: len(bench.tiles.begun) == 2)
        bench.fetching.stock(stock(1))
        bench.fetching.stop()
        await bench.until(lambda: bench.tiles.begun == ["plan", "plan", "stock"])
        assert bench.tiles.stopped == ["plan", "plan"] and not bench.ended


@pytest.mark.asyncio
async def test_what_can_not_be_stocked_is_told(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        bench.tiles.gate.set()
        bench.tiles.failures = [TileUnavailable("nobody has it")]
        bench.fetching.stock(stock(3))
        await bench.until(lambda: any(told.is_over for told in bench.said(Stocked)))
        last = bench.said(Stocked)[-1]
        assert (last.order, last.done_bytes, "nobody has it" in last.error) == (3, 10, True)


@pytest.mark.asyncio
async def test_stock_makes_way_when_a_plan_has_no_room(tmp_path: Path) -> None:
    async with serving(tmp_path) as bench:
        bench.store.pin(ENTRIES, STOCK)
        bench.tiles.gate.set()
        bench.tiles.failures = [StorageFull("full")]
        bench.fetching.for_plan(plan(1))
        await bench.until(lambda: bool(bench.ended))
        assert bench.ended == [Fetched(epoch=1, fetched_bytes=20)]
        assert not bench.store._pinned()
        bench.tiles.failures = [StorageFull("full"), StorageFull("full")]
        bench.fetching.for_plan(plan(2))
        await bench.until(lambda: len(bench.ended) == 2)
        assert isinstance(bench.ended[1], FetchFailed)

"""What this worker fetches, one thing at a time: the tiles of its plan first, then those of the latest `Stock` order.

Knows nothing of phases. What came before a fetch was stopped stays on disk, so a stopped one goes on where it was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from protocol.errors import ManyhandsError, StorageFull
from protocol.ids import WorkerId
from protocol.messages import LoadProgress, Stock, Stocked
from protocol.tiles import TileEntry
from worker.connection import Connection
from worker.events import Fetched, FetchFailed, StartFetch
from worker.store import TileStore
from worker.tile_exchange import TileExchange

PROGRESS_S: Final = 0.5
STOCK: Final = "stock"  # the purpose of these pins


class StockOrder(NamedTuple):
    """A `Stock` and the manifest lines that came with it."""

    stock: Stock
    entries: tuple[TileEntry, ...]


class Fetching:
    """The fetches of one worker. `serve` carries them out while there is a connection."""

    def __init__(self, tiles: TileExchange, store: TileStore, on_end: Callable[[Fetched | FetchFailed], None]) -> None:
        """`on_end` is told how the fetch of a plan has ended."""
        self._tiles = tiles
        self._store = store
        self._on_end = on_end
        self._plan: StartFetch | None = None
        self._stock: StockOrder | None = None
        self._changed = asyncio.Event()

    def for_plan(self, order: StartFetch) -> None:
        """Fetch a plan's tiles, in place of any fetch under way."""
        self._plan = order
        self._changed.set()

    def stop(self) -> None:
        """Fetch no more for a plan."""
        self._plan = None
        self._changed.set()

    def stock(self, order: StockOrder) -> None:
        """Fetch these when nothing is fetched for a plan; an older order is over."""
        self._stock = order
        if self._plan is None:
            self._changed.set()

    async def serve(self, connection: Connection, own: WorkerId) -> None:
        """Fetch what is wanted, until cancelled; what is wanted then is not wanted any more."""
        try:
            while True:
                self._changed.clear()
                await self._until_changed(connection, own)
        finally:
            self._plan = self._stock = None

    async def _until_changed(self, connection: Connection, own: WorkerId) -> None:
        changed = asyncio.create_task(self._changed.wait())
        work = asyncio.create_task(self._fetch(connection, own))
        try:
            await asyncio.wait((changed, work), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
                await changed
        finally:
            changed.cancel()
            work.cancel()
            await asyncio.gather(changed, work, return_exceptions=True)

    async def _fetch(self, connection: Connection, own: WorkerId) -> None:
        plan = self._plan
        if plan is not None:
            ended = await self._fetch_for_plan(connection, own, plan)
            if self._plan is plan:
                self._plan = None
            self._on_end(ended)
        stock = self._stock
        if stock is not None and self._plan is None:
            await self._fetch_for_stock(connection, own, stock)
            if self._stock is stock:
                self._stock = None

    async def _fetch_for_plan(self, connection: Connection, own: WorkerId, order: StartFetch) -> Fetched | FetchFailed:
        def tell(done_bytes: int, total_bytes: int) -> None:
            connection.say(
                LoadProgress(epoch=order.epoch, phase="fetch", done_bytes=done_bytes, total_bytes=total_bytes)
            )

        async def fetch() -> int:
            return await self._tiles.fetch(
                connection, own, order.entries, order.holders, on_progress=_now_and_then(tell)
            )

        try:
            try:
                fetched_bytes = await fetch()
            except StorageFull:  # what is kept for a plan to come makes way
                self._store.pin((), STOCK)
                fetched_bytes = await fetch()
        except ManyhandsError as error:
            return FetchFailed(epoch=order.epoch, error=error)
        return Fetched(epoch=order.epoch, fetched_bytes=fetched_bytes)

    async def _fetch_for_stock(self, connection: Connection, own: WorkerId, order: StockOrder) -> None:
        number, entries = order.stock.order, order.entries
        total_bytes = sum({entry.digest: entry.num_bytes for entry in entries}.values())
        done_bytes = 0

        def tell(now_done_bytes: int, _: int) -> None:
            nonlocal done_bytes
            done_bytes = now_done_bytes
            connection.say(Stocked(order=number, done_bytes=done_bytes, total_bytes=total_bytes))

        error = ""
        try:
            await self._tiles.fetch(
                connection, own, entries, order.stock.holders, on_progress=_now_and_then(tell), purpose=STOCK
            )
            done_bytes = total_bytes
        except ManyhandsError as failure:
            error = str(failure)[:1000]
        connection.say(Stocked(order=number, done_bytes=done_bytes, total_bytes=total_bytes, is_over=True, error=error))


def _now_and_then(tell: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """Tell twice a second, and at the end."""
    told_at = 0.0

    def on_progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= PROGRESS_S or done_bytes == total_bytes:
            told_at = time.monotonic()
            tell(done_bytes, total_bytes)

    return on_progress

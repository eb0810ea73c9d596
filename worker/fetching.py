"""Fetches the tiles of a plan and tells how far that has come.

Knows nothing of phases: it returns the event that its end is.
"""

from __future__ import annotations

import time
from typing import Final

from protocol.errors import ManyhandsError
from protocol.ids import WorkerId
from protocol.messages import LoadProgress
from worker.connection import Connection
from worker.events import Fetched, FetchFailed, StartFetch
from worker.tile_exchange import TileExchange

PROGRESS_S: Final = 0.5


async def fetch_for_plan(
    connection: Connection, tiles: TileExchange, own: WorkerId, order: StartFetch
) -> Fetched | FetchFailed:
    """Fetch what is missing, with `LoadProgress` twice a second; what came before a failure stays on disk."""
    told_at = 0.0

    def tell_progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= PROGRESS_S or done_bytes == total_bytes:
            told_at = time.monotonic()
            connection.say(
                LoadProgress(epoch=order.epoch, phase="fetch", done_bytes=done_bytes, total_bytes=total_bytes)
            )

    try:
        fetched_bytes = await tiles.fetch(connection, own, order.entries, order.holders, on_progress=tell_progress)
    except ManyhandsError as error:
        return FetchFailed(epoch=order.epoch, error=error)
    return Fetched(epoch=order.epoch, fetched_bytes=fetched_bytes)

"""Serves ranges of tiles to workers: who may have which, how many at once, read in threads.

Knows nothing of sockets: a request and who asks come in, the bytes or a typed error go out.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from coordinator.admission import Party
from coordinator.catalogue import Catalogue
from protocol.errors import AccessRefused, Overloaded
from protocol.messages import Role, TileRequest
from protocol.tiles import HEAD_KINDS

READ_THREADS = 2
MAX_OUTSTANDING = 64  # requests of one worker; with 1 MiB each its share of memory is bounded


class TileService:
    """Reads tiles for workers. Use from one event loop; `close` when no request is under way any more."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._pool = ThreadPoolExecutor(READ_THREADS, "tile-read")
        self._outstanding: Counter[str] = Counter()

    def reserve(self, party: Party, asked: TileRequest) -> None:
        """Take a request in; `read` must follow.

        Raises TileUnavailable for an unknown digest, AccessRefused for the head's tiles to any other worker, Overloaded
        for too many requests at once.
        """
        tile = self._catalogue.tile_of(asked.digest)
        if tile.kind in HEAD_KINDS and party.role is not Role.HEAD:
            raise AccessRefused(
                f"{tile} belongs to the head", node=party.name, phase="fetch", remedy="join with a trusted invitation"
            )
        if self._outstanding[party.name] >= MAX_OUTSTANDING:
            raise Overloaded(
                f"{MAX_OUTSTANDING} tile requests of {party.name} are under way", node=party.name, phase="fetch"
            )
        self._outstanding[party.name] += 1

    async def read(self, party: Party, asked: TileRequest) -> bytes:
        """Return the bytes that a worker asked for; raises what `Catalogue.read` raises."""
        try:
            loop = asyncio.get_running_loop()
            # Disk and hashing only, no wait for a peer: no deadline. A read under way ends even when we are cancelled.
            return await loop.run_in_executor(
                self._pool, self._catalogue.read, asked.digest, asked.offset, asked.length
            )
        finally:
            self._outstanding[party.name] -= 1
            if not self._outstanding[party.name]:
                del self._outstanding[party.name]

    def close(self) -> None:
        """Wait for reads that are under way, then close the threads and the catalogue."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._catalogue.close()

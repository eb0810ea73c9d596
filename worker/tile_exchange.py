"""How tiles come to this worker and go from it to others: whom it serves, what it offers, and where that is told.

Knows nothing of phases or plans: the control side passes on what it hears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import zmq.asyncio

from protocol.ids import WorkerId
from protocol.messages import Holder, LinkOrder, Peer
from protocol.security import KeyPair
from protocol.tiles import TileEntry
from worker.addresses import tile_addresses
from worker.config import WorkerConfig
from worker.fetch_lines import Bulk
from worker.fetch_sources import COORDINATOR
from worker.fetcher import Fetcher
from worker.store import TileStore
from worker.tile_server import TileServer
from worker.tile_source import TileDialer

MAX_MEMBERS: Final = 1024


class TileExchange:
    """The tile server, where the owner lets one be, and fetches from other workers' ones.

    Counts bytes since it was made: `from_peers_bytes` and `from_coordinator_bytes` came, `served_bytes` went.
    """

    def __init__(self, config: WorkerConfig, keys: KeyPair, store: TileStore, context: zmq.asyncio.Context) -> None:
        """Listen as the settings say; raises ConfigInvalid when that is not possible."""
        self._keys = keys
        self._store = store
        self._context = context
        self._members: dict[bytes, None] = {}
        self.from_peers_bytes = 0
        self.from_coordinator_bytes = 0
        self._advertised = config.advertise
        self._server = TileServer(keys, config.tile_address, store) if config.tile_address else None

    def addresses(self, coordinators: Sequence[str]) -> tuple[str, ...]:
        """Return where other workers may fetch tiles from; empty when this worker serves none."""
        if self._server is None:
            return ()
        return tile_addresses(self._server.address, self._advertised, coordinators)

    def ordered(self, entries: Iterable[TileEntry], links: Iterable[LinkOrder], holders: Iterable[Holder]) -> None:
        """An order names tiles that this worker is to have, and members of the cluster: serve those to them."""
        self.met(order.peer for order in links)
        self.met(holder.peer for holder in holders)
        if self._server is not None:
            self._server.offer(entries)

    def met(self, peers: Iterable[Peer]) -> None:
        """The coordinator named these members: serve them from now on, and those it named before.

        An order has no room for all members, so no order says who is none any more; those named last are remembered.
        """
        for peer in peers:
            self._members.pop(peer.public_key, None)
            self._members[peer.public_key] = None
        for key in list(self._members)[:-MAX_MEMBERS]:
            del self._members[key]
        if self._server is not None:
            self._server.admit(self._members)

    async def fetch(
        self,
        bulk: Bulk,
        own: WorkerId,
        entries: Sequence[TileEntry],
        holders: Iterable[Holder],
        *,
        on_progress: Callable[[int, int], None],
        purpose: str = "plan",
    ) -> int:
        """Fetch what is missing, as `own`, from `holders` first; return how many bytes came.

        Raises what `Fetcher.run` raises. One fetch at a time may use `bulk`.
        """
        dialer = TileDialer(self._context, self._keys, own)
        fetcher = Fetcher(bulk, self._store, entries, holders, dialer, purpose=purpose)
        try:
            return await fetcher.run(on_progress)
        finally:
            came = fetcher.fetched_bytes
            self.from_coordinator_bytes += came[COORDINATOR]
            self.from_peers_bytes += came.total() - came[COORDINATOR]

    @property
    def served_bytes(self) -> int:
        """Bytes of tiles that went to other workers so far."""
        return self._server.num_served_bytes if self._server is not None else 0

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.close()

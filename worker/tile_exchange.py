"""How tiles come to this worker and go from it to others: whom it serves, what it offers, and where that is told.

Knows nothing of phases or plans: the control side passes on what it hears.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from protocol.messages import Holder, LinkOrder, Peer
from protocol.security import KeyPair
from protocol.tiles import TileEntry
from worker.addresses import tile_addresses
from worker.config import WorkerConfig
from worker.store import TileStore
from worker.tile_server import TileServer


class TileExchange:
    """The tile server, where the owner lets one be."""

    def __init__(self, config: WorkerConfig, keys: KeyPair, store: TileStore) -> None:
        """Listen as the settings say; raises ConfigInvalid when that is not possible."""
        self._advertised = config.advertise
        self._server = TileServer(keys, config.tile_address, store) if config.tile_address else None

    def addresses(self, coordinators: Sequence[str]) -> tuple[str, ...]:
        """Return where other workers may fetch tiles from; empty when this worker serves none."""
        if self._server is None:
            return ()
        return tile_addresses(self._server.address, self._advertised, coordinators)

    def ordered(self, entries: Iterable[TileEntry], links: Iterable[LinkOrder], holders: Iterable[Holder]) -> None:
        """An order names the members of the cluster, and tiles that this worker is to have: serve those to them."""
        if self._server is not None:
            self._server.admit([*(order.peer.public_key for order in links), *(one.peer.public_key for one in holders)])
            self._server.offer(entries)

    def met(self, peers: Iterable[Peer]) -> None:
        """A probe names peers, newcomers among them: they may fetch as well."""
        if self._server is not None:
            self._server.admit_too(peer.public_key for peer in peers)

    @property
    def served_bytes(self) -> int:
        """Bytes of tiles that went to other workers so far."""
        return self._server.num_served_bytes if self._server is not None else 0

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.close()

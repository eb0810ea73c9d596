"""A connection to another worker's tile server, dialled with the first request.

Knows nothing of what is fetched or why.
"""

from __future__ import annotations

import secrets
from typing import Final, NamedTuple

import zmq
import zmq.asyncio

from protocol.errors import AccessRefused, CoordinatorLost, PeerLost
from protocol.frames import Received, decode, encode
from protocol.ids import WorkerId
from protocol.messages import Peer, TileRequest
from protocol.security import KeyPair
from protocol.transport import dial_first, end_monitor, monitor_of, receive_dealer
from worker.fetch_sources import PEER_BITE_BYTES

MAX_ADDRESSES: Final = 4  # they share the time that an answer may take
DIAL_S: Final = 4.0
MAX_ANSWER_BYTES: Final = PEER_BITE_BYTES + 2**16


class TileLine:
    """A connection that has answered once. Owns its socket."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket
        try:
            self._monitor = monitor_of(socket, zmq.EVENT_DISCONNECTED)
        except BaseException:
            socket.close(linger=0)
            raise

    async def send(self, message: object) -> None:
        """Send one request."""
        await self._socket.send_multipart(encode(message))

    async def receive(self) -> Received:
        """Return the next answer; raises ProtocolViolation."""
        return decode(await receive_dealer(self._socket))

    async def broken(self) -> None:
        """Wait until the connection breaks; the socket would dial again, but what was asked is lost."""
        await self._monitor.recv_multipart()

    def close(self) -> None:
        """Close the connection."""
        end_monitor(self._socket, self._monitor)
        self._socket.close(linger=0)


class OpenLine(NamedTuple):
    """A new connection and its answer to the first request."""

    line: TileLine
    answer: Received


class TileDialer:
    """Dials tile servers under this worker's key."""

    def __init__(self, context: zmq.asyncio.Context, keys: KeyPair, own: WorkerId) -> None:
        self._context = context
        self._keys = keys
        self._own = own

    @property
    def own_key(self) -> bytes:
        """Our own public key: nobody fetches from itself."""
        return self._keys.public

    async def open(self, peer: Peer, first: TileRequest) -> OpenLine:
        """Dial a peer's addresses and keep the first that answers; raises PeerLost, LinkInvalid, ProtocolViolation."""
        routing_id = f"{self._own}/tiles/{secrets.token_hex(8)}".encode()
        addresses = peer.addresses[:MAX_ADDRESSES]
        try:
            socket, frames = await dial_first(
                self._context, addresses, self._keys, peer.public_key, routing_id, encode(first), DIAL_S,
                MAX_ANSWER_BYTES,
            )  # fmt: skip
        except AccessRefused as error:
            raise PeerLost(f"it does not let this worker in ({', '.join(addresses)})", phase="fetch") from error
        except CoordinatorLost as error:
            raise PeerLost(error.message, phase="fetch") from error
        except zmq.ZMQError as error:  # no descriptor left, for one: this source fails, and the fetch goes on
            raise PeerLost(f"it can't be dialled from here: {error.strerror}", phase="fetch") from error
        line = TileLine(socket)
        try:
            return OpenLine(line, decode(frames))
        except BaseException:
            line.close()
            raise

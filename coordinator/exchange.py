"""The coordinator's one ROUTER: binds it, receives, and sends without ever waiting for a peer.

Knows nothing of messages. A peer that is gone or does not keep up is a `False`, which the caller must act on.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence
from typing import Final, cast

import zmq
import zmq.asyncio

from protocol.errors import InvariantBroken
from protocol.frames import Buffer
from protocol.gate import Gate
from protocol.messages import MAX_TENSOR_BYTES
from protocol.security import KeyPair
from protocol.transport import Envelope, bind_router, receive

SEND_HWM: Final = 256  # messages kept for a peer that does not read; tile chunks of 1 MiB are the largest of them
GOODBYE_MS: Final = 500  # how long last words may take to leave
_UNDELIVERED: Final = frozenset({errno.EAGAIN, errno.EHOSTUNREACH})


class Exchange:
    """The listening socket with its gate and context; `port` is the actual one. One event loop uses it."""

    def __init__(self, address: str, keys: KeyPair, admits: Callable[[bytes], bool]) -> None:
        """Listen on "host:port"; raises ConfigInvalid. `admits` is called in the gate's thread."""
        self._context = zmq.asyncio.Context()
        self._gate = Gate(self._context, admits)
        try:
            self._gate.start()
            self._router, endpoint = bind_router(self._context, keys, address, MAX_TENSOR_BYTES, SEND_HWM)
        except BaseException:
            self._gate.close()
            self._context.term()
            raise
        self.port = int(endpoint.rpartition(":")[2])

    async def receive(self) -> Envelope:
        """Wait for the next message of anybody."""
        return await receive(self._router)

    def send(self, routing_id: bytes, frames: Sequence[Buffer]) -> bool:
        """Hand a message to the transport at once; False when the peer is not connected, or its queue is full.

        The frames must not change any more.
        """
        sent = self._router.send_multipart([routing_id, *frames], flags=zmq.NOBLOCK, copy=False)
        future = cast("asyncio.Future[object]", sent)
        if not future.done():
            raise InvariantBroken("a send without waiting waits")
        error = future.exception()
        if error is None:
            return True
        if isinstance(error, zmq.ZMQError) and error.errno in _UNDELIVERED:
            return False
        raise error

    def close(self) -> None:
        """Stop listening; blocks for at most half a second until last words have left."""
        self._router.close(linger=GOODBYE_MS)
        self._gate.close()
        self._context.term()

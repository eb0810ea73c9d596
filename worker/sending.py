"""How the compute thread sends: never blocking without end, and without a copy where that is cheaper.

Knows nothing of messages or of whom a socket leads to.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import zmq

from protocol.frames import Buffer
from protocol.messages import MAX_TENSOR_BYTES

MAX_FRAME_BYTES: Final = MAX_TENSOR_BYTES + 2**20
COPY_MOST_BYTES: Final = 64 * 1024
SEND_DEADLINE_S: Final = 5.0


def send_within(socket: zmq.Socket[Any], frames: Sequence[Buffer], deadline_s: float = SEND_DEADLINE_S) -> None:
    """Send, waiting while the socket is full or down; a large last frame is lent, so keep it unchanged for good.

    Raises zmq.Again when it is not taken in time, ZMQError when there is no way to the peer.
    """
    copy = memoryview(frames[-1]).nbytes <= COPY_MOST_BYTES
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            socket.send_multipart(frames, zmq.NOBLOCK, copy=copy)
            return
        except zmq.Again:
            if time.monotonic() >= deadline:
                raise
            socket.poll(50, zmq.POLLOUT)

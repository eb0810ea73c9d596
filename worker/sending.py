"""How the compute thread sends and receives: never blocking without end, and without a copy where that is cheaper.

Knows nothing of messages or of whom a socket leads to.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

import zmq
from zmq.backend import Socket as PlainSocket

from protocol.frames import Buffer
from protocol.messages import MAX_TENSOR_BYTES

MAX_FRAME_BYTES: Final = MAX_TENSOR_BYTES + 2**20
COPY_MOST_BYTES: Final = 64 * 1024
SEND_DEADLINE_S: Final = 5.0
DEAF_MOST_MS: Final = 10  # RCVTIMEO of sockets that are waited at one by one
UNDELIVERED: Final = frozenset({errno.EAGAIN, errno.EHOSTUNREACH})
NOBLOCK: Final = int(zmq.NOBLOCK)  # plain numbers: adding two members of pyzmq's enum takes as long as sending 4 KiB
NOBLOCK_MORE: Final = int(zmq.NOBLOCK) + int(zmq.SNDMORE)
BLOCK: Final = 0
send_plain: Final = PlainSocket.send  # its subclass has a `send` around it, for kinds of sockets that we don't use


def send_within(socket: zmq.Socket[Any], frames: Sequence[Buffer], deadline_s: float = SEND_DEADLINE_S) -> None:
    """Send, waiting while the socket is full or down; a large last frame is lent, so keep it unchanged for good.

    Raises zmq.Again when it is not taken in time, ZMQError when there is no way to the peer.
    """
    deadline = 0.0
    while True:
        try:
            return send_now(socket, frames)
        except zmq.Again:
            deadline = deadline or time.monotonic() + deadline_s
            if time.monotonic() >= deadline:
                raise
            socket.poll(50, zmq.POLLOUT)


def send_now(socket: zmq.Socket[Any], frames: Sequence[Buffer]) -> None:
    """Send or raise zmq.Again; either all frames are taken or none."""
    *before, last = frames
    for frame in before:
        send_plain(socket, frame, NOBLOCK_MORE)
    if len(last) <= COPY_MOST_BYTES:
        send_plain(socket, last, NOBLOCK)
    else:
        send_plain(socket, last, NOBLOCK, copy=False)


class Lent(Protocol):
    """A message that a socket has taken; `done` once its bytes are on their way and its memory is free."""

    @property
    def done(self) -> bool:
        """Whether the socket needs the memory no more."""
        ...


def lend(socket: zmq.Socket[Any], frames: Sequence[Buffer]) -> Lent | None:
    """Send, or return None when the socket is full or there is no way to the peer; the last frame is not copied."""
    try:
        for frame in frames[:-1]:
            socket.send(frame, NOBLOCK_MORE)
        return socket.send(frames[-1], NOBLOCK, copy=False, track=True)
    except zmq.ZMQError as error:
        if error.errno in UNDELIVERED:
            return None
        raise


def receive_now(socket: zmq.Socket[Any]) -> list[zmq.Frame]:
    """Return the frames of one message, not copied, or raise zmq.Again."""
    return receive_rest(socket, [socket.recv(NOBLOCK, copy=False)])


def receive_rest(socket: zmq.Socket[Any], frames: list[zmq.Frame]) -> list[zmq.Frame]:
    """Return all frames of a message of which some were received; they are all there when the first is."""
    while frames[-1].more:
        frames.append(socket.recv(BLOCK, copy=False))
    return frames

"""One authenticated connection to a coordinator: dialled and greeted, then messages both ways until it ends.

Knows nothing of requests; `manyhands.line` makes one connection after another of the same conversation.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

import zmq
import zmq.asyncio

from protocol.errors import CoordinatorLost, FrameMalformed, Overloaded
from protocol.frames import Buffer, decode, encode
from protocol.messages import (
    MAX_HEADER_BYTES,
    MAX_STATUS_BYTES,
    OLDEST_VERSION,
    VERSION,
    ClientHello,
    ErrorReport,
    Welcome,
)
from protocol.security import Link
from protocol.transport import dial_first, end_monitor, monitor_of, receive_dealer
from protocol.version import SOFTWARE

MAX_MESSAGE_BYTES = MAX_STATUS_BYTES + MAX_HEADER_BYTES
MAX_OUTBOX = 1024
GOODBYE_MS = 500  # how long last messages may take to leave

Status = dict[str, Any]
OnMessage = Callable[[Any, memoryview], None]


class Connection:
    """A connection that has been welcomed; make one with `Connection.open`, end it with `close`."""

    def __init__(self, link: Link, context: zmq.asyncio.Context, socket: Any) -> None:
        self._where = ", ".join(link.addresses)
        self._context = context
        self._socket = socket
        self._monitor = monitor_of(socket, zmq.EVENT_DISCONNECTED)
        self._outbox: asyncio.Queue[list[Buffer]] = asyncio.Queue(MAX_OUTBOX)

    @classmethod
    async def open(cls, link: Link, timeout_s: float) -> Connection:
        """Dial all addresses of a link and greet; raises CoordinatorLost, AccessRefused, VersionMismatch."""
        hello = ClientHello(oldest_version=OLDEST_VERSION, version=VERSION, software=SOFTWARE)
        routing_id = b"client-" + secrets.token_hex(8).encode()  # a fresh one: the last may still be known there
        context = zmq.asyncio.Context()
        try:
            socket, frames = await dial_first(
                context, link.addresses, link.keys, link.server_key, routing_id, encode(hello), timeout_s,
                MAX_MESSAGE_BYTES,
            )  # fmt: skip
            reply = decode(frames).message
            if isinstance(reply, ErrorReport):
                raise reply.error()
            if not isinstance(reply, Welcome):
                raise FrameMalformed(f"{type(reply).__name__} in answer to ClientHello", phase="handshake")
            return cls(link, context, socket)
        except BaseException:
            context.destroy(linger=0)
            raise

    def require_room(self) -> None:
        """Raise Overloaded when more messages wait to be sent than is sensible."""
        if self._outbox.full():
            raise Overloaded(f"{MAX_OUTBOX} messages to {self._where} wait to be sent", remedy="ask for less at once")

    def post(self, frames: list[Buffer]) -> None:
        """Send a message as soon as the transport takes it; raises Overloaded."""
        self.require_room()
        self._outbox.put_nowait(frames)

    async def sent(self) -> None:
        """Wait until all that was posted is with the transport; nobody may be there to take it, so set a deadline."""
        await self._outbox.join()

    async def run(self, on_message: OnMessage) -> None:
        """Send and receive until it ends; raises, alone or in a group, CoordinatorLost or what `on_message` raises."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._send())
            group.create_task(self._receive(on_message))
            group.create_task(self._notice_break())

    def close(self) -> None:
        """Hang up; last messages have half a second to leave. Nothing may run any more."""
        end_monitor(self._socket, self._monitor)
        self._socket.close(linger=GOODBYE_MS)
        self._context.destroy(linger=GOODBYE_MS)

    async def _send(self) -> None:
        while True:
            frames = await self._outbox.get()
            try:
                await self._socket.send_multipart(frames)
            finally:
                self._outbox.task_done()

    async def _receive(self, on_message: OnMessage) -> None:
        while True:
            message, payload = decode(await receive_dealer(self._socket))
            on_message(message, payload)

    async def _notice_break(self) -> None:
        # The socket would dial again by itself, but what was on its way is gone: a new connection asks for it again.
        await self._monitor.recv_multipart()
        raise CoordinatorLost(f"the connection to {self._where} broke")

"""The worker's connections to its coordinator: enrol, say hello, then a control and a bulk connection.

Knows nothing of what the messages lead to.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from typing import Final, NamedTuple

import zmq
import zmq.asyncio

from protocol.errors import CoordinatorLost, LinkInvalid, ProtocolViolation
from protocol.frames import Received, decode, encode
from protocol.messages import (
    MAX_MANIFEST_BYTES,
    MAX_TILE_CHUNK_BYTES,
    OLDEST_VERSION,
    VERSION,
    Enroll,
    Enrolled,
    ErrorReport,
    Hello,
    Welcome,
)
from protocol.security import KeyPair, Link
from protocol.transport import dial, dial_first, end_monitor, monitor_of, receive_dealer
from protocol.version import SOFTWARE
from worker.config import WorkerConfig
from worker.identity import Home, Identity

MAX_OUTBOX: Final = 1000
FAREWELL_MS: Final = 500
MAX_CONTROL_BYTES: Final = MAX_MANIFEST_BYTES + 2**20
MAX_BULK_BYTES: Final = MAX_TILE_CHUNK_BYTES + 2**16
_log = logging.getLogger(__name__)


async def enroll(context: zmq.asyncio.Context, link: Link, keys: KeyPair, name: str, timeout_s: float) -> Home:
    """Have our key pinned under the link's invitation; raises AccessRefused, VersionMismatch, CoordinatorLost."""
    asked = Enroll(oldest_version=OLDEST_VERSION, version=VERSION, software=SOFTWARE, name=name, public_key=keys.public)
    routing_id = f"guest/{secrets.token_hex(8)}".encode()
    socket, frames = await dial_first(
        context, link.addresses, link.keys, link.server_key, routing_id, encode(asked), timeout_s, MAX_BULK_BYTES
    )
    socket.close()
    answer = decode(frames).message
    if isinstance(answer, ErrorReport):
        raise answer.error()
    if not isinstance(answer, Enrolled):
        raise ProtocolViolation(f"{type(answer).__name__} came in answer to Enroll", phase="enroll")
    return Home(server_key=link.server_key, addresses=link.addresses, worker=answer.worker, cluster=answer.cluster)


async def find_home(context: zmq.asyncio.Context, identity: Identity, link: Link | None, config: WorkerConfig) -> Home:
    """Return where we belong, enrolling by the link when its coordinator does not know us yet.

    Raises LinkInvalid without a way, and what `enroll` raises.
    """
    home = identity.home_of(link)
    if home is not None:
        return home
    if link is None:
        raise LinkInvalid("there is no link to join by")
    home = await enroll(context, link, identity.keys, config.worker_name, config.connect_timeout_s)
    identity.remember(home)
    _log.info("enrolled as %s in cluster %s", home.worker, home.cluster)
    return home


class Greeting(NamedTuple):
    """An open connection and what the coordinator said first."""

    connection: Connection
    welcome: Welcome


class Connection:
    """The control connection, once it is welcomed, and the bulk connection beside it."""

    def __init__(self, control: zmq.asyncio.Socket, bulk: zmq.asyncio.Socket, address: str, nonce: str) -> None:
        self.address = address
        self.nonce = nonce
        self._control = control
        self._bulk = bulk
        self._outbox: asyncio.Queue[list[bytes | bytearray | memoryview]] = asyncio.Queue(MAX_OUTBOX)
        self._told: asyncio.Future[CoordinatorLost] = asyncio.get_running_loop().create_future()

    @staticmethod
    async def open(context: zmq.asyncio.Context, home: Home, keys: KeyPair, hello: Hello, timeout_s: float) -> Greeting:
        """Dial and say hello; raises AccessRefused, VersionMismatch, CoordinatorLost naming every address."""
        nonce = secrets.token_hex(8)  # keeps this connection apart from an older one that the coordinator still holds
        routing_id = f"{home.worker}/control/{nonce}".encode()
        control, frames = await dial_first(
            context, home.addresses, keys, home.server_key, routing_id, encode(hello), timeout_s, MAX_CONTROL_BYTES
        )
        try:
            answer = decode(frames).message
            if isinstance(answer, ErrorReport):
                raise answer.error()
            if not isinstance(answer, Welcome):
                raise ProtocolViolation(f"{type(answer).__name__} came in answer to Hello", phase="hello")
            address = bytes(control.get(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode("ascii")
            routing_id = f"{home.worker}/bulk/{nonce}".encode()
            bulk = dial(context, address, keys, home.server_key, routing_id, MAX_BULK_BYTES)
        except BaseException:
            control.close()
            raise
        return Greeting(Connection(control, bulk, address, nonce), answer)

    def say(self, message: object) -> None:
        """Queue a message for the control connection; raises CoordinatorLost when it takes none any more."""
        try:
            self._outbox.put_nowait(encode(message))
        except asyncio.QueueFull:
            raise CoordinatorLost(f"{MAX_OUTBOX} messages wait to be sent", phase="send") from None

    async def write(self) -> None:
        """Send what is queued, for ever."""
        while True:
            await self._control.send_multipart(await self._outbox.get())

    async def hear(self) -> Received:
        """Return the next message on the control connection."""
        return decode(await receive_dealer(self._control))

    async def watch(self) -> None:
        """Wait until one of the connections breaks; raises CoordinatorLost then, and never returns.

        What was under way may be lost, and libzmq does not always reconnect: not after a frame it could not decrypt.
        """
        async with asyncio.TaskGroup() as group:
            for name, socket in (("control", self._control), ("bulk", self._bulk)):
                group.create_task(_until_broken(socket, name))
            group.create_task(self._until_told())

    def broke(self, error: CoordinatorLost) -> None:
        """Have `watch` raise this: the data connection, which others watch, is gone."""
        if not self._told.done():
            self._told.set_result(error)

    async def _until_told(self) -> None:
        raise await self._told

    async def send(self, message: object) -> None:
        """Send on the bulk connection."""
        await self._bulk.send_multipart(encode(message))

    async def receive(self) -> Received:
        """Return the next message on the bulk connection."""
        return decode(await receive_dealer(self._bulk))

    async def farewell(self, message: object) -> None:
        """Send a last message, if the coordinator still takes one within half a second."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_MS / 1000):
                while not self._outbox.empty():
                    await self._control.send_multipart(self._outbox.get_nowait())
                await self._control.send_multipart(encode(message))

    def close(self) -> None:
        """Close both connections; what was handed over is still sent for half a second."""
        self._control.close(linger=FAREWELL_MS)
        self._bulk.close(linger=0)


async def _until_broken(socket: zmq.asyncio.Socket, name: str) -> None:
    monitor = monitor_of(socket, zmq.EVENT_DISCONNECTED)
    try:
        await monitor.recv_multipart()
    finally:
        end_monitor(socket, monitor)
    raise CoordinatorLost(f"the {name} connection to the coordinator broke", phase="link")

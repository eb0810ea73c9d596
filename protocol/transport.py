"""Sockets as this project uses them: ROUTERs behind the gate, DEALERs that dial, all under CURVE, all bounded.

Knows nothing of messages: frames go in and come out as buffers. What may be said by whom is decided by the caller from
`Envelope.public_key`, which the handshake proved, never from what a message claims.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar, cast

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from protocol.errors import AccessRefused, ConfigInvalid, CoordinatorLost, LinkInvalid
from protocol.frames import Buffer
from protocol.security import KeyPair

ZAP_DOMAIN: Final = b"manyhands"
HANDSHAKE_MS: Final = 5_000
CONNECT_MS: Final = 5_000
RECONNECT_FIRST_MS: Final = 100
RECONNECT_MOST_MS: Final = 5_000
HEARTBEAT_MS: Final = 3_000
HEARTBEAT_TIMEOUT_MS: Final = 15_000  # above the time a slow link needs for one large tensor, which delays the answer
KEEPALIVE_IDLE_S: Final = 30
STAGGER_S: Final = 0.25  # RFC 8305: how long the best address goes alone before the next is tried beside it
_monitors = itertools.count()
S = TypeVar("S", bound=zmq.Socket[Any])


class Envelope(NamedTuple):
    """What a ROUTER received: whom to answer, who it is, and the frames (views into received memory, not copies)."""

    routing_id: bytes
    public_key: bytes
    frames: list[memoryview]


def bind_router(
    context: zmq.Context[S], keys: KeyPair, address: str, max_message_bytes: int, send_hwm: int = 1000
) -> tuple[S, str]:
    """Return a listening ROUTER and its actual address, e.g. "tcp://127.0.0.1:40123" for "tcp://127.0.0.1:0".

    Open a `Gate` on the context first: without one every peer is refused. Sending to a peer that is gone raises
    ZMQError with errno EHOSTUNREACH, to one that does not keep up EAGAIN under NOBLOCK; handle both. A frame above
    `max_message_bytes` costs its sender the connection. Raises ConfigInvalid when the address can't be listened on.
    """
    socket = context.socket(zmq.ROUTER)
    try:
        _bound(socket, max_message_bytes, send_hwm)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        # Without this, libzmq lets every CURVE client in as long as nobody answers ZAP.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        endpoint = _endpoint(socket, address)
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigInvalid(
            f"can't listen on {address}: {error.strerror}", remedy="choose another address or port, or stop who has it"
        ) from error
    except BaseException:
        socket.close()
        raise
    actual = cast(bytes, socket.get(zmq.LAST_ENDPOINT))
    return socket, actual.rstrip(b"\0").decode("ascii")


def dial(  # noqa: PLR0917  each names one thing the socket can't do without
    context: zmq.Context[S], address: str, keys: KeyPair, server_key: bytes, routing_id: bytes, max_message_bytes: int
) -> S:
    """Return a DEALER that connects, and reconnects, to `address` ("host:port" or "tcp://host:port") on its own.

    Sends block (NOBLOCK: EAGAIN) while there is no connection, so nothing queues for a dead peer; a wrong server key
    looks like a peer that never answers, so bound every wait. A socket that the other side's gate refused never tries
    again (libzmq ends its session): where the key may be admitted later, open a new one. Closing drops what is not
    sent yet: close with `linger=500` after a farewell. Raises LinkInvalid for an address that is none.
    """
    socket = _dealer(context, keys, server_key, routing_id, max_message_bytes)
    try:
        _connect(socket, address)
    except BaseException:
        socket.close()
        raise
    return socket


def _dealer(context: zmq.Context[S], keys: KeyPair, server_key: bytes, routing_id: bytes, max_message_bytes: int) -> S:
    """Return a DEALER that is not connected yet."""
    socket = context.socket(zmq.DEALER)
    try:
        _bound(socket, max_message_bytes, 1000)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_FIRST_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MOST_MS)
        socket.setsockopt(zmq.ROUTING_ID, routing_id)
        socket.setsockopt(zmq.CURVE_SERVERKEY, server_key)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
    except BaseException:
        socket.close()
        raise
    return socket


def _connect(socket: zmq.Socket[Any], address: str) -> None:
    """Begin to connect; raises LinkInvalid when the address is none."""
    try:
        socket.connect(_endpoint(socket, address))
    except zmq.ZMQError as error:
        raise LinkInvalid(f"can't dial {address!r:.80}: {error.strerror}") from error


def _bound(socket: zmq.Socket[Any], max_message_bytes: int, hwm: int) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    socket.setsockopt(zmq.SNDHWM, hwm)
    socket.setsockopt(zmq.RCVHWM, hwm)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_IDLE_S)


def monitor_of(socket: S, events: int) -> S:
    """Return a socket that tells these events of another; end it with `end_monitor`.

    Each has an address of its own: the one that pyzmq makes from the descriptor may still be taken, by the monitor
    that this socket had before, or by that of the descriptor's last owner.
    """
    return socket.get_monitor_socket(events, f"inproc://monitor-{next(_monitors)}")


def end_monitor(socket: zmq.Socket[Any], monitor: zmq.Socket[Any]) -> None:
    """End what `monitor_of` began; the socket that was watched stays open."""
    socket.disable_monitor()
    monitor.close(linger=0)


def _endpoint(socket: zmq.Socket[Any], address: str) -> str:
    if "[" in address:
        socket.setsockopt(zmq.IPV6, 1)  # only for IPv6 literals: a name may resolve to IPv6 that leads nowhere
    return address if "://" in address else f"tcp://{address}"


def envelope_of(frames: Sequence[zmq.Frame]) -> Envelope:
    """Take apart what `router.recv_multipart(copy=False)` returned.

    Raises AccessRefused for a message without a proven key, which a socket of `bind_router` never delivers.
    """
    return Envelope(frames[0].bytes, proven_key(frames[-1]), [frame.buffer for frame in frames[1:]])


def proven_key(frame: zmq.Frame) -> bytes:
    """Return the key that the gate let in on the connection this frame came by; raises AccessRefused without one.

    libzmq keeps it with the connection, so it can't be forged or go stale. A routing id proves nothing by itself: its
    owner chose it, and when a connection has ended another admitted peer may take the same id before anybody hears of
    the end. Hence every frame is asked.
    """
    try:
        return str(frame.get("User-Id")).encode("ascii")
    except zmq.ZMQError:
        raise AccessRefused("a message came without a proven key", phase="receive") from None


async def receive(router: zmq.asyncio.Socket) -> Envelope:
    """Wait for the next message of any peer; waits for ever, so set a deadline around it where life depends on it."""
    return envelope_of(await router.recv_multipart(copy=False))


async def receive_dealer(socket: zmq.asyncio.Socket) -> list[memoryview]:
    """Wait for the next message from the other end; waits for ever, so set a deadline around it."""
    return [frame.buffer for frame in await socket.recv_multipart(copy=False)]


async def dial_first(  # noqa: PLR0917  those of `dial`, and what to say
    context: zmq.asyncio.Context,
    addresses: Sequence[str],
    keys: KeyPair,
    server_key: bytes,
    routing_id: bytes,
    hello: Sequence[Buffer],
    timeout_s: float,
    max_message_bytes: int,
) -> tuple[zmq.asyncio.Socket, list[memoryview]]:
    """Dial all addresses of one server and keep the first that answers `hello`; returns its socket and the answer.

    Addresses are started a quarter of a second apart, best first, and never two greet at once: they may all lead to
    the same server, where a second greeting would spend an invitation twice. Raises AccessRefused when the server
    turned our key away, CoordinatorLost when nobody answered within `timeout_s`; both name every address.
    """

    def open_socket() -> zmq.asyncio.Socket:
        return _dealer(context, keys, server_key, routing_id, max_message_bytes)

    attempts = [_Attempt(address, open_socket) for address in dict.fromkeys(addresses)]
    turn = asyncio.Lock()
    patience_s = timeout_s / max(1, len(attempts))
    tasks = [
        asyncio.create_task(attempt.greet(hello, number * STAGGER_S, turn, patience_s))
        for number, attempt in enumerate(attempts)
    ]
    kept: _Attempt | None = None
    try:
        async with asyncio.timeout(timeout_s):
            kept = await _first_answer(attempts, tasks)
    except TimeoutError:
        pass
    finally:
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
        except asyncio.CancelledError:  # nobody is there any more to take the socket that answered
            kept = None
            raise
        finally:
            for attempt in attempts:
                attempt.close(keep=attempt is kept)
    if kept is None or kept.socket is None:
        raise _nobody_answered(attempts, timeout_s)
    return kept.socket, kept.answer


async def _first_answer(attempts: list[_Attempt], tasks: list[asyncio.Task[None]]) -> _Attempt | None:
    waiting = set(tasks)
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        for attempt in attempts:
            if attempt.answer:
                return attempt
    return None


def _nobody_answered(attempts: list[_Attempt], timeout_s: float) -> AccessRefused | CoordinatorLost:
    tried = "; ".join(f"{attempt.address}: {attempt.state}" for attempt in attempts) or "the link has no address"
    if any(attempt.was_refused for attempt in attempts):
        return AccessRefused(f"the coordinator refused this key ({tried})", phase="dial")
    return CoordinatorLost(f"no answer within {timeout_s:g} s ({tried})", phase="dial")


class _Attempt:
    """One address on trial: its socket, how far it came, and the answer."""

    def __init__(self, address: str, open_socket: Callable[[], zmq.asyncio.Socket]) -> None:
        self.address = address
        self.socket: zmq.asyncio.Socket | None = None
        self.answer: list[memoryview] = []
        self.state = "not reached (wrong address, firewall, or nobody listens)"
        self.was_refused = False
        self._open_socket = open_socket
        self._monitor: zmq.asyncio.Socket | None = None

    async def greet(self, hello: Sequence[Buffer], start_s: float, turn: asyncio.Lock, patience_s: float) -> None:
        """After `start_s`, connect; at our turn say hello; wait up to `patience_s` for the answer."""
        await asyncio.sleep(start_s)  # not even connected before: a ROUTER is deaf to a second peer of the same id
        self.socket = self._open_socket()
        events = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        # Watched before it connects: on loopback hands may be shaken before the next line is reached.
        self._monitor = monitor_of(self.socket, events)
        _connect(self.socket, self.address)
        if not await self._shakes_hands(self._monitor):
            return
        async with turn:
            with contextlib.suppress(TimeoutError):  # others may have their turn; no answer is no error here
                async with asyncio.timeout(patience_s):
                    await self.socket.send_multipart(list(hello))
                    self.answer = await receive_dealer(self.socket)

    async def _shakes_hands(self, monitor: zmq.asyncio.Socket) -> bool:
        while True:
            event = parse_monitor_message(await monitor.recv_multipart())
            match event["event"]:
                case zmq.EVENT_CONNECTED:
                    self.state = "reached, but it never proved the link's server key (wrong link, or not manyhands)"
                case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self.state = "reached and proven, but it did not answer"
                    return True
                case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    self.state = "reached, and our key was refused"
                    self.was_refused = True
                    return False

    def close(self, *, keep: bool) -> None:
        """End the monitor, and the socket unless it is the one to keep."""
        if self.socket is not None and self._monitor is not None:
            end_monitor(self.socket, self._monitor)
        if self.socket is not None and not keep:
            self.socket.close()

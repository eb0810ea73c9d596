"""One authenticated connection to a coordinator: sends requests, and brings each update to the caller it belongs to.

Knows nothing of prompts or options. What a message means is decided in `manyhands.conversation`.

Three tasks live as long as the connection: a reader, a sender with a bounded outbox, and a watch that ends silent
requests and lets the coordinator hear from us.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import Callable
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from manyhands.conversation import Conversation, Told
from manyhands.mailbox import Mailbox
from manyhands.options import Order
from protocol.errors import CoordinatorLost, FrameMalformed, InvariantBroken, ManyhandsError, Overloaded
from protocol.frames import Buffer, decode, encode
from protocol.ids import RequestId
from protocol.messages import (
    MAX_HEADER_BYTES,
    MAX_STATUS_BYTES,
    OLDEST_VERSION,
    VERSION,
    Cancel,
    ClientHello,
    ErrorReport,
    Invitation,
    InviteRequest,
    StatusReport,
    StatusRequest,
    Welcome,
)
from protocol.security import Link
from protocol.transport import dial_first, receive_dealer
from protocol.version import SOFTWARE

MAX_MESSAGE_BYTES = MAX_STATUS_BYTES + MAX_HEADER_BYTES
MAX_OUTBOX = 1024
WATCH_EVERY_S = 0.25
GOODBYE_S = 0.5  # how long the last Cancel messages may take to leave

log = logging.getLogger(__name__)

Status = dict[str, Any]
T = TypeVar("T")


class Connection:
    """A connection that has been welcomed; make one with `Connection.open`, end it with `close`."""

    def __init__(self, link: Link, context: zmq.asyncio.Context, socket: Any, timeout_s: float) -> None:
        self._context = context
        self._socket = socket
        self._timeout_s = timeout_s
        self._where = ", ".join(link.addresses)
        self._now: Callable[[], float] = asyncio.get_running_loop().time
        self._talk = Conversation(timeout_s=timeout_s, addresses=link.addresses, now=self._now())
        self._mailboxes: dict[RequestId, Mailbox] = {}
        self._status_waiters: list[asyncio.Future[Status]] = []
        self._invite_waiters: list[asyncio.Future[str]] = []
        self._outbox: asyncio.Queue[list[Buffer]] = asyncio.Queue(MAX_OUTBOX)
        self._is_silent = False
        self._task = asyncio.create_task(self._run(), name="manyhands connection")

    @classmethod
    async def open(cls, link: Link, timeout_s: float) -> Connection:
        """Dial all addresses of a link and greet; raises CoordinatorLost, AccessRefused, VersionMismatch."""
        hello = ClientHello(oldest_version=OLDEST_VERSION, version=VERSION, software=SOFTWARE)
        routing_id = b"client-" + secrets.token_hex(8).encode()
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
        except BaseException:
            context.destroy(linger=0)
            raise
        return cls(link, context, socket, timeout_s)

    @property
    def is_open(self) -> bool:
        """Whether requests can still be sent here."""
        return not self._is_silent and not self._task.done()

    def submit(self, order: Order) -> Mailbox:
        """Send a request; its updates arrive in the mailbox."""
        frames = encode(order.message, order.payload)
        self._require_room()
        self._talk.open(order.message, self._now())
        mailbox = self._mailboxes[order.message.request] = Mailbox()
        self._outbox.put_nowait(frames)
        return mailbox

    def abandon(self, request: RequestId) -> None:
        """Stop a request whose caller is no longer interested; without effect when it has ended."""
        mailbox = self._mailboxes.pop(request, None)
        if mailbox is not None:
            mailbox.close()
        if self._talk.abandon(request) and self.is_open:
            self._post(encode(Cancel(request=request)))

    async def status(self) -> Status:
        """Ask what the cluster looks like; raises CoordinatorLost."""
        return await self._ask(StatusRequest(), self._status_waiters)

    async def invite(self, trusted: bool) -> str:
        """Ask for a join link; raises CoordinatorLost, AccessRefused."""
        return await self._ask(InviteRequest(trusted=trusted), self._invite_waiters)

    async def close(self) -> None:
        """Cancel what is open and hang up; safe to call twice."""
        if self.is_open:
            for request in self._talk.open_requests:
                self.abandon(request)
            with contextlib.suppress(TimeoutError):  # nobody is there to read: then nobody works for us either
                await asyncio.wait_for(self._outbox.join(), GOODBYE_S)
            self._task.cancel()
        await asyncio.wait([self._task])

    async def _ask(self, message: object, waiters: list[asyncio.Future[T]]) -> T:
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        waiters.append(answer)
        try:
            self._post(encode(message))
            return await asyncio.wait_for(answer, self._timeout_s)
        except TimeoutError:
            name = type(message).__name__
            raise CoordinatorLost(f"{self._where} did not answer {name} in {self._timeout_s:g} s") from None
        finally:
            if answer in waiters:
                waiters.remove(answer)

    def _post(self, frames: list[Buffer]) -> None:
        self._require_room()
        self._outbox.put_nowait(frames)

    def _require_room(self) -> None:
        if not self.is_open:
            raise CoordinatorLost(f"the connection to {self._where} is closed")
        if self._outbox.full():
            raise Overloaded(f"{MAX_OUTBOX} messages to {self._where} wait to be sent", remedy="ask for less at once")

    async def _run(self) -> None:
        cause: ManyhandsError = CoordinatorLost(f"the connection to {self._where} was closed", remedy="open a client")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._send())
                group.create_task(self._receive())
                group.create_task(self._watch())
        except* ManyhandsError as errors:
            cause = _first(errors)
        except* zmq.ZMQError as errors:
            cause = CoordinatorLost(f"the connection to {self._where} broke: {errors.exceptions[0]}")
        except* Exception as errors:  # the edge of the loop: the callers learn it, whatever it was
            log.exception("client connection failed")
            cause = InvariantBroken(f"client connection failed: {errors.exceptions[0]!r:.200}")
        finally:
            self._socket.close(linger=int(GOODBYE_S * 1000))
            self._context.destroy(linger=int(GOODBYE_S * 1000))
            self._fail_all(cause)

    async def _send(self) -> None:
        while True:
            await self._socket.send_multipart(await self._outbox.get())
            self._outbox.task_done()

    async def _receive(self) -> None:
        while True:
            message, payload = decode(await receive_dealer(self._socket))
            match message:
                case StatusReport():
                    status = _parse_status(payload)
                    _answer_all(self._status_waiters, status)
                case Invitation():
                    _answer_first(self._invite_waiters, message.link)
                case ErrorReport() if not message.request:
                    self._fail_all(message.error())
                case Welcome():
                    pass
                case _ if hasattr(message, "request"):
                    self._deliver(self._talk.receive(message, self._now()))
                case _:
                    raise FrameMalformed(f"{type(message).__name__} is nothing for a client", phase="stream")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(WATCH_EVERY_S, self._timeout_s / 4))
            now = self._now()
            overdue = self._talk.overdue(now)
            self._is_silent = bool(overdue) and not self._talk.open_requests
            self._deliver(overdue)
            if self._is_silent:  # hang up: the next request dials again
                raise CoordinatorLost(f"the coordinator at {self._where} fell silent")
            if self._talk.is_ping_due(now):
                self._post(encode(StatusRequest()))

    def _deliver(self, told: list[Told]) -> None:
        for request, update in told:
            mailbox = self._mailboxes[request]
            mailbox.put(update)
            if mailbox.end is not None:
                del self._mailboxes[request]

    def _fail_all(self, error: ManyhandsError) -> None:
        self._deliver(self._talk.fail_all(error))
        waiters: list[asyncio.Future[Any]] = [*self._status_waiters, *self._invite_waiters]
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error)


def _first(errors: BaseExceptionGroup[ManyhandsError]) -> ManyhandsError:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _parse_status(payload: memoryview) -> Status:
    try:
        status = json.loads(bytes(payload))
    except ValueError as error:  # not JSON, or not UTF-8
        raise FrameMalformed(f"StatusReport can't be read: {error!s:.200}", phase="status") from error
    if not isinstance(status, dict):
        raise FrameMalformed("StatusReport is not a JSON object", phase="status")
    return status


def _answer_all(waiters: list[asyncio.Future[Status]], value: Status) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(value)


def _answer_first(waiters: list[asyncio.Future[str]], value: str) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(value)
            return

"""The line to a coordinator: one conversation over one connection after another, each update brought to its caller.

Knows nothing of prompts or options. What a message means is decided in `manyhands.conversation`.

When a connection is lost while requests are open, the line dials with growing pauses and says them again; the callers
see a pause. Without open requests it ends, and the next request makes a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import Callable
from typing import Any, TypeVar

import zmq

from manyhands.connection import Connection, Status
from manyhands.conversation import Conversation, Told
from manyhands.mailbox import Mailbox
from manyhands.options import Order
from protocol.errors import CoordinatorLost, FrameMalformed, InvariantBroken, ManyhandsError, Overloaded
from protocol.frames import encode
from protocol.ids import RequestId, WorkerId
from protocol.liveness import Backoff
from protocol.messages import (
    Cancel,
    Drain,
    Draining,
    ErrorReport,
    Invitation,
    InviteRequest,
    StatusReport,
    StatusRequest,
    Welcome,
)
from protocol.security import Link

WATCH_EVERY_S = 0.25
GOODBYE_S = 0.5  # how long the last Cancel messages may take to leave
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
SHORTEST_DIAL_S = 0.2

log = logging.getLogger(__name__)

T = TypeVar("T")


class Line:
    """A line whose first connection has been welcomed; make one with `Line.open`, end it with `close`."""

    def __init__(self, link: Link, connection: Connection, timeout_s: float, reconnect_s: float) -> None:
        self._link = link
        self._timeout_s = timeout_s
        self._where = ", ".join(link.addresses)
        self._now: Callable[[], float] = asyncio.get_running_loop().time
        self._talk = Conversation(
            timeout_s=timeout_s, reconnect_s=reconnect_s, addresses=link.addresses, now=self._now()
        )
        self._mailboxes: dict[RequestId, Mailbox] = {}
        self._status_waiters: list[asyncio.Future[Status]] = []
        self._invite_waiters: list[asyncio.Future[str]] = []
        self._drain_waiters: list[asyncio.Future[None]] = []
        self._connection: Connection | None = connection
        self._cause = CoordinatorLost(f"there was no connection to {self._where} yet")
        self._changed = asyncio.Event()  # there is a connection again, or the end of the line
        self._is_over = False
        self._task = asyncio.create_task(self._run(connection), name="manyhands line")

    @classmethod
    async def open(cls, link: Link, timeout_s: float, reconnect_s: float) -> Line:
        """Dial and greet; raises CoordinatorLost, AccessRefused, VersionMismatch."""
        return cls(link, await Connection.open(link, timeout_s), timeout_s, reconnect_s)

    @property
    def is_open(self) -> bool:
        """Whether requests can be made here; they may have to wait for the next connection."""
        return not self._is_over

    def submit(self, order: Order) -> Mailbox:
        """Send a request; its updates arrive in the mailbox. Raises CoordinatorLost, Overloaded, RequestInvalid."""
        frames, connection = encode(order.message, order.payload), self._connection
        if self._is_over:
            raise CoordinatorLost(f"the connection to {self._where} is closed")
        if connection is not None:
            connection.require_room()
        self._talk.open(order, self._now())
        mailbox = self._mailboxes[order.message.request] = Mailbox()
        if connection is not None:
            connection.post(frames)
        else:  # said with all the others, when there is one
            self._deliver(self._talk.lost(self._cause, self._now()))
        return mailbox

    def abandon(self, request: RequestId) -> None:
        """Stop a request whose caller is no longer interested; without effect when it has ended."""
        mailbox = self._mailboxes.pop(request, None)
        if mailbox is not None:
            mailbox.close()
        if self._talk.abandon(request) and self._connection is not None:
            with contextlib.suppress(Overloaded):  # it hears nothing of us anyway, and will give the request up
                self._connection.post(encode(Cancel(request=request)))

    async def status(self) -> Status:
        """Ask what the cluster looks like; raises CoordinatorLost."""
        return await self._ask(StatusRequest(), self._status_waiters)

    async def invite(self, trusted: bool) -> str:
        """Ask for a join link; raises CoordinatorLost, AccessRefused."""
        return await self._ask(InviteRequest(trusted=trusted), self._invite_waiters)

    async def drain(self, worker: WorkerId) -> None:
        """Have a worker hand over and leave; returns when that was taken note of. Raises CoordinatorLost."""
        await self._ask(Drain(worker=worker), self._drain_waiters)

    async def close(self) -> None:
        """Cancel what is open and hang up; safe to call twice."""
        connection = self._connection
        self._cause = CoordinatorLost(f"the connection to {self._where} was closed", remedy="open a client")
        for request in self._talk.open_requests:
            self.abandon(request)
        if connection is not None:
            with contextlib.suppress(TimeoutError):  # nobody is there to read: then nobody works for us either
                await asyncio.wait_for(connection.sent(), GOODBYE_S)
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _ask(self, message: object, waiters: list[asyncio.Future[T]]) -> T:
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._timeout_s):
                while self._connection is None and not self._is_over:
                    self._changed.clear()
                    await self._changed.wait()
                if self._connection is None:
                    raise CoordinatorLost(f"the connection to {self._where} is closed")
                waiters.append(answer)
                self._connection.post(encode(message))
                return await answer
        except TimeoutError:
            name = type(message).__name__
            raise CoordinatorLost(f"{self._where} did not answer {name} in {self._timeout_s:g} s") from None
        finally:
            if answer in waiters:
                waiters.remove(answer)

    # ------------------------------------------------------------ one connection after another

    async def _run(self, first: Connection) -> None:
        connection: Connection | None = first
        try:
            while connection is not None:
                error = await self._converse(connection)
                self._connection = None
                self._fail_waiters(error)
                connection = await self._next(error)
        except Exception as error:
            log.exception("the line to the coordinator failed")
            self._fail(InvariantBroken(f"the line to the coordinator failed: {error!r:.200}"))
        finally:
            self._is_over = True
            self._connection = None
            self._changed.set()
            self._fail(self._cause)

    async def _converse(self, connection: Connection) -> ManyhandsError:
        """Talk until the connection ends; returns why."""
        cause: ManyhandsError = CoordinatorLost(f"the connection to {self._where} ended")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(connection.run(self._receive))
                group.create_task(self._watch(connection))
        except* ManyhandsError as errors:
            cause = _first(errors)
        except* zmq.ZMQError as errors:
            cause = CoordinatorLost(f"the connection to {self._where} broke: {errors.exceptions[0]}")
        finally:
            connection.close()
        return cause

    async def _next(self, error: ManyhandsError) -> Connection | None:
        """Return another connection, with every open request said again; None when nobody needs one (any more)."""
        pauses = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S, random.Random())
        while isinstance(error, CoordinatorLost):
            self._cause, now = error, self._now()
            self._deliver(self._talk.lost(error, now))
            self._deliver(self._talk.give_up(error, now))
            if not self._talk.open_requests:
                return None
            await asyncio.sleep(pauses.next_s())
            dial_s = max(SHORTEST_DIAL_S, min(self._timeout_s, self._talk.patience_s(self._now())))
            try:
                connection = await Connection.open(self._link, dial_s)
            except ManyhandsError as failed:
                error = failed
            else:
                return self._resume(connection)
        self._fail(error)
        return None

    def _resume(self, connection: Connection) -> Connection:
        for frames in self._talk.say_again(self._now()):
            connection.post(frames)
        self._connection = connection
        self._changed.set()
        return connection

    async def _watch(self, connection: Connection) -> None:
        """End a connection over which a request is silent, and let the coordinator hear from us."""
        while True:
            await asyncio.sleep(min(WATCH_EVERY_S, self._timeout_s / 4))
            now = self._now()
            error = self._talk.silence(now)
            if error is not None:
                raise error
            if self._talk.is_ping_due(now):
                connection.post(encode(StatusRequest()))

    # ------------------------------------------------------------ to the callers

    def _receive(self, message: Any, payload: memoryview) -> None:
        match message:
            case StatusReport():
                status = _parse_status(payload)
                for waiter in self._status_waiters:
                    _answer(waiter, status)
            case Invitation():
                _answer(next((one for one in self._invite_waiters if not one.done()), None), message.link)
            case Draining():
                _answer(next((one for one in self._drain_waiters if not one.done()), None), None)
            case ErrorReport() if not message.request:
                self._fail(message.error())
            case Welcome():
                pass
            case _ if hasattr(message, "request"):
                self._deliver(self._talk.receive(message, self._now()))
            case _:
                raise FrameMalformed(f"{type(message).__name__} is nothing for a client", phase="stream")

    def _deliver(self, told: list[Told]) -> None:
        for request, update in told:
            mailbox = self._mailboxes[request]
            mailbox.put(update)
            if mailbox.end is not None:
                del self._mailboxes[request]

    def _fail(self, error: ManyhandsError) -> None:
        self._deliver(self._talk.fail_all(error))
        self._fail_waiters(error)

    def _fail_waiters(self, error: ManyhandsError) -> None:
        waiters: list[asyncio.Future[Any]] = [*self._status_waiters, *self._invite_waiters, *self._drain_waiters]
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


def _answer(waiter: asyncio.Future[T] | None, value: T) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(value)

"""The connections of one fetch: requests go out, answers come in with the time at which they came.

Knows nothing of what to ask for (`worker.fetch_plan`) or of disks. No source can keep another one waiting: each has its
own tasks, and what is asked of it waits in a queue of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, Protocol

from protocol.errors import InvariantBroken, ManyhandsError, PeerLost
from protocol.frames import Received
from protocol.ids import WorkerId
from protocol.messages import Peer, TileRequest
from worker.fetch_sources import COORDINATOR, MAX_PIECES
from worker.groups import most_telling
from worker.tile_source import TileDialer, TileLine

MAX_UNSENT: Final = 2 * MAX_PIECES


class Bulk(Protocol):
    """A connection that tiles come over."""

    async def send(self, message: object) -> None:
        """Send one message."""
        ...

    async def receive(self) -> Received:
        """Return the next message of the other side."""
        ...


class Came(NamedTuple):
    """What came from a source, and when; an error when its connection failed or it broke the protocol."""

    source: WorkerId
    what: Received | ManyhandsError
    at: float


Requests = asyncio.Queue[TileRequest]


class FetchLines:
    """Connections to the coordinator, which is there already, and to peers, which are dialled when they are needed."""

    def __init__(
        self,
        group: asyncio.TaskGroup,
        bulk: Bulk,
        peers: Mapping[WorkerId, Peer],
        dialer: TileDialer | None,
        clock: Callable[[], float],
    ) -> None:
        """Tasks belong to `group`, which ends when the connection to the coordinator does."""
        self._bulk = bulk
        self._peers = peers
        self._dialer = dialer
        self._clock = clock
        self._group = group
        self._tasks: dict[WorkerId, asyncio.Task[None]] = {}
        self._unsent: dict[WorkerId, Requests] = {}
        self._came: asyncio.Queue[Came] = asyncio.Queue((len(peers) + 1) * MAX_PIECES)

    def ask(self, source: WorkerId, request: TileRequest) -> None:
        """Send a request as soon as its source takes it; dial the source where that is to be done yet."""
        if source not in self._tasks:
            unsent = self._unsent[source] = asyncio.Queue(MAX_UNSENT)
            work = self._to_coordinator(unsent) if source == COORDINATOR else self._to_peer(source, unsent)
            self._tasks[source] = self._group.create_task(work)
        self._unsent[source].put_nowait(request)

    def hang_up(self, source: WorkerId) -> None:
        """Forget what is not sent yet, and close the connection to a peer."""
        if source == COORDINATOR:
            while source in self._unsent and not self._unsent[source].empty():
                self._unsent[source].get_nowait()
        elif (task := self._tasks.pop(source, None)) is not None:
            task.cancel()

    async def wait(self, timeout_s: float) -> list[Came]:
        """Return what came, waiting for it at most this long; 0: only what is here."""
        came: list[Came] = []
        if timeout_s > 0 and self._came.empty():
            try:
                came.append(await asyncio.wait_for(self._came.get(), timeout_s))
            except TimeoutError:
                return []
        while not self._came.empty():
            came.append(self._came.get_nowait())
        return came

    def close(self) -> None:
        """End all tasks; the connection to the coordinator stays open."""
        for task in self._tasks.values():
            task.cancel()

    async def _to_coordinator(self, unsent: Requests) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(_send_all(self._bulk, unsent))
            group.create_task(self._receive_all(COORDINATOR, self._bulk))

    async def _to_peer(self, source: WorkerId, unsent: Requests) -> None:
        """Talk to a peer until its connection ends; how it ended comes as the last thing from it."""
        line: TileLine | None = None
        try:
            if self._dialer is None:
                raise InvariantBroken("a peer was asked, and nothing is there to dial it with")
            line, answer = await self._dialer.open(self._peers[source], await unsent.get())
            await self._came.put(Came(source, answer, self._clock()))
            async with asyncio.TaskGroup() as group:
                group.create_task(_send_all(line, unsent))
                group.create_task(self._receive_all(source, line))
                group.create_task(_break_off(line))
        except BaseExceptionGroup as group_error:
            await self._end(source, most_telling(group_error))
        except ManyhandsError as error:
            await self._end(source, error)
        finally:
            if line is not None:
                line.close()

    async def _end(self, source: WorkerId, error: BaseException) -> None:
        if not isinstance(error, ManyhandsError):
            raise error
        del self._tasks[source]
        await self._came.put(Came(source, error, self._clock()))

    async def _receive_all(self, source: WorkerId, line: Bulk) -> None:
        while True:
            received = await line.receive()
            await self._came.put(Came(source, received, self._clock()))


async def _send_all(line: Bulk, unsent: Requests) -> None:
    while True:
        await line.send(await unsent.get())


async def _break_off(line: TileLine) -> None:
    await line.broken()
    raise PeerLost("its connection broke", phase="fetch")

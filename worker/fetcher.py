"""Fetches the tiles a plan needs that are not on this disk: asks, writes, verifies, until all are there.

Knows nothing of plans or tensors. The order of requests is `worker.fetch_plan`'s; here are only the socket, the disk
(in a thread of its own, so that a slow card can't delay heartbeats) and the deadline, which every byte extends.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol

from protocol.errors import DeadlineExceeded, ProtocolViolation
from protocol.frames import Received
from protocol.messages import ErrorReport, TileChunk
from protocol.tiles import TileEntry
from worker.fetch_plan import Action, Append, Ask, FetchPlan, Finish, Open
from worker.store import TilePart, TileStore

SILENCE_S: Final = 15.0
REPEAT_S: Final = 4.0
_log = logging.getLogger(__name__)


class Bulk(Protocol):
    """The connection that tiles come over."""

    async def send(self, message: object) -> None:
        """Send one message to the coordinator."""
        ...

    async def receive(self) -> Received:
        """Return the next message of the coordinator."""
        ...


class Fetcher:
    """One fetch: the missing tiles of one plan. Cancel the task that runs it to stop; parts on disk are kept."""

    def __init__(self, bulk: Bulk, store: TileStore, entries: Iterable[TileEntry]) -> None:
        self._bulk = bulk
        self._store = store
        self._entries = tuple(entries)
        self._parts: dict[bytes, TilePart] = {}
        self._plan = FetchPlan(())
        self._fetched_bytes = 0
        self._done_bytes = 0
        self._total_bytes = sum({entry.digest: entry.num_bytes for entry in self._entries}.values())

    async def run(self, on_progress: Callable[[int, int], None], silence_s: float = SILENCE_S) -> int:
        """Fetch what is missing and return how many bytes came over the wire.

        `on_progress(done, total)` is called after every chunk, in bytes. Raises TileUnavailable, StorageFull,
        ProtocolViolation, the coordinator's own error, or DeadlineExceeded after `silence_s` without a byte.
        """
        missing = await asyncio.to_thread(self._prepare)
        self._plan = FetchPlan(missing)
        self._done_bytes = self._total_bytes - sum(entry.num_bytes for entry in missing)
        on_progress(self._done_bytes, self._total_bytes)
        try:
            await self._do(self._plan.next_actions())
            while not self._plan.is_done:
                await self._do(await self._next_chunk(silence_s))
                await self._do(self._plan.next_actions())
                on_progress(self._done_bytes, self._total_bytes)
        finally:
            for part in self._parts.values():
                part.close()
        return self._fetched_bytes

    def _prepare(self) -> tuple[TileEntry, ...]:
        self._store.pin(self._entries)
        missing = self._store.missing(self._entries)
        self._store.make_room(missing)
        return missing

    async def _do(self, actions: Sequence[Action]) -> None:
        """Carry out actions and those that follow from them."""
        todo = deque(actions)
        while todo:
            match todo.popleft():
                case Open(entry):
                    todo.extend(await self._open(entry))
                case Ask(request):
                    await self._bulk.send(request)
                case Append(entry, data):
                    await asyncio.to_thread(self._parts[entry.digest].append, data)
                case Finish(entry):
                    await self._finish(entry)
            if not todo:
                todo.extend(self._plan.next_actions())

    async def _open(self, entry: TileEntry) -> list[Action]:
        if self._store.has(entry):
            self._plan.found(entry.digest)
            self._done_bytes += entry.num_bytes
            return []
        part = await asyncio.to_thread(self._store.open_part, entry)
        self._parts[entry.digest] = part
        self._done_bytes += part.length
        return self._plan.opened(entry.digest, part.length)

    async def _finish(self, entry: TileEntry) -> None:
        part = self._parts.pop(entry.digest)
        try:
            is_good = await asyncio.to_thread(part.finish)
        finally:
            part.close()
        if is_good:
            self._plan.verified(entry.digest)
        else:
            _log.warning("%s arrived altered, asking for it again", entry.tile)
            self._done_bytes -= entry.num_bytes
            self._plan.spoiled(entry.digest)

    async def _next_chunk(self, silence_s: float) -> list[Action]:
        """Wait for bytes; asks again now and then, for a connection that broke has lost what was under way."""
        waited_s = 0.0
        while True:
            patience_s = min(REPEAT_S, silence_s - waited_s)
            try:
                received = await asyncio.wait_for(self._bulk.receive(), patience_s)
            except TimeoutError:
                waited_s += patience_s
                if waited_s >= silence_s:
                    raise self._silence(waited_s) from None
                await self._do(self._plan.repeat())
                continue
            return self._take(received)

    def _take(self, received: Received) -> list[Action]:
        message: Any = received.message
        if isinstance(message, ErrorReport):
            if message.digest and not self._plan.waits_for(message.digest):  # the answer to a fetch before this one
                return []
            raise message.error()
        if not isinstance(message, TileChunk):
            raise ProtocolViolation(f"{type(message).__name__} came where a TileChunk was asked for", phase="fetch")
        actions = self._plan.received(message.digest, message.offset, received.payload)
        self._fetched_bytes += len(received.payload)
        self._done_bytes += sum(len(action.data) for action in actions if isinstance(action, Append))
        return actions

    def _silence(self, waited_s: float) -> DeadlineExceeded:
        tiles = ", ".join(str(entry.tile) for entry in self._plan.under_way[:3])
        return DeadlineExceeded(
            f"no byte of {tiles} came within {waited_s:g} s",
            remedy="check the connection to the coordinator; what was fetched is kept",
            phase="fetch",
        )

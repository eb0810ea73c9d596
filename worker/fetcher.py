"""Fetches the tiles a plan needs that are not on this disk: asks, writes, verifies, until all are there.

Knows nothing of plans or tensors. Whom to ask for what is `worker.fetch_plan`'s to say; here are only the disk (in a
thread of its own, so that a slow card can't delay heartbeats), the clock, and what both sides say to each other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, Final

from protocol.errors import ProtocolViolation
from protocol.frames import Received
from protocol.ids import WorkerId
from protocol.messages import ErrorReport, Holder, TileChunk
from protocol.tiles import TileEntry
from worker.fetch_actions import Action, Append, Ask, Finish, HangUp, Open
from worker.fetch_lines import Bulk, Came, FetchLines
from worker.fetch_plan import SILENCE_S, FetchPlan
from worker.fetch_sources import COORDINATOR, holdings
from worker.groups import most_telling
from worker.store import TilePart, TileStore
from worker.tile_source import TileDialer

TICK_S: Final = 0.1  # between looks at who is late, while nothing comes
_log = logging.getLogger(__name__)


class Fetcher:
    """One fetch: the missing tiles of one plan. Cancel the task that runs it to stop; parts on disk are kept.

    `bulk` is the connection to the coordinator, which one fetch at a time may use. `purpose` names the pins that keep
    the tiles from eviction.
    """

    def __init__(
        self,
        bulk: Bulk,
        store: TileStore,
        entries: Iterable[TileEntry],
        holders: Iterable[Holder] = (),
        dialer: TileDialer | None = None,
        *,
        purpose: str = "plan",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Fetch from `holders` first; without a `dialer` the coordinator is the only source."""
        self._bulk = bulk
        self._store = store
        self._entries = tuple(entries)
        self._dialer = dialer
        self._peers, self._held = holdings(holders, self._entries, dialer.own_key) if dialer else ({}, {})
        self._purpose = purpose
        self._clock = clock
        self._parts: dict[bytes, TilePart] = {}
        self._plan = FetchPlan(())
        self._done_bytes = 0
        self._total_bytes = sum({entry.digest: entry.num_bytes for entry in self._entries}.values())

    @property
    def fetched_bytes(self) -> Counter[WorkerId]:
        """Bytes that came from each source so far; the coordinator's name is empty."""
        return self._plan.fetched_bytes

    async def run(self, on_progress: Callable[[int, int], None], silence_s: float = SILENCE_S) -> int:
        """Fetch what is missing and return how many bytes came over the wire.

        `on_progress(done, total)` is called as bytes come. Raises TileUnavailable, StorageFull, ProtocolViolation, the
        coordinator's own error, or DeadlineExceeded after `silence_s` without a byte from anybody.
        """
        missing = await asyncio.to_thread(self._prepare)
        self._plan = FetchPlan(missing, self._held, now=self._clock(), silence_s=silence_s)
        self._done_bytes = self._total_bytes - sum(entry.num_bytes for entry in missing)
        on_progress(self._done_bytes, self._total_bytes)
        try:
            async with asyncio.TaskGroup() as group:
                lines = FetchLines(group, self._bulk, self._peers, self._dialer, self._clock)
                try:
                    await self._fetch_all(lines, on_progress)
                finally:
                    lines.close()
        except BaseExceptionGroup as group_error:
            raise most_telling(group_error) from None
        finally:
            for part in self._parts.values():
                part.close()
        self._log_sources(len(missing))
        return sum(self._plan.fetched_bytes.values())

    def _prepare(self) -> tuple[TileEntry, ...]:
        self._store.pin(self._entries, self._purpose)
        missing = self._store.missing(self._entries)
        self._store.make_room(missing)
        return missing

    async def _fetch_all(self, lines: FetchLines, on_progress: Callable[[int, int], None]) -> None:
        """Take in what came before deciding anything: a source is not silent because we were at the disk."""
        while not self._plan.is_done:
            todo = [action for came in await lines.wait(0.0) for action in self._take(came)]
            todo = todo or self._plan.next_actions(self._clock())
            todo = todo or [action for came in await lines.wait(TICK_S) for action in self._take(came)]
            if todo:
                await self._do(todo, lines)
                on_progress(self._done_bytes, self._total_bytes)

    async def _do(self, actions: Iterable[Action], lines: FetchLines) -> None:
        """Carry out actions and those that follow from them."""
        todo = deque(actions)
        while todo:
            match todo.popleft():
                case Ask(source, request):
                    lines.ask(source, request)
                case HangUp(source, reason, is_final):
                    self._log_failure(source, reason, is_final=is_final)
                    lines.hang_up(source)
                case Open(entry):
                    todo.extend(await self._open(entry))
                case Append(entry, data):
                    await asyncio.to_thread(self._parts[entry.digest].append, data)
                    self._done_bytes += len(data)
                case Finish(entry):
                    todo.extend(await self._finish(entry))
        self._plan.worked(self._clock())

    async def _open(self, entry: TileEntry) -> list[Action]:
        if self._store.has(entry):
            self._plan.found(entry.digest)
            self._done_bytes += entry.num_bytes
            return []
        part = await asyncio.to_thread(self._store.open_part, entry)
        self._parts[entry.digest] = part
        self._done_bytes += part.length
        return self._plan.opened(entry.digest, part.length)

    async def _finish(self, entry: TileEntry) -> list[Action]:
        part = self._parts.pop(entry.digest)
        try:
            is_good = await asyncio.to_thread(part.finish)
        finally:
            part.close()
        if is_good:
            self._plan.verified(entry.digest)
            return []
        _log.warning("%s arrived altered, asking for it again", entry.tile)
        self._done_bytes -= entry.num_bytes
        return self._plan.spoiled(entry.digest)

    def _take(self, came: Came) -> list[Action]:
        """Tell the plan what came; raises what the coordinator did wrong, or that nobody has a tile."""
        match came.what:
            case Received(message, payload):
                return self._take_message(came, message, payload)
            case ProtocolViolation() as error:
                return self._plan.distrust(came.source, str(error))
            case error:
                return self._plan.failed(came.source, str(error), came.at)

    def _take_message(self, came: Came, message: Any, payload: memoryview) -> list[Action]:
        match message:
            case TileChunk(digest=digest, offset=offset):
                return self._plan.received(came.source, digest, offset, payload, came.at)
            case ErrorReport(digest=digest) if digest:  # of a fetch before this one, when nobody waits for it
                return self._plan.refused(came.source, digest, message.error(), came.at)
            case ErrorReport() if came.source == COORDINATOR:
                raise message.error()
            case ErrorReport():
                return self._plan.failed(came.source, message.text, came.at)
            case _ if came.source == COORDINATOR:
                raise ProtocolViolation(f"{type(message).__name__} came where a TileChunk was asked for", phase="fetch")
            case _:
                return self._plan.distrust(came.source, f"it sent a {type(message).__name__} for a tile")

    def _log_failure(self, source: WorkerId, reason: str, *, is_final: bool) -> None:
        if is_final:
            _log.warning("no more tiles from %s in this fetch: %s", source, reason)
        else:
            _log.info("%s: %s; its tiles are asked of others", source or "the coordinator", reason)

    def _log_sources(self, num_tiles: int) -> None:
        fetched = self._plan.fetched_bytes
        if num_tiles:
            words = ", ".join(
                f"{fetched[one]} from {one or 'the coordinator'}" for one in sorted(fetched, reverse=True)
            )
            _log.info("fetched %d tiles, %d bytes: %s", num_tiles, fetched.total(), words or "all were here by now")

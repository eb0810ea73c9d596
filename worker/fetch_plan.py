"""Decides which bytes of which tiles to ask of whom next, and what to do with those that arrive.

Knows nothing of sockets, disks or clocks: events and times in, actions out. Peers that have a tile are asked first and
share the work as fast as each answers. The coordinator, whose uplink all workers share, gives what nobody else has, or
helps where it is the faster one and the peers would take long. At the end, pieces that a slow source still owes are
asked of a fast one too.

A tile of one source that turns out altered ends that source. One of several sources is asked for again, and those who
gave it no longer share tiles with others, so that the next altered one is known to be theirs.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from protocol.errors import DeadlineExceeded, FrameMalformed, ManyhandsError, Overloaded, TileUnavailable
from protocol.ids import WorkerId
from protocol.messages import MAX_TILE_CHUNK_BYTES, TileRequest
from protocol.tiles import TileEntry
from worker.fetch_actions import Action, Append, Ask, Finish, HangUp, Open
from worker.fetch_pieces import Pieces
from worker.fetch_sources import COORDINATOR, PieceKey, Source, Sources

MAX_ATTEMPTS: Final = 3
SILENCE_S: Final = 15.0
HELD_BYTES: Final = 16 << 20  # asked for and not on disk yet, over all sources
LOOK_AHEAD: Final = 64  # tiles in line that are looked at before others have their turn
LEAST_LATE_S: Final = 0.25  # an answer nearer than this is waited for


class FetchPlan:
    """The tiles still to fetch; call `next_actions` after every event and now and then."""

    def __init__(
        self,
        entries: Iterable[TileEntry],
        holders: Mapping[WorkerId, Collection[bytes]] | None = None,
        *,
        now: float = 0.0,
        silence_s: float = SILENCE_S,
        chunk_bytes: int = MAX_TILE_CHUNK_BYTES,
    ) -> None:
        """`holders`: the hashes that each peer is said to have."""
        self._waiting = {entry.digest: entry for entry in entries}
        self._opening: dict[bytes, tuple[TileEntry, Source]] = {}
        self._active: dict[bytes, Pieces] = {}
        self._attempts: Counter[bytes] = Counter()  # by the coordinator alone
        self._mixed: Counter[bytes] = Counter()  # by several sources
        self._spoiled: set[bytes] = set()
        self._errors: dict[bytes, ManyhandsError] = {}
        self._sources = Sources(self._waiting, holders or {}, chunk_bytes, now)
        self._queues = {
            source: deque(digest for digest in self._waiting if digest in source.holds) for source in self._sources
        }
        self._silence_s = silence_s
        self._progress_at = now
        self._num_bytes_left = sum(entry.num_bytes for entry in self._waiting.values())
        self.fetched_bytes: Counter[WorkerId] = Counter()
        self.num_altered: Counter[WorkerId] = Counter()

    # ------------------------------------------------------------ what is known

    @property
    def is_done(self) -> bool:
        """Whether every tile was verified."""
        return not (self._waiting or self._opening or self._active)

    @property
    def under_way(self) -> tuple[TileEntry, ...]:
        """Tiles that are asked for and not verified yet."""
        return tuple(tile.entry for tile in self._active.values())

    def waits_for(self, digest: bytes) -> bool:
        """Whether this tile is not complete yet."""
        return digest in self._active or digest in self._waiting or digest in self._opening

    # ------------------------------------------------------------ events

    def opened(self, digest: bytes, have_bytes: int) -> list[Action]:
        """The tile's part is open and holds this many bytes."""
        entry, source = self._opening.pop(digest)
        source.num_opening -= 1
        tile = self._active[digest] = Pieces(entry, have_bytes)
        self._num_bytes_left -= have_bytes
        return [Finish(entry)] if tile.is_complete else []

    def found(self, digest: bytes) -> None:
        """The tile came onto the disk by other means: another process has fetched it."""
        entry, source = self._opening.pop(digest)
        source.num_opening -= 1
        self._num_bytes_left -= entry.num_bytes

    def received(self, worker: WorkerId, digest: bytes, offset: int, data: memoryview, now: float) -> list[Action]:
        """Take a chunk; one that nobody waits for (a repeated answer) is dropped.

        Raises FrameMalformed when the coordinator sent another length than was asked for; a peer that does is dropped.
        """
        source, tile = self._sources[worker], self._active.get(digest)
        length = source.answer(PieceKey(digest, offset), now)
        if length is None:
            return []
        if length != len(data):
            where = f"{len(data)} bytes came from offset {offset} where {length} were asked for"
            what = tile.entry.tile if tile else digest.hex()[:16]
            if source.is_coordinator:
                raise FrameMalformed(f"{what}: {where}", phase="fetch")
            if tile is not None:
                tile.unask(worker, offset)
            return self.distrust(worker, where)
        ready = tile.receive(worker, offset, data) if tile is not None else None
        if tile is None or ready is None:
            return []
        self._progress_at = now
        self.fetched_bytes[worker] += length
        self._num_bytes_left -= length
        actions: list[Action] = [Append(tile.entry, chunk) for chunk in ready]
        return [*actions, Finish(tile.entry)] if tile.is_complete else actions

    def refused(self, worker: WorkerId, digest: bytes, error: ManyhandsError, now: float) -> list[Action]:
        """A source does not give this tile; raises its error when nobody is left who might."""
        source = self._sources[worker]
        source.speak(now)
        if isinstance(error, Overloaded):
            self._ask_again(source, source.busy(now))
            return []
        self._ask_again(source, source.lack(digest))
        if source.is_coordinator or digest not in self._errors:
            self._errors[digest] = error
        self._require_somebody()
        return []

    def failed(self, worker: WorkerId, reason: str, now: float) -> list[Action]:
        """A source can't be reached, or its connection broke."""
        source = self._sources[worker]
        if source.is_dropped:
            return []
        self._ask_again(source, source.fail(now))
        self._require_somebody()
        return [HangUp(worker, reason, source.is_dropped)]

    def distrust(self, worker: WorkerId, reason: str) -> list[Action]:
        """A peer has sent what it may not: it is no source any more."""
        source = self._sources[worker]
        if source.is_dropped:
            return []
        self._ask_again(source, source.drop())
        self._require_somebody()
        return [HangUp(worker, reason, is_final=True)]

    def verified(self, digest: bytes) -> None:
        """The tile is complete on disk."""
        del self._active[digest]

    def spoiled(self, digest: bytes) -> list[Action]:
        """The tile's bytes were wrong: ask for all of them again.

        Raises TileUnavailable naming the tile when the coordinator's bytes were wrong three times and no peer has it.
        """
        tile = self._active.pop(digest)
        self._waiting[digest] = tile.entry
        self._spoiled.add(digest)
        self._num_bytes_left += tile.entry.num_bytes
        for source, queue in self._queues.items():
            if digest in source.holds:
                queue.appendleft(digest)
        self.num_altered.update(tile.givers)
        if tile.had_bytes or not tile.givers:  # what lay on the disk may be to blame
            return []
        if len(tile.givers) > 1:
            return self._suspect(digest, tile.givers - {COORDINATOR}, f"{tile.entry.tile} arrived altered")
        (worker,) = tile.givers
        if worker != COORDINATOR:
            return self.distrust(worker, f"{tile.entry.tile} arrived altered")
        self._attempts[digest] += 1
        if self._attempts[digest] >= MAX_ATTEMPTS:
            self._sources.coordinator.lack(digest)
            self._errors[digest] = TileUnavailable(
                f"{tile.entry.tile} arrived altered {self._attempts[digest]} times",
                remedy="check the model folder on the coordinator (its files may have changed) and restart it",
                phase="fetch",
            )
            self._require_somebody()
        return []

    def worked(self, now: float) -> None:
        """Time went by on this side, at the disk: no silence of others."""
        self._progress_at = now

    # ------------------------------------------------------------ what to do

    def next_actions(self, now: float) -> list[Action]:
        """Return new requests, tiles to open, and peers to hang up on.

        Raises DeadlineExceeded, naming tiles, when no byte came for `silence_s`; TileUnavailable when nobody has one.
        """
        actions: list[Action] = []
        for source in self._sources:
            if source.is_stalled(now):
                actions += self.failed(source.worker, "it is silent", now)
        if now - self._progress_at >= self._silence_s and not self.is_done:
            raise self._silence()
        helps = self._sources.coordinator_helps(self._num_bytes_left, now)
        is_any = True
        while is_any:  # one piece each in turn, the coordinator's turn last
            is_any = False
            for source in self._sources:
                action = self._next_of(source, now, helps) if source.has_room(now) else None
                if action is not None:
                    actions.append(action)
                    is_any = True
        return actions

    def _next_of(self, source: Source, now: float, helps: bool) -> Action | None:
        tile = self._open_tile(source, now, helps, shares=False)
        if tile is None and (entry := self._next_waiting(source, now, helps)) is not None:
            source.num_opening += 1
            self._opening[entry.digest] = (entry, source)
            return Open(entry)
        tile = tile or self._open_tile(source, now, helps, shares=True)
        if tile is not None:
            return self._ask(source, tile, *tile.ask(source.worker, source.bite_bytes()), now)
        late = self._latest_piece(source, now)
        if late is None:
            return None
        tile, offset = late
        return self._ask(source, tile, offset, tile.ask_too(source.worker, offset), now)

    def _ask(self, source: Source, tile: Pieces, offset: int, length: int, now: float) -> Ask:
        digest = tile.entry.digest
        source.ask(PieceKey(digest, offset), length, now)
        return Ask(source.worker, TileRequest(digest=digest, offset=offset, length=length))

    def _open_tile(self, source: Source, now: float, helps: bool, *, shares: bool) -> Pieces | None:
        """Return a tile to ask more of; with `shares` also one that another source is asked for."""
        has_room = self._held_bytes() < HELD_BYTES
        for digest, tile in self._active.items():
            offset = tile.next_offset
            if offset is None or not source.can_give(digest) or PieceKey(digest, offset) in source.under_way:
                continue
            if not has_room and offset != tile.written:  # only what lets bytes go to disk
                continue
            workers = tile.workers()
            is_own = source.worker in workers or not any(self._sources[one].can_give(digest) for one in workers)
            if not (is_own or shares) or not self._may_share(source, tile, now):
                continue
            able = (one for one in self._sources.peers if one.can_give(digest) and self._may_share(one, tile, now))
            if helps or not source.is_coordinator or not self._sources.has_lively(able, now):
                return tile
        return None

    def _next_waiting(self, source: Source, now: float, helps: bool) -> TileEntry | None:
        """Take a tile that nobody is asked for yet out of the line."""
        queue = self._queues[source]
        for _ in range(min(len(queue), LOOK_AHEAD)):
            entry = self._waiting.get(queue[0])
            if entry is None or not source.can_give(entry.digest):
                queue.popleft()
                continue
            able = (one for one in self._sources.peers if one.can_give(entry.digest))
            if helps or not source.is_coordinator or not self._sources.has_lively(able, now):
                queue.popleft()
                return self._waiting.pop(entry.digest)
            queue.rotate(-1)
        return None

    def _latest_piece(self, source: Source, now: float) -> tuple[Pieces, int] | None:
        """Return the piece whose answer is furthest away, if this source would be much faster, or has yet to show."""
        best, best_s = None, 0.0
        for digest, tile in self._active.items():
            if not source.can_give(digest) or not self._may_share(source, tile, now):
                continue
            for offset, piece in tile.under_way.items():
                key = PieceKey(digest, offset)
                if len(piece.askers) > 1 or key in source.under_way:
                    continue
                asker = self._sources[next(iter(piece.askers))]
                own_s = source.seconds_to(piece.length)
                if own_s is None and asker.is_in_time(now):
                    continue
                late_s = asker.lateness_s(key, now)
                if late_s > max(best_s, 2 * (own_s or 0.0), LEAST_LATE_S):
                    best, best_s = (tile, offset), late_s
        return best

    def _suspect(self, digest: bytes, workers: Iterable[WorkerId], reason: str) -> list[Action]:
        """One of these gave altered bytes, who knows which; when it happens to the same tile again, all are let go."""
        self._mixed[digest] += 1
        actions: list[Action] = []
        for worker in sorted(workers):
            self._sources[worker].is_suspect = True
            if self._mixed[digest] >= MAX_ATTEMPTS:
                actions += self.distrust(worker, reason)
        return actions

    def _may_share(self, source: Source, tile: Pieces, now: float) -> bool:
        """Whether this source may add to what others give: not where that would hide a liar among them."""
        workers = tile.workers()
        if source.worker in workers or not (source.is_suspect or self._is_doubtful(tile)):
            return True
        others = [self._sources[one] for one in workers]
        return not any(one.can_give(tile.entry.digest) and one.is_in_time(now) for one in others)

    def _is_doubtful(self, tile: Pieces) -> bool:
        """Whether this tile was altered before, or a suspect has to do with it."""
        return tile.entry.digest in self._spoiled or any(self._sources[one].is_suspect for one in tile.workers())

    def _held_bytes(self) -> int:
        asked = sum(source.under_way_bytes for source in self._sources)
        return asked + sum(tile.early_bytes for tile in self._active.values())

    def _ask_again(self, source: Source, keys: Iterable[PieceKey]) -> None:
        for key in keys:
            if (tile := self._active.get(key.digest)) is not None:
                tile.unask(source.worker, key.offset)

    def _require_somebody(self) -> None:
        for digest in self._sources.coordinator.lacks:
            if self.waits_for(digest) and not any(one.can_give(digest) for one in self._sources):
                raise self._errors[digest]

    def _silence(self) -> DeadlineExceeded:
        tiles = ", ".join(str(entry.tile) for entry in self.under_way[:3]) or "any tile"
        return DeadlineExceeded(
            f"no byte of {tiles} came within {self._silence_s:g} s",
            remedy="check the connection to the coordinator; what was fetched is kept",
            phase="fetch",
        )

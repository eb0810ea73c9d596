"""Decides which bytes of which tiles to ask for next, and what to do with those that arrive.

Knows nothing of sockets, disks or clocks: events in, actions out. Many requests are under way at once so that the
round trip does not set the pace; a tile's bytes are handed on in order, because a part on disk grows at its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple

from protocol.errors import FrameMalformed, TileUnavailable
from protocol.messages import MAX_TILE_CHUNK_BYTES, TileRequest
from protocol.tiles import TileEntry

WINDOW: Final = 16
MAX_ATTEMPTS: Final = 3


class Open(NamedTuple):
    """Open the tile's part, then say `opened` with the bytes that are there already."""

    entry: TileEntry


class Ask(NamedTuple):
    """Send this request."""

    request: TileRequest


class Append(NamedTuple):
    """Add these bytes at the end of the tile's part."""

    entry: TileEntry
    data: memoryview


class Finish(NamedTuple):
    """All bytes of the tile are there: verify it, then say `verified` or `spoiled`."""

    entry: TileEntry


Action = Open | Ask | Append | Finish


class _Tile:
    """A tile on its way: `asked` bytes are requested, `written` are handed on, chunks in between wait in `early`."""

    def __init__(self, entry: TileEntry, have_bytes: int) -> None:
        self.entry = entry
        self.asked = self.written = have_bytes
        self.early: dict[int, memoryview] = {}
        self.outstanding: dict[int, TileRequest] = {}


class FetchPlan:
    """The tiles still to fetch, in order; call `next_actions` after every event.

    At most `window` requests are under way, for at most as many tiles, and no more chunks than that are held back.
    """

    def __init__(
        self, entries: Iterable[TileEntry], *, window: int = WINDOW, chunk_bytes: int = MAX_TILE_CHUNK_BYTES
    ) -> None:
        self._window = window
        self._chunk_bytes = chunk_bytes
        self._waiting = deque(entries)
        self._opening: dict[bytes, TileEntry] = {}
        self._attempts: dict[bytes, int] = {}
        self._active: dict[bytes, _Tile] = {}
        self._num_outstanding = 0

    @property
    def is_done(self) -> bool:
        """Whether every tile was verified."""
        return not (self._waiting or self._opening or self._active)

    @property
    def under_way(self) -> tuple[TileEntry, ...]:
        """Tiles that are asked for and not verified yet."""
        return tuple(tile.entry for tile in self._active.values())

    def waits_for(self, digest: bytes) -> bool:
        """Whether bytes of this tile are asked for."""
        return digest in self._active

    def next_actions(self) -> list[Action]:
        """Return new requests, and tiles to open, until the window is full."""
        actions: list[Action] = []
        for tile in self._active.values():
            self._fill(tile, actions)
        while self._waiting and self._num_outstanding + len(self._opening) < self._window > len(self._active):
            entry = self._waiting.popleft()
            self._opening[entry.digest] = entry
            actions.append(Open(entry))
        return actions

    def opened(self, digest: bytes, have_bytes: int) -> list[Action]:
        """The tile's part is open and holds this many bytes."""
        tile = self._active[digest] = _Tile(self._opening.pop(digest), have_bytes)
        return [Finish(tile.entry)] if have_bytes == tile.entry.num_bytes else []

    def found(self, digest: bytes) -> None:
        """The tile came onto the disk by other means: another process has fetched it."""
        del self._opening[digest]

    def received(self, digest: bytes, offset: int, data: memoryview) -> list[Action]:
        """Take a chunk; one that nobody waits for (a repeated answer) is dropped.

        Raises FrameMalformed when its length is not the one asked for.
        """
        tile = self._active.get(digest)
        request = tile.outstanding.get(offset) if tile else None
        if tile is None or request is None:
            return []
        if len(data) != request.length:
            raise FrameMalformed(
                f"{tile.entry.tile}: {len(data)} bytes came from offset {offset} where {request.length} were asked for",
                phase="fetch",
            )
        del tile.outstanding[offset]
        self._num_outstanding -= 1
        tile.early[offset] = data
        actions: list[Action] = []
        while tile.written in tile.early:
            chunk = tile.early.pop(tile.written)
            actions.append(Append(tile.entry, chunk))
            tile.written += len(chunk)
        if tile.written == tile.entry.num_bytes:
            actions.append(Finish(tile.entry))
        return actions

    def verified(self, digest: bytes) -> None:
        """The tile is complete on disk."""
        self._forget(self._active.pop(digest, None))

    def spoiled(self, digest: bytes) -> None:
        """The tile's bytes were wrong: ask for all of them again.

        Raises TileUnavailable naming the tile after three attempts.
        """
        tile = self._active.pop(digest)
        self._forget(tile)
        attempts = self._attempts[digest] = self._attempts.get(digest, 0) + 1
        if attempts >= MAX_ATTEMPTS:
            raise TileUnavailable(
                f"{tile.entry.tile} arrived altered {attempts} times",
                remedy="check the model folder on the coordinator (its files may have changed) and restart it",
                phase="fetch",
            )
        self._waiting.appendleft(tile.entry)

    def repeat(self) -> list[Action]:
        """Ask again for all that is outstanding, after a connection that may have lost it."""
        return [Ask(request) for tile in self._active.values() for request in tile.outstanding.values()]

    def _fill(self, tile: _Tile, actions: list[Action]) -> None:
        total = tile.entry.num_bytes
        while self._num_outstanding < self._window and tile.asked < total:
            length = min(self._chunk_bytes, total - tile.asked)
            if len(tile.outstanding) + len(tile.early) >= self._window:  # one lost chunk must not let the rest pile up
                return
            request = TileRequest(digest=tile.entry.digest, offset=tile.asked, length=length)
            tile.outstanding[tile.asked] = request
            tile.asked += length
            self._num_outstanding += 1
            actions.append(Ask(request))

    def _forget(self, tile: _Tile | None) -> None:
        if tile is not None:
            self._num_outstanding -= len(tile.outstanding)

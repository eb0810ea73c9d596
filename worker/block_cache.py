"""Fused blocks in the tile store: made once from their tiles, then read from disk at every load and every step.

Knows nothing of the window. A block is one more content in the store, named by its sha256, bounded and evicted like any
tile; a small file remembers which content a block has:

    blocks/<sha256 of what the block is made of>     the block's own sha256
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import msgpack

from protocol.durable_file import AS_UMASK_SAYS, write_whole
from protocol.errors import StorageFailed, StorageFull, TileUnavailable
from protocol.schema import pack
from protocol.tiles import TileEntry, TileId, TileKind
from runtime.direct import aligned_buffer
from runtime.fused import block_tiles
from runtime.page_cache import PageCache
from runtime.windowed import BlockOrder
from worker.store import TileStore

LAYOUT_VERSION = 2  # raise when `runtime.fused` changes the bytes of any block
_log = logging.getLogger(__name__)


class BlockCache:
    """The blocks of one worker's part of a model."""

    def __init__(
        self,
        store: TileStore,
        folder: Path,
        order: BlockOrder,
        tiles: Mapping[TileId, TileEntry],
        on_read: Callable[[int], None],
    ) -> None:
        """`on_read` is told of the bytes of each block that is there already."""
        self._store = store
        self._folder = folder
        self._order = order
        self._tiles = tiles
        self._on_read = on_read
        self._kept: list[TileEntry] = []

    @property
    def page_cache(self) -> PageCache:
        """What the owner lets reading do with the page cache."""
        return self._store.page_cache

    def path_of(self, op: int, num_bytes: int, fill: Callable[[memoryview], None]) -> Path:
        """Return the file of a block, its hash proven; makes it where it is absent or altered. Raises StorageFull."""
        note = self._folder / self.name_of(op).hex()
        entry = self._known(note, op, num_bytes) or self._make(note, op, num_bytes, fill)
        self._kept.append(entry)
        self._store.pin([*self._tiles.values(), *self._kept])
        return self._store.path_of(entry)

    def name_of(self, op: int) -> bytes:
        """Return what a block's bytes depend on, hashed."""
        order = self._order
        digests = [self._tiles[tile].digest for tile in block_tiles(order.spec, order.share, op)]
        form = [LAYOUT_VERSION, op, pack(order.spec), order.form(op), digests]
        return hashlib.sha256(msgpack.packb(form)).digest()

    def _known(self, note: Path, op: int, num_bytes: int) -> TileEntry | None:
        try:
            digest = note.read_bytes()
        except FileNotFoundError:
            return None
        if len(digest) != 32:
            return None
        entry = _entry(op, num_bytes, digest)
        if not self._store.has(entry):
            return None
        try:
            self._store.verify(entry)
            self._on_read(num_bytes)
        except TileUnavailable as error:
            _log.warning("%s; making it again", error)
            return None
        return entry

    def _make(self, note: Path, op: int, num_bytes: int, fill: Callable[[memoryview], None]) -> TileEntry:
        buffer = aligned_buffer(num_bytes)[:num_bytes]
        fill(buffer)
        entry = _entry(op, num_bytes, hashlib.sha256(buffer).digest())
        if not self._store.has(entry):
            self._store.make_room([entry])
            part = self._store.open_part(entry)
            part.truncate()
            part.append(buffer)
            part.finish()
        self._remember(note, entry)
        return entry

    def _remember(self, note: Path, entry: TileEntry) -> None:
        """A note torn by a kill is no digest of a block that is there: the block is then made again."""
        try:
            write_whole(note, entry.digest, is_synced=False, mode=AS_UMASK_SAYS, phase="load")
        except StorageFailed as error:  # told as the store tells it, whatever keeps the cache from being written
            raise StorageFull(error.message, phase="load") from error


def _entry(op: int, num_bytes: int, digest: bytes) -> TileEntry:
    kind = TileKind.FFN if op % 2 else TileKind.ATTENTION
    return TileEntry(TileId(op // 2, kind, 0), num_bytes, digest)

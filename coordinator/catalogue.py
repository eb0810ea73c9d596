"""The tile catalogue: every tile of a model with its hash, and ranges of its bytes, cut from the checkpoint on demand.

Knows nothing of workers, sockets or permissions. Blocking: an event loop calls `build` and `read` in a thread.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from types import TracebackType

import msgpack

from coordinator.checkpoint import Checkpoint
from coordinator.manifest_file import load_entries, store_entries
from coordinator.tile_cutter import MatrixSource, WholeMatrices, cut_tile
from coordinator.tile_file import TileFile, TileFileWriter
from protocol.errors import CheckpointInvalid, FrameMalformed, StorageFailed, TileUnavailable
from protocol.schema import pack
from protocol.specs import ModelSpec, WeightFormat
from protocol.tiles import TileEntry, TileId, all_tiles, tile_bytes

LAYOUT_VERSION = 2  # raise when `protocol.tiles` or the conversions change the bytes of any tile
HASH_THREADS = 2
MAX_PENDING = 2 * HASH_THREADS
DEFAULT_CACHE_BYTES = 256 << 20

QUANTISED = frozenset({WeightFormat.INT8, WeightFormat.INT4})
_LOG = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


class Catalogue:
    """All tiles of one model: `entries` in the order of `all_tiles`. Thread-safe; owns its checkpoint until `close`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        entries: list[TileEntry],
        cache_bytes: int,
        tile_file: TileFile | None = None,
    ) -> None:
        """`tile_file` holds the tiles of a quantised model; without one they are cut from the checkpoint."""
        self.spec = spec
        self.entries = {entry.tile: entry for entry in entries}
        self.total_bytes = sum(entry.num_bytes for entry in entries)
        self._checkpoint = checkpoint
        self._tile_file = tile_file
        # Tiles of the same bytes (two layers' untouched norms) share a digest; the first stands for them.
        self._by_digest = {entry.digest: entry for entry in reversed(entries)}
        self._cut_lock = threading.Lock()
        self._cut_tiles = _RecentTiles(cache_bytes)

    @classmethod
    def build(
        cls,
        folder: Path,
        spec: ModelSpec,
        cache_dir: Path,
        progress: Progress = lambda done, total: None,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> Catalogue:
        """Open the model in `folder`, prove it against `spec`, and hash every tile unless `cache_dir` knows the hashes.

        `progress` gets bytes hashed so far and in all, in the calling thread. `cache_bytes` bounds the tiles that
        `read` keeps in memory. Raises CheckpointInvalid and ModelUnsupported.
        """
        checkpoint = Checkpoint.open(folder)
        try:
            checkpoint.verify(spec)
            path = cache_dir / f"{manifest_key(checkpoint, spec).hex()[:40]}.manifest"
            entries = load_entries(path)
            if entries is not None and not _fits(entries, spec):
                entries = None
            if spec.weights in QUANTISED:
                tile_file, entries = _quantised(checkpoint, spec, path, entries, progress)
                return cls(checkpoint, spec, entries, cache_bytes, tile_file)
            if entries is None:
                entries = _hash_tiles(checkpoint, spec, progress)
                checkpoint.require_unchanged()
                store_entries(path, entries)
        except BaseException:
            checkpoint.close()
            raise
        return cls(checkpoint, spec, entries, cache_bytes)

    def close(self) -> None:
        """Close the checkpoint's files; no `read` may be under way."""
        self._checkpoint.close()
        if self._tile_file is not None:
            self._tile_file.close()

    def __enter__(self) -> Catalogue:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def tile_of(self, digest: bytes) -> TileId:
        """Return the tile of these bytes (the first of several); raises TileUnavailable for an unknown digest."""
        return self._entry(digest).tile

    def _entry(self, digest: bytes) -> TileEntry:
        entry = self._by_digest.get(digest)
        if entry is None:
            raise TileUnavailable(f"no tile of {self.spec.name} has the digest {digest.hex()[:16]}...")
        return entry

    def read(self, digest: bytes, offset: int, length: int) -> bytes:
        """Return `length` bytes of a tile from `offset` on.

        Raises TileUnavailable for an unknown digest, FrameMalformed for a range outside the tile, and CheckpointInvalid
        when the checkpoint no longer gives the bytes that were hashed.
        """
        entry = self._entry(digest)
        if offset < 0 or length < 0 or offset + length > entry.num_bytes:
            raise FrameMalformed(f"{entry.tile} has {entry.num_bytes} bytes; {length} from {offset} on were asked")
        data = self._cut_tiles.get(digest)
        if data is None:
            with self._cut_lock:  # one cut at a time: memory stays bounded, a tile asked twice is cut once
                data = self._cut_tiles.get(digest)
                if data is None:
                    data = self._cut(entry)
                    self._cut_tiles.put(digest, data)
        return bytes(memoryview(data)[offset : offset + length])

    def _cut(self, entry: TileEntry) -> bytearray:
        if self._tile_file is not None:
            data, where = self._tile_file.read(entry), self._tile_file.path
        else:
            data, where = cut_tile(self.spec, entry.tile, self._checkpoint), self._checkpoint.folder
        if hashlib.sha256(data).digest() != entry.digest:
            raise CheckpointInvalid(
                f"{entry.tile} in {where} no longer has the bytes that were hashed: altered",
                remedy="put the files back, or touch the model's and start the coordinator again to hash the new ones",
            )
        return data


class _RecentTiles:
    """The tiles cut last, at most `max_bytes` of them, but always the newest one. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._tiles: OrderedDict[bytes, bytearray] = OrderedDict()

    def get(self, digest: bytes) -> bytearray | None:
        with self._lock:
            data = self._tiles.get(digest)
            if data is not None:
                self._tiles.move_to_end(digest)
            return data

    def put(self, digest: bytes, data: bytearray) -> None:
        with self._lock:
            self._tiles[digest] = data
            self._num_bytes += len(data)
            while self._num_bytes > self._max_bytes and len(self._tiles) > 1:
                _, oldest = self._tiles.popitem(last=False)
                self._num_bytes -= len(oldest)


def manifest_key(checkpoint: Checkpoint, spec: ModelSpec) -> bytes:
    """Return what a manifest depends on, hashed: the weight files' state, the spec, the layout of tiles."""
    files = [list(mark) for mark in checkpoint.fingerprint()]
    key = msgpack.packb([LAYOUT_VERSION, pack(spec), files])
    return hashlib.sha256(key).digest()


def _fits(entries: list[TileEntry], spec: ModelSpec) -> bool:
    tiles = all_tiles(spec)
    return [entry.tile for entry in entries] == tiles and all(
        entry.num_bytes == tile_bytes(spec, entry.tile) for entry in entries
    )


def _quantised(
    checkpoint: Checkpoint, spec: ModelSpec, manifest: Path, entries: list[TileEntry] | None, progress: Progress
) -> tuple[TileFile, list[TileEntry]]:
    """Open the file of quantised tiles beside the manifest, or make both; raises StorageFull and StorageFailed."""
    path = manifest.with_suffix(".tiles")
    if entries is not None and path.exists():
        try:
            return TileFile(path, entries), entries
        except StorageFailed as error:
            _LOG.warning("%s; quantising the model again", error)
    with TileFileWriter(path) as writer:
        entries = _hash_tiles(checkpoint, spec, progress, writer.append)
        checkpoint.require_unchanged()
        writer.finish()
    store_entries(manifest, entries)
    return TileFile(path, entries), entries


def _hash_tiles(
    checkpoint: Checkpoint, spec: ModelSpec, progress: Progress, keep: Callable[[bytearray], None] | None = None
) -> list[TileEntry]:
    """Cut and hash every tile, two at a time; each matrix is read once, and at most two layers' are held.

    `keep` is given the bytes of every tile in the order of the entries.
    """
    tiles = all_tiles(spec)
    total = sum(tile_bytes(spec, tile) for tile in tiles)
    entries: list[TileEntry] = []
    pending: deque[Future[tuple[TileEntry, bytearray | None]]] = deque()
    done = 0

    def take() -> None:
        nonlocal done
        entry, data = pending.popleft().result()  # disk and sha256 only: no wait for a peer, so no deadline
        if keep is not None and data is not None:
            keep(data)
        entries.append(entry)
        done += entry.num_bytes
        progress(done, total)

    with ThreadPoolExecutor(HASH_THREADS, "tile-hash") as pool:
        for _, block in groupby(tiles, key=lambda tile: (tile.layer, tile.kind)):
            source = WholeMatrices(checkpoint)
            for tile in block:
                pending.append(pool.submit(_hash_tile, spec, tile, source, keep is not None))
                if len(pending) > MAX_PENDING:
                    take()
        while pending:
            take()
    return entries


def _hash_tile(
    spec: ModelSpec, tile: TileId, source: MatrixSource, with_data: bool
) -> tuple[TileEntry, bytearray | None]:
    data = cut_tile(spec, tile, source)
    return TileEntry(tile, len(data), hashlib.sha256(data).digest()), data if with_data else None

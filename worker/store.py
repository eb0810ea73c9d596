"""Tiles on this worker's disk: content-addressed files, complete and verified or not there at all.

Knows nothing of sockets, plans or tensors. Safe against a kill at any moment and against other worker processes that
share the folder: a tile becomes visible by a rename, whatever is read is checked against its hash.

    tiles/ab/ab12…        a complete tile, named by its sha256
    tiles/ab/ab12….part   bytes received so far; a restart goes on from there
    pins/<pid>-<token>    the tiles that a running process needs, so that no other process evicts them
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from protocol.durable_file import NO_ROOM
from protocol.errors import StorageFailed, StorageFull, TileUnavailable
from protocol.tiles import TileEntry
from runtime.direct import sha256_of
from runtime.page_cache import PageCache

try:
    import fcntl
except ImportError:  # Windows: every process then uses part files of its own and keeps no pins
    fcntl = None  # type: ignore[assignment]

PART = ".part"
READ_BYTES = 1 << 20


class _CachedFile(NamedTuple):
    path: Path
    num_bytes: int
    used_ns: int


class TilePart:
    """A tile on its way to the disk. Bytes are appended in order; `finish` verifies the whole."""

    def __init__(self, path: Path, target: Path, file: FileIO, entry: TileEntry, proven: set[bytes]) -> None:
        self.entry = entry
        self._proven = proven
        self._path = path
        self._target = target
        self._file = file

    @property
    def length(self) -> int:
        """Bytes there so far."""
        return os.fstat(self._file.fileno()).st_size

    def append(self, data: bytes | memoryview) -> None:
        """Add the next bytes; raises StorageFull, then what was there before is kept."""
        before = self.length
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[write_some(self._file.fileno(), rest) :]
        except OSError as error:
            os.ftruncate(self._file.fileno(), before)
            raise _storage_error(error, self._path) from error

    def truncate(self) -> None:
        """Forget what is there so far."""
        os.ftruncate(self._file.fileno(), 0)
        self._file.seek(0)

    def finish(self) -> bool:
        """Verify, sync and publish the tile; False when its bytes are not those of its hash (the part is emptied)."""
        self._file.seek(0)
        if self.length != self.entry.num_bytes or _sha256(self._file) != self.entry.digest:
            self.truncate()
            return False
        try:
            os.fsync(self._file.fileno())
            self._path.replace(self._target)
        except OSError as error:
            raise _storage_error(error, self._path) from error
        self._proven.add(self.entry.digest)
        self.close()
        return True

    def close(self) -> None:
        """Let go of the part; its bytes stay for the next attempt."""
        self._file.close()


class TileStore:
    """The tile cache of one folder, bounded by `limit_bytes`."""

    def __init__(self, root: Path, limit_bytes: int, page_cache: PageCache = PageCache.USE) -> None:
        self._root = root
        self.page_cache = page_cache
        self._limit_bytes = limit_bytes
        self._pin_file: FileIO | None = None
        self._pin_path = root / "pins" / f"{os.getpid()}-{secrets.token_hex(4)}"
        self._pins: dict[str, frozenset[bytes]] = {}
        self._pin_lock = threading.Lock()
        self._proven: set[bytes] = set()
        try:
            (root / "tiles").mkdir(parents=True, exist_ok=True)
            (root / "pins").mkdir(exist_ok=True)
        except OSError as error:
            raise _storage_error(error, root) from error

    def missing(self, entries: Iterable[TileEntry]) -> tuple[TileEntry, ...]:
        """Return the tiles not on disk, each content once (equal tiles of different layers share a file)."""
        unique = {entry.digest: entry for entry in entries}
        return tuple(entry for entry in unique.values() if not self.has(entry))

    def has(self, entry: TileEntry) -> bool:
        """Whether the whole tile is on disk; its hash is checked when it is read."""
        try:
            return self._path(entry.digest).stat().st_size == entry.num_bytes
        except FileNotFoundError:
            return False

    def pin(self, entries: Iterable[TileEntry], purpose: str = "plan") -> None:
        """Keep these tiles, and no longer those pinned before for this purpose, from eviction by any process."""
        with self._pin_lock:  # the compute thread pins blocks while tiles are fetched for a plan to come
            self._pins = {**self._pins, purpose: frozenset(entry.digest for entry in entries)}
            if fcntl is None:
                return
            if self._pin_file is None:
                self._pin_file = self._pin_path.open("wb", buffering=0)
                fcntl.flock(self._pin_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._pin_file.seek(0)
            self._pin_file.truncate()
            self._pin_file.write(b"".join(sorted(self._pinned())))

    def make_room(self, wanted: Iterable[TileEntry]) -> None:
        """Evict least recently used tiles until `wanted` fit under the limit and on the disk.

        Raises StorageFull, before anything is deleted, when pinned tiles and `wanted` together exceed the limit.
        """
        new = {entry.digest.hex(): entry.num_bytes for entry in wanted}
        pinned = {digest.hex() for digest in self._pinned() | self._pinned_elsewhere()}
        files = list(self._files())
        kept = sum(file.num_bytes for file in files if _name(file) in pinned and _name(file) not in new)
        needed = sum(new.values())
        if kept + needed > self._limit_bytes:
            raise StorageFull(
                f"tiles of {kept + needed} bytes must be on disk at once, the cache in {self._root} is limited to "
                f"{self._limit_bytes}",
                phase="fetch",
            )
        total = needed + sum(file.num_bytes for file in files if _name(file) not in new)
        for file in sorted(files, key=lambda one: one.used_ns):
            if total <= self._limit_bytes:
                return
            if _name(file) not in pinned and _name(file) not in new:
                file.path.unlink(missing_ok=True)
                total -= file.num_bytes

    def open_part(self, entry: TileEntry) -> TilePart:
        """Open what is there of a tile for appending; a part that another process writes is left to it."""
        target = self._path(entry.digest)
        shared = target.with_suffix(PART)
        own = target.with_name(f"{target.name}.{os.getpid()}{PART}")
        try:
            target.parent.mkdir(exist_ok=True)
            file = _open_locked(shared)
            part = (
                TilePart(shared, target, file, entry, self._proven)
                if file
                else TilePart(own, target, own.open("a+b", buffering=0), entry, self._proven)
            )
            if part.length > entry.num_bytes:
                os.ftruncate(part._file.fileno(), 0)
        except OSError as error:
            raise _storage_error(error, target) from error
        return part

    def read(self, entry: TileEntry) -> memoryview:
        """Return a tile's bytes, verified.

        Raises TileUnavailable when it is not here, or was altered on disk or can't be read: then it is deleted, to be
        fetched again.
        """
        path = self._path(entry.digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise TileUnavailable(f"{entry.tile} is not in the cache {self._root}", phase="load") from None
        except OSError as error:
            raise self._unreadable(path, error) from error
        if hashlib.sha256(data).digest() != entry.digest:
            path.unlink(missing_ok=True)
            raise TileUnavailable(f"{entry.tile} was altered on disk and is deleted: {path}", phase="load")
        self._proven.add(entry.digest)
        with contextlib.suppress(OSError):  # only the order of eviction depends on it; a read-only cache still serves
            os.utime(path)
        return memoryview(data)

    def verify(self, entry: TileEntry) -> None:
        """Prove the hash of content without holding it in memory; raises TileUnavailable as `read` does."""
        path = self._path(entry.digest)
        try:
            is_right = path.exists() and sha256_of(path, self.page_cache) == entry.digest
        except StorageFailed as error:
            raise self._unreadable(path, error) from error
        if not is_right:
            path.unlink(missing_ok=True)
            raise TileUnavailable(f"{path} was altered on disk and is deleted", phase="load")
        self._proven.add(entry.digest)

    def prove(self, entry: TileEntry) -> None:
        """Verify a tile unless this process has done so before; raises TileUnavailable as `read` does."""
        if not self.has(entry):
            self._proven.discard(entry.digest)
            raise TileUnavailable(f"{entry.tile} is not in the cache {self._root}", phase="serve")
        if entry.digest not in self._proven:
            self.verify(entry)

    def read_range(self, entry: TileEntry, offset: int, length: int) -> bytes:
        """Return some bytes of a tile that was verified before; raises TileUnavailable when it is gone or cut.

        So it does when they can't be read; the tile is then deleted, and fetched again at the next load.
        """
        path = self._path(entry.digest)
        try:
            with path.open("rb", buffering=0) as file:
                data = read_at(file.fileno(), length, offset)
        except FileNotFoundError:
            data = b""
        except OSError as error:
            raise self._unreadable(path, error) from error
        if len(data) != length:
            raise TileUnavailable(f"{entry.tile} is no longer whole in the cache {self._root}", phase="step")
        return data

    def path_of(self, entry: TileEntry) -> Path:
        """Return the file of some content, which may not be there."""
        return self._path(entry.digest)

    @property
    def root(self) -> Path:
        """The folder of this store."""
        return self._root

    def close(self) -> None:
        """Drop the pins."""
        if self._pin_file is not None:
            self._pin_path.unlink(missing_ok=True)
            self._pin_file.close()
            self._pin_file = None

    def _unreadable(self, path: Path, error: Exception) -> TileUnavailable:
        path.unlink(missing_ok=True)
        return TileUnavailable(f"{path} can't be read ({error}) and is deleted", phase="load")

    def _path(self, digest: bytes) -> Path:
        name = digest.hex()
        return self._root / "tiles" / name[:2] / name

    def _files(self) -> Iterator[_CachedFile]:
        for path in (self._root / "tiles").glob("??/*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process was faster
                continue
            yield _CachedFile(path, status.st_size, status.st_mtime_ns)

    def _pinned(self) -> frozenset[bytes]:
        return frozenset().union(*self._pins.values())

    def _pinned_elsewhere(self) -> frozenset[bytes]:
        digests: set[bytes] = set()
        for path in (self._root / "pins").iterdir():
            if fcntl is None or path == self._pin_path:
                continue
            try:
                with path.open("rb", buffering=0) as file:
                    if _try_lock(file):  # nobody holds it: its process is gone
                        path.unlink(missing_ok=True)
                        continue
                    data = file.read()
            except FileNotFoundError:
                continue
            digests.update(data[at : at + 32] for at in range(0, len(data) - 31, 32))
        return frozenset(digests)


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """Read from a file; a seam for tests of broken disks."""
    return os.pread(descriptor, length, offset)


def write_some(descriptor: int, data: memoryview) -> int:
    """Write to a file; a seam for tests of full disks."""
    return os.write(descriptor, data)


def _name(file: _CachedFile) -> str:
    return file.path.name.partition(".")[0]


def _try_lock(file: FileIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open_locked(path: Path) -> FileIO | None:
    """Open and lock a part file; None when another process holds it or has just published it."""
    if fcntl is None:
        return None
    file = path.open("a+b", buffering=0)
    if not _try_lock(file) or not _is_same(file, path):
        file.close()
        return None
    return file


def _is_same(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sha256(file: FileIO) -> bytes:
    digest = hashlib.sha256()
    while data := file.read(READ_BYTES):
        digest.update(data)
    return digest.digest()


def _storage_error(error: OSError, path: Path) -> StorageFull:
    if error.errno in NO_ROOM:
        return StorageFull(f"no room to write {path}: {error.strerror}", phase="fetch")
    return StorageFull(
        f"can't write {path}: {error.strerror}",
        remedy="check that the cache folder is writable, or choose another (--cache-dir)",
        phase="fetch",
    )

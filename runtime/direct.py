"""Page-aligned memory, and reads from disk into it that leave no trace in the page cache.

Knows nothing of tiles or blocks. Where the file system takes O_DIRECT the kernel copies nothing and keeps nothing;
elsewhere the pages that a read brought in are dropped again, so that a worker's memory is what it was promised. What is
in the page cache already is copied from there, ten times faster than a good disk, unless the owner says otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path

from protocol.errors import StorageFailed
from runtime.page_cache import PageCache, cached_share, forget

PAGE = mmap.PAGESIZE if mmap.PAGESIZE >= 4096 else 4096
MOSTLY_CACHED = 0.75  # a kernel that takes idle memory back leaves gaps; a read through the page cache mends them
HASH_BYTES = 1 << 20  # read at a time to be hashed
# What one system call is asked for, and what is looked for in the page cache at a time. Good disks want to know much
# beforehand: one reader got 1.3 to 1.6 GB/s in pieces of 8 MiB and 1.7 to 1.8 in these, where four readers got 1.9.
MAX_READ_BYTES = 32 << 20


def round_up(num_bytes: int) -> int:
    """Return the next multiple of a page."""
    return -(-num_bytes // PAGE) * PAGE


def aligned_buffer(num_bytes: int) -> memoryview:
    """Return zeroed, page-aligned, touched memory of at least `num_bytes`, a whole number of pages.

    It is given back to the system when the last view of it is gone.
    """
    size = max(PAGE, round_up(num_bytes))
    memory = mmap.mmap(-1, size)
    view = memoryview(memory)
    for page in range(0, size, PAGE):
        view[page] = 0  # a page that was never written is not there yet: take it now, not in the middle of a step
    return view


class DirectFile:
    """A file that is read past the page cache. Offsets and lengths are whole pages; close it after use."""

    def __init__(self, path: Path, page_cache: PageCache = PageCache.USE) -> None:
        self.path = path
        self._page_cache = page_cache
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
        try:
            self._plain = os.open(self.path, flags)
        except OSError as error:
            raise StorageFailed(f"can't open {self.path}: {error.strerror or error}") from error
        self._direct = -1
        if page_cache is not PageCache.FILL and hasattr(os, "O_DIRECT"):
            with contextlib.suppress(OSError):  # tmpfs and some network file systems refuse
                self._direct = os.open(path, flags | os.O_DIRECT)
        self.num_bytes = os.fstat(self._plain).st_size

    def read_into(self, buffer: memoryview, offset: int, on_progress: Callable[[], None] = lambda: None) -> None:
        """Fill a page-aligned buffer from `offset`; raises StorageFailed naming file and offset.

        The file may end inside the last page of the buffer; the rest of it is then left as it is. `on_progress` is
        called after every piece.
        """
        wanted = min(len(buffer), self.num_bytes - offset)
        position = 0
        while position < wanted:
            try:
                count = self._read_some(buffer[position : position + MAX_READ_BYTES], offset + position)
            except OSError as error:
                raise StorageFailed(
                    f"can't read {self.path} at {offset + position}: {error.strerror or error}"
                ) from error
            if count <= 0:
                raise StorageFailed(f"{self.path} ends at {offset + position}, before its {self.num_bytes} bytes")
            position += count
            on_progress()
        if wanted < 0:
            raise StorageFailed(f"{self.path} has no byte {offset}")

    def _read_some(self, part: memoryview, offset: int) -> int:
        """One system call, by the way that leaves the page cache as it is."""
        if self._page_cache is PageCache.FILL:
            return os.preadv(self._plain, [part], offset)
        length = min(len(part), self.num_bytes - offset)
        was_cached = self._page_cache is PageCache.USE and cached_share(self._plain, offset, length) >= MOSTLY_CACHED
        if self._direct >= 0 and not was_cached:
            return os.preadv(self._direct, [part], offset)
        count = os.preadv(self._plain, [part], offset)
        if not was_cached:
            forget(self._plain, offset, length)
        return count

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        for descriptor in (self._plain, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._plain = self._direct = -1


def sha256_of(path: Path, page_cache: PageCache) -> bytes:
    """Hash a whole file as it is read later: past the page cache, or out of it. Raises StorageFailed."""
    digest, buffer = hashlib.sha256(), aligned_buffer(HASH_BYTES)
    file = DirectFile(path, page_cache)
    try:
        for offset in range(0, file.num_bytes, HASH_BYTES):
            file.read_into(buffer, offset)
            digest.update(buffer[: min(HASH_BYTES, file.num_bytes - offset)])
    finally:
        file.close()
    return digest.digest()

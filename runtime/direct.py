"""Page-aligned memory, and reads from disk into it that leave no trace in the page cache.

Knows nothing of tiles or blocks. Where the file system takes O_DIRECT the kernel copies nothing and keeps nothing;
elsewhere the pages that a read brought in are dropped again, so that a worker's memory is what it was promised.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from protocol.errors import StorageFailed

PAGE = mmap.PAGESIZE if mmap.PAGESIZE >= 4096 else 4096
MAX_READ_BYTES = 32 << 20  # what one system call is asked for


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

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
        self.is_direct = hasattr(os, "O_DIRECT")
        try:
            self._descriptor = os.open(path, flags | getattr(os, "O_DIRECT", 0))
        except OSError:
            self.is_direct = False
            self._descriptor = self._open_plainly(flags)
        self.num_bytes = os.fstat(self._descriptor).st_size

    def _open_plainly(self, flags: int) -> int:
        """tmpfs and some network file systems refuse O_DIRECT."""
        try:
            return os.open(self.path, flags)
        except OSError as error:
            raise StorageFailed(f"can't open {self.path}: {error.strerror or error}") from error

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a page-aligned buffer from `offset`; raises StorageFailed naming file and offset.

        The file may end inside the last page of the buffer; the rest of it is then left as it is.
        """
        wanted = min(len(buffer), self.num_bytes - offset)
        position = 0
        while position < wanted:
            try:
                part = buffer[position : position + MAX_READ_BYTES]
                count = os.preadv(self._descriptor, [part], offset + position)
            except OSError as error:
                raise StorageFailed(
                    f"can't read {self.path} at {offset + position}: {error.strerror or error}"
                ) from error
            if count <= 0:
                raise StorageFailed(f"{self.path} ends at {offset + position}, before its {self.num_bytes} bytes")
            position += count
        if wanted < 0:
            raise StorageFailed(f"{self.path} has no byte {offset}")
        if not self.is_direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, wanted, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

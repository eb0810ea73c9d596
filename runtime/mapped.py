"""Files that are computed on where they lie in the page cache: looked at through a mapping, without a copy.

Knows nothing of blocks. A page counts as this process's memory while the mapping shows it, so what is not computed on
is let go: the page cache still has it, and showing it again costs microseconds. What is not in the page cache is read
into it, many pages at a time.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from protocol.errors import StorageFailed

POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14: show pages now, and tell of what can't be read
PIECE_BYTES = 32 << 20  # shown by one system call
_Advise = Callable[[int, int, int], int]


def can_map() -> bool:
    """Say whether this system shows the pages of a file on demand, and tells what it could not read."""
    return _advise() is not None


@cache
def _advise() -> _Advise | None:
    """Return the C library's madvise: Python's own would keep all threads waiting while a disk is read."""
    if not (hasattr(mmap, "MADV_DONTNEED") and hasattr(os, "posix_fadvise")):
        return None
    try:
        found = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found.restype = ctypes.c_int
    probe = mmap.mmap(-1, mmap.PAGESIZE)
    return found if found(_address(probe), mmap.PAGESIZE, POPULATE_READ) == 0 else None


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class MappedFile:
    """One file of at least a byte. `data` may be read between `show` and `hide`; close it after use."""

    def __init__(self, path: Path) -> None:
        """Map the file, not reading it; raises StorageFailed."""
        self.path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            # Copies on write, which nobody does: tensors want memory that could be written to.
            self._memory = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            self.close()
            raise StorageFailed(f"can't map {path}: {getattr(error, 'strerror', None) or error}") from error
        self.data = memoryview(self._memory)
        self.num_bytes = len(self.data)

    def show(self, on_progress: Callable[[], None] = lambda: None) -> None:
        """Make all pages this process's memory; raises StorageFailed where the disk doesn't give them.

        `on_progress` is called after every piece.
        """
        os.posix_fadvise(self._descriptor, 0, self.num_bytes, os.POSIX_FADV_WILLNEED)  # reads far ahead, in parallel
        advise, address = _advise(), _address(self._memory)
        for offset in range(0, self.num_bytes, PIECE_BYTES):
            length = min(PIECE_BYTES, self.num_bytes - offset)
            if advise is not None and advise(address + offset, length, POPULATE_READ):
                code = ctypes.get_errno()
                why = "it ends early, or the disk fails" if code == errno.EFAULT else os.strerror(code)
                raise StorageFailed(f"can't read {self.path} at {offset}: {why}")
            on_progress()

    def hide(self) -> None:
        """Take no memory for it any more; the page cache keeps what it has."""
        self._memory.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let the file go; the mapping ends with the last look at it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

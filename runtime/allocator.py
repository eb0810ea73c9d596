"""Makes the C library give freed memory back, so that a process holds what it uses and no more.

Knows nothing of tensors. glibc raises the size from which it maps memory by itself each time a mapped block is freed;
later blocks then come from a heap that fragments. A worker that packs matrices of tens of megabytes one after the other
held up to a tenth more than its weights. And it gives each thread a heap of its own, which keeps what it once held: in
a stage of three members the sockets' threads kept 40 MB of frames that were long gone.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
MAPPED_FROM_BYTES = 1 << 20
TRIM_BYTES = 16 << 20
NUM_ARENAS = 2


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None  # musl has neither


def keep_steady() -> None:
    """Map blocks of 1 MiB and more singly, for good, and share two heaps; without effect in another C library."""
    library = _glibc()
    if library is not None:
        library.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
        library.mallopt(M_ARENA_MAX, NUM_ARENAS)


def give_back() -> None:
    """Return the free parts of the heap to the system; costs milliseconds, so not within a step."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)

"""Makes the C library keep exactly what was promised: hold memory for a step, and give back what was freed.

Knows nothing of tensors. glibc raises the size from which it maps memory by itself each time a mapped block is freed;
later blocks then come from a heap that fragments. A worker that packs matrices of tens of megabytes one after the other
held up to a tenth more than its weights. And it gives each thread a heap of its own, which keeps what it once held: in
a stage of three members the sockets' threads kept 40 MB of frames that were long gone. Hence one heap, and large blocks
mapped singly while a plan is loaded.

While a plan is computed it is the other way round: temporaries of a step come and go, and to map each anew costs a page
fault for every 4 KiB, a twentieth of the time of a long prompt. Hence `hold`, where the heap stays in one piece
(`protocol.heap`): it gets that memory at once, and keeps it until `give_back`.

Without effect in another C library: there a step's memory is taken when it is needed.
"""

from __future__ import annotations

import ctypes
import sys

from protocol.heap import has_steady_heap, is_glibc

M_MXFAST = 1
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4
M_ARENA_MAX = -8
MAPPED_FROM_BYTES = 1 << 20
TRIM_BYTES = 16 << 20
MOST_MAPPED, TOP_PAD_BYTES = 1 << 16, 1 << 17  # glibc's own
LARGEST = (1 << 31) - 1  # that mallopt takes


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform.startswith("linux") and is_glibc() else None


def keep_steady() -> None:
    """Map blocks of 1 MiB and more singly, for good; one heap for all threads, that joins what was freed at once."""
    library = _glibc()
    if library is not None:
        library.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
        library.mallopt(M_ARENA_MAX, 1)
        library.mallopt(M_MXFAST, 0)


def hold(num_bytes: int) -> None:
    """Take so much memory now, and have what is allocated until `give_back` lie in it, whatever its size.

    More is taken when that is not enough, and goes back when it is free again. Without effect where the heap does not
    stay in one piece. Raises MemoryError when the system refuses it.
    """
    library = _glibc()
    if library is None or not has_steady_heap():
        return
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TOP_PAD, min(num_bytes, LARGEST))
    library.mallopt(M_TRIM_THRESHOLD, min(num_bytes + TRIM_BYTES, LARGEST))
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    library.free.argtypes = (ctypes.c_void_p,)
    block = library.malloc(num_bytes)
    if block is None:
        raise MemoryError(f"the system refuses {num_bytes} bytes")
    ctypes.memset(block, 0xFF, num_bytes)  # a page is only there once it was written to
    library.free(block)


def give_back() -> None:
    """Return the free parts of the heap to the system, held or not; costs milliseconds, so not within a step."""
    library = _glibc()
    if library is not None:
        library.mallopt(M_MMAP_MAX, MOST_MAPPED)
        library.mallopt(M_TOP_PAD, TOP_PAD_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
        library.malloc_trim(0)

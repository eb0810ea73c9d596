"""What the kernel's page cache holds of a file, asked without touching it, and what an owner wants done with it.

Knows nothing of blocks. Linux tells since 6.5 (cachestat); where it does not, a file counts as not cached.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import cache

CACHESTAT = 451  # the same number on every architecture


class PageCache(StrEnum):
    """What reading weights from disk does with the page cache, which is no part of a worker's memory."""

    USE = "use"  # take what is there, add nothing but the gaps in it
    FILL = "fill"  # let the kernel keep what is read while nothing else wants the memory
    OFF = "off"  # always from the disk


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Counts(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recent"))


def cached_share(descriptor: int, offset: int, length: int) -> float:
    """Return which share of a range's pages is in the page cache, 0 to 1; no disk is read."""
    system_call = _system_call()
    if system_call is None or length <= 0:
        return 0.0
    counts = _Counts()
    failed = system_call(CACHESTAT, descriptor, ctypes.byref(_Range(offset, length)), ctypes.byref(counts), 0)
    num_pages = (offset + length - 1) // mmap.PAGESIZE - offset // mmap.PAGESIZE + 1
    return 0.0 if failed else min(1.0, counts.cached / num_pages)


@cache
def _system_call() -> Callable[..., int] | None:
    """Linux's way to a system call by number; an old kernel or a sandbox then refuses this one."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = ctypes.CDLL(None).syscall
    except (OSError, AttributeError):
        return None
    found.restype = ctypes.c_long
    found.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
    return found


def forget(descriptor: int, offset: int, length: int) -> None:
    """Drop a range's pages from the page cache, where the system can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)

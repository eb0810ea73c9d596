"""Holds processes to memory or to a disk rate by a control group (v1 or v2), and makes the page cache cold or warm.

Knows nothing of what the processes do. Needs root; without it `MemoryGroup.make` and `DiskGroup.make` return None.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from runtime.direct import DirectFile, aligned_buffer
from runtime.page_cache import PageCache

V1 = Path("/sys/fs/cgroup/memory")
V1_DISK = Path("/sys/fs/cgroup/blkio")
V2 = Path("/sys/fs/cgroup")
READ_BYTES = 32 << 20  # as much at a time as the window reads


class ControlGroup:
    """One control group and its folder."""

    def __init__(self, folder: Path, *, is_v1: bool) -> None:
        self._folder = folder
        self._is_v1 = is_v1

    def take(self, process: int) -> None:
        """Move a process in."""
        (self._folder / "cgroup.procs").write_text(str(process))

    def remove(self) -> None:
        """Remove the empty group."""
        self._folder.rmdir()


class MemoryGroup(ControlGroup):
    """A limit of memory; the page cache of its processes counts too, but the kernel takes that back by itself."""

    @staticmethod
    def make(name: str, limit_bytes: int) -> MemoryGroup | None:
        """Create a group with a limit; None where that is not allowed or there is no memory controller."""
        is_v1 = V1.is_dir()
        folder = (V1 if is_v1 else V2) / name
        try:
            folder.mkdir(exist_ok=True)
            (folder / ("memory.limit_in_bytes" if is_v1 else "memory.max")).write_text(str(limit_bytes))
        except OSError:
            return None
        return MemoryGroup(folder, is_v1=is_v1)

    def enter(self) -> None:
        """Move this process in; children that it starts from now on are in too."""
        self.take(os.getpid())

    def leave(self) -> None:
        """Move this process back to the root group."""
        ((V1 if self._is_v1 else V2) / "cgroup.procs").write_text(str(os.getpid()))

    def kills(self) -> int:
        """How many processes the kernel killed in here for want of memory."""
        file = self._folder / ("memory.oom_control" if self._is_v1 else "memory.events")
        counts = dict(line.split() for line in file.read_text().splitlines())
        return int(counts.get("oom_kill", 0))


class DiskGroup(ControlGroup):
    """A limited rate at which its processes may read from one disk."""

    @staticmethod
    def make(name: str) -> DiskGroup | None:
        """Create a group without a limit; None where that is not allowed or there is no such controller."""
        is_v1 = V1_DISK.is_dir()
        folder = (V1_DISK if is_v1 else V2) / name
        try:
            folder.mkdir(exist_ok=True)
        except OSError:
            return None
        return DiskGroup(folder, is_v1=is_v1) if (folder / _rate_file(is_v1)).exists() else None

    def hold(self, file: Path, bytes_per_s: int) -> None:
        """Limit reading from the disk that holds `file`, from now on."""
        device = file.stat().st_dev
        word = "" if self._is_v1 else "rbps="
        (self._folder / _rate_file(self._is_v1)).write_text(
            f"{os.major(device)}:{os.minor(device)} {word}{bytes_per_s}"
        )


def _rate_file(is_v1: bool) -> str:
    return "blkio.throttle.read_bps_device" if is_v1 else "io.max"


def disk_rate(files: Sequence[Path], most_bytes: int = 1 << 30) -> float:
    """Bytes a second at which one reader gets files past the page cache, one large read after the other."""
    buffer, done, began = aligned_buffer(READ_BYTES), 0, time.perf_counter()
    for path in files:
        file = DirectFile(path, PageCache.OFF)
        for offset in range(0, file.num_bytes, READ_BYTES):
            file.read_into(buffer, offset)
            done += min(READ_BYTES, file.num_bytes - offset)
        file.close()
        if done >= most_bytes:
            break
    return done / (time.perf_counter() - began)


def warm_page_cache(files: Sequence[Path]) -> None:
    """Have the kernel remember files, charged to this process and not to those that are measured."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(READ_BYTES):
                pass


def drop_page_cache() -> bool:
    """Have the kernel forget every file it remembers; False where that is not allowed."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True

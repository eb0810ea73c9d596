"""Holds processes to a memory limit by a control group (v1 or v2), and says what they took.

Knows nothing of what the processes do. Needs root; without it `MemoryGroup.make` returns None.
"""

from __future__ import annotations

import os
from pathlib import Path

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


class MemoryGroup:
    """One control group; the page cache of its processes counts too, but the kernel takes that back by itself."""

    def __init__(self, folder: Path, *, is_v1: bool) -> None:
        self._folder = folder
        self._is_v1 = is_v1

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
        (self._folder / "cgroup.procs").write_text(str(os.getpid()))

    def leave(self) -> None:
        """Move this process back to the root group."""
        ((V1 if self._is_v1 else V2) / "cgroup.procs").write_text(str(os.getpid()))

    def kills(self) -> int:
        """How many processes the kernel killed in here for want of memory."""
        file = self._folder / ("memory.oom_control" if self._is_v1 else "memory.events")
        counts = dict(line.split() for line in file.read_text().splitlines())
        return int(counts.get("oom_kill", 0))

    def remove(self) -> None:
        """Remove the empty group."""
        self._folder.rmdir()


def drop_page_cache() -> bool:
    """Have the kernel forget every file it remembers; False where that is not allowed."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True

"""A file of pages on this device's disk, which has no name: nothing of it outlives this process, however it ends.

Knows nothing of what lies in a page. Nobody else can open it. One thread uses it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


class PageFile:
    """Pages of `page_bytes`, together at most `limit_bytes`. Whatever can't be done raises OSError."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """The file is made in `folder` when the first page is taken."""
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._descriptor = -1
        self._free: list[int] = []
        self._num_pages = 0
        self.page_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return self._num_pages * self.page_bytes

    @property
    def is_full(self) -> bool:
        """Whether there is no page to be had."""
        return not self._free and self.num_bytes + self.page_bytes > self._limit_bytes

    def take(self) -> int:
        """Return a page to be written to."""
        if self._descriptor < 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as file:
                self._descriptor = os.dup(file.fileno())
        if self.is_full:
            raise OSError(0, f"the spool is limited to {self._limit_bytes} bytes")
        if not self._free:
            self._free.append(self._num_pages)
            self._num_pages += 1
        return self._free.pop()

    def give_back(self, pages: Iterable[int]) -> None:
        """Say that these pages are needed no more; when none is, the disk has its room back."""
        self._free += pages
        if self._num_pages and len(self._free) == self._num_pages:
            self._free, self._num_pages = [], 0
            os.ftruncate(self._descriptor, 0)

    def write(self, page: int, place: int, data: memoryview) -> None:
        """Write bytes from `place` of a page on."""
        offset = page * self.page_bytes + place
        while data:
            written = write_at(self._descriptor, data, offset)
            data, offset = data[written:], offset + written

    def read(self, page: int, place: int, length: int) -> bytes:
        """Read bytes from `place` of a page on."""
        data = os.pread(self._descriptor, length, page * self.page_bytes + place)
        if len(data) != length:
            raise OSError(0, "the file was cut")
        return data

    def close(self) -> None:
        """Remove the file."""
        self._free, self._num_pages = [], 0
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def write_at(descriptor: int, data: memoryview, offset: int) -> int:
    """Write to a file; a seam for tests of full disks."""
    return os.pwrite(descriptor, data, offset)

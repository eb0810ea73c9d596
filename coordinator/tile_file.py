"""Quantised tiles, kept on the coordinator's disk once they are made: one file, tile after tile.

Knows nothing of how tiles are cut. Quantising reads whole rows of the checkpoint, too dear to repeat at every request;
float tiles are cut on demand instead and need no copy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from protocol.durable_file import Draft, storage_errors
from protocol.errors import StorageFailed
from protocol.tiles import TileEntry


class TileFile:
    """A finished file of tiles in the order of the manifest; reads are safe from several threads."""

    def __init__(self, path: Path, entries: Sequence[TileEntry]) -> None:
        """Open the file; raises StorageFailed unless it has exactly the bytes of the entries."""
        self.path = path
        self._offsets: dict[bytes, int] = {}
        end = 0
        for entry in entries:
            self._offsets.setdefault(entry.digest, end)
            end += entry.num_bytes
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise StorageFailed(f"can't open {path}: {error.strerror or error}") from error
        if os.fstat(self._descriptor).st_size != end:
            self.close()
            raise StorageFailed(f"{path} is not the {end} bytes that its manifest promises")

    def read(self, entry: TileEntry) -> bytearray:
        """Return a whole tile; raises StorageFailed naming the file."""
        data = bytearray(entry.num_bytes)
        position, offset = 0, self._offsets[entry.digest]
        while position < len(data):
            try:
                count = os.preadv(self._descriptor, [memoryview(data)[position:]], offset + position)
            except OSError as error:
                raise StorageFailed(f"can't read {self.path}: {error.strerror or error}") from error
            if count == 0:
                raise StorageFailed(f"{self.path} is truncated: no bytes at {offset + position}")
            position += count
        return data

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class TileFileWriter:
    """Writes tiles beside the final name and renames at the end; left early, nothing remains.

    All methods raise StorageFull or StorageFailed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._draft = Draft(path)

    def __enter__(self) -> TileFileWriter:
        with storage_errors(self._path):
            self._draft.__enter__()
        return self

    def append(self, data: bytes | bytearray) -> None:
        """Add a tile."""
        with storage_errors(self._path):
            self._draft.append(data)

    def finish(self) -> None:
        """Put the file in its place, on disk for good."""
        with storage_errors(self._path):
            self._draft.finish()

    def __exit__(self, *_: object) -> None:
        with storage_errors(self._path):
            self._draft.__exit__()

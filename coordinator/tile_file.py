"""Quantised tiles, kept on the coordinator's disk once they are made: one file, tile after tile.

Knows nothing of how tiles are cut. Quantising reads whole rows of the checkpoint, too dear to repeat at every request;
float tiles are cut on demand instead and need no copy.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from protocol.errors import StorageFailed, StorageFull
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
    """Writes tiles beside the final name and renames at the end; left early, nothing remains."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = ""
        self._file: IO[bytes] | None = None

    def __enter__(self) -> TileFileWriter:
        with _told(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, self._temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
            self._file = os.fdopen(descriptor, "wb")
        return self

    def append(self, data: bytes | bytearray) -> None:
        """Add a tile; raises StorageFull or StorageFailed."""
        with _told(self._path):
            self._open_file.write(data)

    def finish(self) -> None:
        """Put the file in its place, on disk for good; raises StorageFull or StorageFailed."""
        with _told(self._path):
            self._open_file.flush()
            os.fsync(self._open_file.fileno())
            self._open_file.close()
            Path(self._temporary).replace(self._path)

    def __exit__(self, *_: object) -> None:
        self._open_file.close()
        Path(self._temporary).unlink(missing_ok=True)

    @property
    def _open_file(self) -> IO[bytes]:
        if self._file is None:
            raise StorageFailed(f"{self._path} is not being written")
        return self._file


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what the operating system says into a typed error that names the file."""
    try:
        yield
    except OSError as error:
        failure = StorageFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageFailed
        raise failure(f"can't write {path}: {error.strerror or error}") from error

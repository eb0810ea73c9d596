"""Files that are there whole or not at all, at every moment: written beside their name, then renamed.

Knows nothing of what is in them, nor of what it means to their owner that one can't be written: a `Draft` raises what
the operating system says, `write_whole` an error of our tree; who calls decides whether that is an end or a warning.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from protocol.errors import StorageFailed, StorageFull

NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
OWNER_ONLY: Final = 0o600
AS_UMASK_SAYS: Final = 0o666
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


class Draft:
    """A file on its way to its name; left before `finish`, nothing of it remains. All methods raise OSError."""

    def __init__(self, path: Path, *, mode: int = OWNER_ONLY, folder_mode: int = 0o777) -> None:
        """`mode` and `folder_mode` are for the file and for folders that are missing, both under the umask."""
        self._path = path
        self._mode = mode
        self._folder_mode = folder_mode
        self._draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Draft:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=self._folder_mode)
        self._file = os.fdopen(os.open(self._draft, _NEW, self._mode), "wb")
        return self

    def append(self, data: bytes | bytearray) -> None:
        """Add the next bytes."""
        self._open_file.write(data)

    def finish(self, *, is_synced: bool = True) -> None:
        """Give it its name, in place of what had it before; `is_synced`: the bytes also outlive a loss of power."""
        file = self._open_file
        file.flush()
        if is_synced:
            os.fsync(file.fileno())
        file.close()
        self._draft.replace(self._path)
        self._file = None

    def __exit__(self, *_: object) -> None:
        if self._file is None:
            return
        with suppress(OSError):  # it writes what is still buffered; that there is no room for it was told already
            self._file.close()
        self._draft.unlink(missing_ok=True)

    @property
    def _open_file(self) -> IO[bytes]:
        if self._file is None:
            raise ValueError(f"{self._path} is not being written")
        return self._file


def write_whole(path: Path, content: bytes, *, is_synced: bool, mode: int = OWNER_ONLY, phase: str = "") -> None:
    """Write a small file; raises StorageFull when there is no room, else StorageFailed, both naming the folder.

    What was there before stays where it can't be written.
    """
    with storage_errors(path, phase), Draft(path, mode=mode) as draft:
        draft.append(content)
        draft.finish(is_synced=is_synced)


@contextmanager
def storage_errors(path: Path, phase: str = "") -> Iterator[None]:
    """Turn what the operating system says of `path` into StorageFull or StorageFailed, naming file and folder."""
    try:
        yield
    except OSError as error:
        failure = StorageFull if error.errno in NO_ROOM else StorageFailed
        raise failure(f"can't write {path}: {error.strerror or error}", phase=phase) from error

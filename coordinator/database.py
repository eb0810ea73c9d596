"""One SQLite file, as the coordinator uses it: locked while it is open, its schema brought up to date, its errors told.

Knows nothing of what is kept in it. Calls are short and synchronous; one thread uses a file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from protocol.errors import ConfigInvalid, ManyhandsError, StorageFailed, StorageFull

LOCK_TIMEOUT_S = 1.0
Row = tuple[Any, ...]


class Durability(StrEnum):
    """What a commit survives; each is the word of SQLite's `synchronous`, under a write-ahead log."""

    POWER_LOSS = "FULL"  # waits for the disk
    KILL = "NORMAL"  # handed to the operating system; a power loss takes the last commits, never half a one


class Database:
    """An open file. It is locked while it is open, so two coordinators can't share a state folder."""

    def __init__(self, path: Path, connection: sqlite3.Connection, if_lost: str) -> None:
        self.path = path
        self._db = connection
        self._if_lost = if_lost

    @classmethod
    def open(cls, path: Path, migrations: Sequence[str], durability: Durability, *, if_lost: str) -> Database:
        """Open or create the file and bring its schema up to date: one script a version, from the one before to it.

        `if_lost`: what it costs to move a damaged file away. Raises ConfigInvalid when the file is damaged, of a newer
        release or in use, StorageFull when the disk is.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)
        except OSError as error:
            raise ConfigInvalid(
                f"{path} can't be created: {error.strerror or error}", remedy="choose a --state-dir that is yours"
            ) from error
        try:
            connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise _operational(path, error) from error
        database = cls(path, connection, if_lost)
        try:
            database._prepare(migrations, durability)
        except BaseException:
            connection.close()
            raise
        return database

    def close(self) -> None:
        """Close the file and give up its lock."""
        self._db.close()

    def rows(self, query: str, *values: object) -> list[Row]:
        """Return all rows of a query."""
        with self.told():
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block or nothing; raises StorageFull, StorageFailed, ConfigInvalid for a file that is damaged."""
        with self.told():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def reserve(self, num_bytes: int) -> None:
        """Take so much room on the disk beforehand, in the file and again in its write-ahead log; raises StorageFull.

        What is written later goes there first, so a disk that fills up does not stop at once what is under way.
        """
        with self.transaction() as db:  # two of them: pages that one transaction takes and frees are never written
            db.execute("CREATE TABLE IF NOT EXISTS reserve (bytes BLOB)")
            db.execute("INSERT INTO reserve VALUES (zeroblob(?))", (num_bytes,))
        with self.transaction() as db:
            db.execute("DROP TABLE reserve")
        self.make_room()

    def make_room(self) -> None:
        """Move what the write-ahead log holds to its place, so that the log may begin again without growing."""
        with self.told():
            self._db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Turn what SQLite says, or a value that no release has written, into an error with a remedy."""
        try:
            yield
        except ManyhandsError:
            raise
        except sqlite3.OperationalError as error:
            raise _operational(self.path, error) from error
        except (sqlite3.DatabaseError, ValueError) as error:
            raise ConfigInvalid(
                f"{self.path} is damaged: {error}",
                remedy=f"move it away ({self._if_lost}), or choose another --state-dir",
            ) from error

    def _prepare(self, migrations: Sequence[str], durability: Durability) -> None:
        db = self._db
        with self.told():
            # Exclusive before WAL: then WAL needs no shared memory file, and a second coordinator finds it locked.
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(f"PRAGMA synchronous = {durability.value}")
        with self.transaction():
            found = int(db.execute("PRAGMA user_version").fetchone()[0])
            if found > len(migrations):
                raise ConfigInvalid(
                    f"{self.path} was written by a newer manyhands "
                    f"(schema {found}; this release knows {len(migrations)})",
                    remedy="install the newer release again, or choose another --state-dir",
                )
            for number in range(found, len(migrations)):
                for statement in filter(str.strip, migrations[number].split(";")):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {number + 1}")


def _operational(path: Path, error: sqlite3.OperationalError) -> ManyhandsError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary result code
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return ConfigInvalid(
            f"{path} is in use by another coordinator",
            remedy="stop the other one, or give this one a --state-dir of its own",
        )
    if code == sqlite3.SQLITE_FULL:
        return StorageFull(f"{path}: {error}", remedy="free space, or choose another --state-dir")
    if code == sqlite3.SQLITE_IOERR:
        return StorageFailed(f"{path}: {error}", remedy="check the disk, or choose another --state-dir")
    return ConfigInvalid(f"{path} can't be used: {error}", remedy="choose a --state-dir that can be written to")

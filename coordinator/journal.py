"""What the coordinator must not forget: its name and term, the keys it has pinned, its invitations; one SQLite file.

Knows nothing of sockets or of what a key may do. Calls are short and synchronous; one thread uses a journal.

Public keys only: no secret is written here.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coordinator.admission import Enrolment, Pin, Token
from protocol.errors import ConfigInvalid, ManyhandsError, StorageFull
from protocol.ids import WorkerId
from protocol.messages import Role

LOCK_TIMEOUT_S = 1.0
MIGRATIONS = (
    """
    CREATE TABLE cluster (id INTEGER PRIMARY KEY CHECK (id = 1), name TEXT NOT NULL, term INTEGER NOT NULL);
    CREATE TABLE pins (public_key BLOB PRIMARY KEY, worker TEXT NOT NULL UNIQUE, role TEXT NOT NULL,
                       pinned_at_s REAL NOT NULL, revoked INTEGER NOT NULL DEFAULT 0);
    CREATE TABLE tokens (public_key BLOB PRIMARY KEY, trusted INTEGER NOT NULL, expires_at_s REAL NOT NULL,
                         spent_by BLOB NOT NULL DEFAULT x'');
    CREATE TABLE clients (public_key BLOB NOT NULL UNIQUE, name TEXT PRIMARY KEY);
    """,
)
"""One script a schema version, from the version before to this one; a new version is added at the end."""


class Journal:
    """An open journal. The file is locked while it is open, so two coordinators can't share a state folder."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._db = connection

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open or create the journal at `path` and bring its schema up to date.

        Raises ConfigInvalid when the file is damaged, of a newer release or in use, StorageFull when the disk is.
        """
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)
            connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None)
        journal = cls(path, connection)
        try:
            with _told(path):
                journal._prepare()
        except BaseException:
            connection.close()
            raise
        return journal

    def close(self) -> None:
        """Close the file and give up its lock."""
        self._db.close()

    def begin_term(self, name: str) -> tuple[str, int]:
        """Raise the term by one and return (cluster name, term); the first name a journal hears stays its name."""
        with self._transaction() as db:
            db.execute("INSERT INTO cluster VALUES (1, ?, 0) ON CONFLICT DO NOTHING", (name,))
            db.execute("UPDATE cluster SET term = term + 1")
            row = db.execute("SELECT name, term FROM cluster").fetchone()
        return str(row[0]), int(row[1])

    def pins(self) -> list[Pin]:
        """Return every pinned key, the revoked ones too."""
        with _told(self._path):
            rows = self._db.execute("SELECT public_key, worker, role, pinned_at_s, revoked FROM pins").fetchall()
            return [
                Pin(
                    public_key=bytes(key),
                    worker=WorkerId(worker),
                    role=Role(role),
                    pinned_at_s=at,
                    revoked=bool(revoked),
                )
                for key, worker, role, at, revoked in rows
            ]

    def tokens(self) -> list[Token]:
        """Return every invitation that has not been forgotten."""
        with _told(self._path):
            rows = self._db.execute("SELECT public_key, trusted, expires_at_s, spent_by FROM tokens").fetchall()
            return [
                Token(public_key=bytes(key), trusted=bool(trusted), expires_at_s=until, spent_by=bytes(spent))
                for key, trusted, until, spent in rows
            ]

    def clients(self) -> list[bytes]:
        """Return the public keys of clients."""
        with _told(self._path):
            return [bytes(key) for (key,) in self._db.execute("SELECT public_key FROM clients").fetchall()]

    def put_client(self, name: str, public_key: bytes) -> None:
        """Remember a client's key; a key it had before is not let in any more."""
        with self._transaction() as db:
            db.execute("DELETE FROM clients WHERE name = ?", (name,))
            db.execute("INSERT INTO clients VALUES (?, ?)", (public_key, name))

    def add_token(self, token: Token) -> None:
        """Remember a new invitation."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO tokens VALUES (?, ?, ?, ?)",
                (token.public_key, token.trusted, token.expires_at_s, token.spent_by),
            )

    def record(self, enrolment: Enrolment) -> None:
        """Pin a worker's key and spend its invitation, both or neither."""
        pin, token = enrolment.pin, enrolment.token
        with self._transaction() as db:
            db.execute("UPDATE tokens SET spent_by = ? WHERE public_key = ?", (token.spent_by, token.public_key))
            self._put_pin(db, pin)

    def put_pin(self, pin: Pin) -> None:
        """Write a pin anew, for instance a revoked one."""
        with self._transaction() as db:
            self._put_pin(db, pin)

    def forget_tokens(self, before_s: float) -> int:
        """Drop invitations that expired before this unix time; returns how many."""
        with self._transaction() as db:
            return db.execute("DELETE FROM tokens WHERE expires_at_s < ?", (before_s,)).rowcount

    @staticmethod
    def _put_pin(db: sqlite3.Connection, pin: Pin) -> None:
        db.execute(
            "INSERT INTO pins VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (public_key) DO UPDATE SET role = excluded.role, revoked = excluded.revoked",
            (pin.public_key, pin.worker, pin.role.value, pin.pinned_at_s, pin.revoked),
        )

    def _prepare(self) -> None:
        db = self._db
        # Exclusive before WAL: then WAL needs no shared memory file, and a second coordinator finds the file locked.
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        with self._transaction():
            found = int(db.execute("PRAGMA user_version").fetchone()[0])
            if found > len(MIGRATIONS):
                raise ConfigInvalid(
                    f"{self._path} was written by a newer manyhands "
                    f"(schema {found}; this release knows {len(MIGRATIONS)})",
                    remedy="install the newer release again, or choose another --state-dir",
                )
            for number in range(found, len(MIGRATIONS)):
                for statement in filter(str.strip, MIGRATIONS[number].split(";")):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {number + 1}")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _told(self._path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what SQLite or the disk says into an error with a remedy."""
    try:
        yield
    except ManyhandsError:
        raise
    except sqlite3.OperationalError as error:
        raise _operational(path, error) from error
    except (sqlite3.DatabaseError, ValueError) as error:  # ValueError: a role or pin that no release has written
        raise ConfigInvalid(
            f"{path} is damaged: {error}",
            remedy="move it away (its workers must then be invited again), or choose another --state-dir",
        ) from error
    except OSError as error:
        raise ConfigInvalid(
            f"{path} can't be created: {error.strerror or error}", remedy="choose a --state-dir that is yours"
        ) from error


def _operational(path: Path, error: sqlite3.OperationalError) -> ManyhandsError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary result code
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return ConfigInvalid(
            f"{path} is in use by another coordinator",
            remedy="stop the other one, or give this one a --state-dir of its own",
        )
    if code == sqlite3.SQLITE_FULL:
        return StorageFull(f"{path}: {error}", remedy="free space, or choose another --state-dir")
    return ConfigInvalid(f"{path} can't be used: {error}", remedy="choose a --state-dir that can be written to")

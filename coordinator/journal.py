"""What the coordinator must not forget: its name, term and port, pinned keys, invitations, seats; one SQLite file.

Knows nothing of sockets or of what a key may do. Calls are short and synchronous; one thread uses a journal. Each is
on the disk when it returns.

Public keys only: no secret is written here.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from coordinator.admission import Enrolment, Pin, Token
from coordinator.database import Database, Durability
from protocol.ids import WorkerId, worker_id
from protocol.messages import Role

MIGRATIONS = (
    """
    CREATE TABLE cluster (id INTEGER PRIMARY KEY CHECK (id = 1), name TEXT NOT NULL, term INTEGER NOT NULL);
    CREATE TABLE pins (public_key BLOB PRIMARY KEY, worker TEXT NOT NULL UNIQUE, role TEXT NOT NULL,
                       pinned_at_s REAL NOT NULL, revoked INTEGER NOT NULL DEFAULT 0);
    CREATE TABLE tokens (public_key BLOB PRIMARY KEY, trusted INTEGER NOT NULL, expires_at_s REAL NOT NULL,
                         spent_by BLOB NOT NULL DEFAULT x'');
    CREATE TABLE clients (public_key BLOB NOT NULL UNIQUE, name TEXT PRIMARY KEY);
    """,
    """
    CREATE TABLE seats (place INTEGER PRIMARY KEY, worker TEXT);
    CREATE TABLE listener (id INTEGER PRIMARY KEY CHECK (id = 1), port INTEGER NOT NULL);
    """,
)
"""One script a schema version, from the version before to this one; a new version is added at the end."""


class Journal:
    """An open journal. The file is locked while it is open, so two coordinators can't share a state folder."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open or create the journal at `path` and bring its schema up to date.

        Raises ConfigInvalid when the file is damaged, of a newer release or in use, StorageFull when the disk is.
        """
        if_lost = "its workers must then be invited again"
        return cls(Database.open(path, MIGRATIONS, Durability.POWER_LOSS, if_lost=if_lost))

    def close(self) -> None:
        """Close the file and give up its lock."""
        self._database.close()

    def begin_term(self, name: str) -> tuple[str, int]:
        """Raise the term by one and return (cluster name, term); the first name a journal hears stays its name."""
        with self._database.transaction() as db:
            db.execute("INSERT INTO cluster VALUES (1, ?, 0) ON CONFLICT DO NOTHING", (name,))
            db.execute("UPDATE cluster SET term = term + 1")
            row = db.execute("SELECT name, term FROM cluster").fetchone()
        return str(row[0]), int(row[1])

    def pins(self) -> list[Pin]:
        """Return every pinned key, the revoked ones too."""
        rows = self._database.rows("SELECT public_key, worker, role, pinned_at_s, revoked FROM pins")
        with self._database.told():
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
        rows = self._database.rows("SELECT public_key, trusted, expires_at_s, spent_by FROM tokens")
        return [
            Token(public_key=bytes(key), trusted=bool(trusted), expires_at_s=until, spent_by=bytes(spent))
            for key, trusted, until, spent in rows
        ]

    def clients(self) -> list[bytes]:
        """Return the public keys of clients."""
        return [bytes(key) for (key,) in self._database.rows("SELECT public_key FROM clients")]

    def put_client(self, name: str, public_key: bytes) -> None:
        """Remember a client's key; a key it had before is not let in any more."""
        with self._database.transaction() as db:
            db.execute("DELETE FROM clients WHERE name = ?", (name,))
            db.execute("INSERT INTO clients VALUES (?, ?)", (public_key, name))

    def add_token(self, token: Token) -> None:
        """Remember a new invitation."""
        with self._database.transaction() as db:
            db.execute(
                "INSERT INTO tokens VALUES (?, ?, ?, ?)",
                (token.public_key, token.trusted, token.expires_at_s, token.spent_by),
            )

    def record(self, enrolment: Enrolment) -> None:
        """Pin a worker's key and spend its invitation, both or neither."""
        pin, token = enrolment.pin, enrolment.token
        with self._database.transaction() as db:
            db.execute("UPDATE tokens SET spent_by = ? WHERE public_key = ?", (token.spent_by, token.public_key))
            self._put_pin(db, pin)

    def put_pin(self, pin: Pin) -> None:
        """Write a pin anew, for instance a revoked one."""
        with self._database.transaction() as db:
            self._put_pin(db, pin)

    def forget_tokens(self, before_s: float) -> int:
        """Drop invitations that expired before this unix time; returns how many."""
        with self._database.transaction() as db:
            return db.execute("DELETE FROM tokens WHERE expires_at_s < ?", (before_s,)).rowcount

    def seats(self) -> tuple[WorkerId | None, ...]:
        """Return who sat where under the last plan that was ready (None: nobody); empty when there was none."""
        rows = self._database.rows("SELECT worker FROM seats ORDER BY place")
        with self._database.told():
            return tuple(None if name is None else worker_id(name) for (name,) in rows)

    def put_seats(self, seats: Sequence[WorkerId | None]) -> None:
        """Remember who sits where under a plan."""
        with self._database.transaction() as db:
            db.execute("DELETE FROM seats")
            db.executemany("INSERT INTO seats VALUES (?, ?)", enumerate(seats))

    def port(self) -> int:
        """Return the port of the last start; 0 when there was none."""
        rows = self._database.rows("SELECT port FROM listener")
        return int(rows[0][0]) if rows else 0

    def put_port(self, port: int) -> None:
        """Remember where workers and clients will look for the next start."""
        with self._database.transaction() as db:
            db.execute(
                "INSERT INTO listener VALUES (1, ?) ON CONFLICT (id) DO UPDATE SET port = excluded.port", (port,)
            )

    @staticmethod
    def _put_pin(db: sqlite3.Connection, pin: Pin) -> None:
        db.execute(
            "INSERT INTO pins VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (public_key) DO UPDATE SET role = excluded.role, revoked = excluded.revoked",
            (pin.public_key, pin.worker, pin.role.value, pin.pinned_at_s, pin.revoked),
        )

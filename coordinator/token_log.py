"""The token log on disk: requests, their prompts, every token of their answers, and how they ended; one SQLite file.

Knows nothing of clients or of when something is said; who uses it writes first and shows afterwards.

Not in the journal: there every commit waits for the disk, which no token should. A log that loses its last commits to a
power cut costs nothing, as the tokens come again the same; so what is written here has survived the process, not more.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection
from typing import NamedTuple

from coordinator.database import Database, Durability, Row
from coordinator.events import token_bytes, token_ids
from protocol.errors import ManyhandsError, StorageFull
from protocol.frames import decode, encode
from protocol.ids import SessionId
from protocol.messages import ErrorReport, Finished, Generate

MIGRATIONS = (
    """
    CREATE TABLE sessions (id INTEGER PRIMARY KEY, digest BLOB NOT NULL, model BLOB NOT NULL, header BLOB NOT NULL,
                           prompt BLOB NOT NULL, num_prompt INTEGER NOT NULL, arrived_s REAL NOT NULL,
                           answer BLOB NOT NULL DEFAULT x'', ended_s REAL, outcome BLOB);
    CREATE TABLE tokens (number INTEGER PRIMARY KEY, session INTEGER NOT NULL, start INTEGER NOT NULL,
                         ids BLOB NOT NULL);
    """,
)
# The table `tokens` is only added to at its end, and has no index: so a step of many sessions dirties one page, not one
# for each. What it holds are answers under way; at its end an answer moves to its session's row.
RESERVE_BYTES = 4 << 20  # as much as the write-ahead log grows to before it is moved; some 200,000 tokens
Outcome = Finished | ErrorReport

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A request became a session. `digest`: of its header and payload; `prompt`: token ids, little-endian int32."""

    session: SessionId
    order: Generate
    digest: bytes
    prompt: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Grown:
    """New tokens of an answer, from its token number `start` on."""

    session: SessionId
    start: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The last word of a session; its prompt is not kept any longer."""

    session: SessionId
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """A session that nobody will ask for any more."""

    session: SessionId


Record = Begun | Grown | Ended | Forgotten


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A session as it was written; `prompt` is empty and `outcome` set when it has ended. Times in unix seconds."""

    session: SessionId
    order: Generate
    digest: bytes
    model: bytes
    prompt: array[int]
    num_prompt: int
    answer: array[int]
    arrived_s: float
    ended_s: float | None
    outcome: Outcome | None


class Unwritten(NamedTuple):
    """A session whose records could not be written, and why."""

    session: SessionId
    error: ManyhandsError


class TokenLog:
    """An open token log of one model; `model` names its weights and formats. Locked while it is open."""

    def __init__(self, database: Database, model: bytes) -> None:
        self._database = database
        self._model = model
        self._stale: set[SessionId] = set()  # sessions with records in the file that are not true any more

    @classmethod
    def open(cls, path: Path, model: bytes, reserve_bytes: int = RESERVE_BYTES) -> TokenLog:
        """Open or create it, with room for requests under way; raises ConfigInvalid, StorageFull as `Database.open`."""
        database = Database.open(path, MIGRATIONS, Durability.KILL, if_lost="requests under way are then lost")
        try:
            if reserve_bytes:
                database.reserve(reserve_bytes)
        except StorageFull as error:
            _log.warning("no room can be reserved for requests under way: %s", error)
        except BaseException:
            database.close()
            raise
        return cls(database, model)

    def close(self) -> None:
        """Close the file and give up its lock."""
        self._database.close()

    def write(self, records: Sequence[Record], now: float) -> list[Unwritten]:
        """Write records in one transaction, at unix time `now`; returns the sessions for which that was impossible.

        When there is no room, what has ended makes place. If that is not enough each session is written by itself, as
        one may fit where another doesn't; of one that doesn't, nothing of this call is written.
        """
        if not records or self._try(records, now) is None:
            return []
        sessions = dict.fromkeys(record.session for record in records)
        failed = []
        for session in sessions:
            error = self._try([record for record in records if record.session == session], now)
            if error is not None:
                self._stale.add(session)
                failed.append(Unwritten(session, error))
        return failed

    def entries(self) -> list[Entry]:
        """Return all sessions in the order of their numbers; raises ConfigInvalid when the file is damaged."""
        columns = "id, header, digest, model, prompt, num_prompt, arrived_s, answer, ended_s, outcome"
        rows = self._database.rows(f"SELECT {columns} FROM sessions ORDER BY id")
        under_way = self._database.rows("SELECT session, start, ids FROM tokens ORDER BY number")
        with self._database.told():
            answers = _joined(under_way)
            return [
                Entry(
                    session=SessionId(session),
                    order=_order(header),
                    digest=bytes(digest),
                    model=bytes(model),
                    prompt=token_ids(prompt),
                    num_prompt=num_prompt,
                    answer=answers.get(session) or token_ids(answer),
                    arrived_s=arrived_s,
                    ended_s=ended_s,
                    outcome=None if outcome is None else _outcome(outcome),
                )
                for session, header, digest, model, prompt, num_prompt, arrived_s, answer, ended_s, outcome in rows
            ]

    def _try(self, records: Sequence[Record], now: float) -> ManyhandsError | None:
        try:
            try:
                self._write(records, now)
            except StorageFull:
                self._make_room()
                self._write(records, now)
        except ManyhandsError as error:
            return error
        return None

    def _write(self, records: Iterable[Record], now: float) -> None:
        with self._database.transaction() as db:
            for session in self._stale:
                _forget(db, session)
            for record in records:
                self._put(db, record, now)
        self._stale.clear()

    def _put(self, db: Connection, record: Record, now: float) -> None:
        match record:
            case Begun():
                header, num_prompt = bytes(encode(record.order)[0]), len(record.prompt) // 4
                db.execute(
                    "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, x'', NULL, NULL)",
                    (record.session, record.digest, self._model, header, record.prompt, num_prompt, now),
                )
            case Grown():
                ids = token_bytes(record.tokens)
                db.execute("INSERT INTO tokens VALUES (NULL, ?, ?, ?)", (record.session, record.start, ids))
            case Ended():
                query = "SELECT session, start, ids FROM tokens WHERE session = ? ORDER BY number"
                answer = _joined(db.execute(query, (record.session,))).get(record.session, ())
                db.execute(
                    "UPDATE sessions SET prompt = x'', answer = ?, ended_s = ?, outcome = ? WHERE id = ?",
                    (token_bytes(answer), now, bytes(encode(record.outcome)[0]), record.session),
                )
                db.execute("DELETE FROM tokens WHERE session = ?", (record.session,))
            case Forgotten():
                _forget(db, record.session)

    def _make_room(self) -> None:
        self._database.make_room()
        with self._database.transaction() as db:
            db.execute("DELETE FROM sessions WHERE ended_s IS NOT NULL")


def _forget(db: Connection, session: SessionId) -> None:
    db.execute("DELETE FROM tokens WHERE session = ?", (session,))
    db.execute("DELETE FROM sessions WHERE id = ?", (session,))


def _joined(rows: Iterable[Row]) -> dict[SessionId, array[int]]:
    """Join rows of (session, start, ids) to the answer of each session; raises ValueError when a token is missing."""
    answers: dict[SessionId, array[int]] = {}
    for session, start, ids in rows:
        answer = answers.setdefault(session, array("i"))
        if start != len(answer):
            raise ValueError(f"session {session} has no token {len(answer)}")
        answer.extend(token_ids(ids))
    return answers


def _order(header: bytes) -> Generate:
    message = _decoded([header, b""])
    if isinstance(message, Generate):
        return message
    raise ValueError(f"{type(message).__name__} is no request")


def _outcome(header: bytes) -> Outcome:
    message = _decoded([header])
    if isinstance(message, Finished | ErrorReport):
        return message
    raise ValueError(f"{type(message).__name__} is no outcome")


def _decoded(frames: list[bytes]) -> object:
    try:
        return decode(frames).message
    except ManyhandsError as error:
        raise ValueError(str(error)) from error

"""The journal: what is written is there after a restart; what can't be opened says why."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pytest

import coordinator.database
import coordinator.journal
from coordinator.admission import Enrolment, Pin, Token
from coordinator.journal import Journal
from protocol.errors import ConfigInvalid, StorageFull
from protocol.ids import WorkerId
from protocol.messages import Role

PIN = Pin(worker=WorkerId("pi"), public_key=b"p" * 40, role=Role.WORKER, pinned_at_s=7.5)
TOKEN = Token(public_key=b"t" * 40, trusted=True, expires_at_s=99.0)
SPENT = Token(public_key=b"t" * 40, trusted=True, expires_at_s=99.0, spent_by=b"p" * 40)


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "state" / "journal.db"
    journal = Journal.open(path)
    assert journal.begin_term("home") == ("home", 1)
    journal.add_token(TOKEN)
    journal.put_client("local", b"d" * 40)
    journal.put_client("local", b"c" * 40)
    journal.record(Enrolment(pin=PIN, token=SPENT, is_repeat=False))
    assert (journal.seats(), journal.port()) == ((), 0)
    for seats in ([WorkerId("pi"), WorkerId("desk"), WorkerId("pad")], [WorkerId("pad"), None, WorkerId("pi")]):
        journal.put_seats(seats)
    for port in (7411, 40_001):
        journal.put_port(port)
    journal.close()
    again = Journal.open(path)
    assert again.begin_term("another name") == ("home", 2)
    assert again.pins() == [PIN]
    assert again.tokens() == [SPENT]
    assert again.clients() == [b"c" * 40]
    assert (again.seats(), again.port()) == (("pad", None, "pi"), 40_001)
    again.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_pin_changes_role_and_is_revoked_under_the_same_key(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal.db")
    journal.put_pin(PIN)
    changed = Pin(worker=PIN.worker, public_key=PIN.public_key, role=Role.HEAD, pinned_at_s=7.5, revoked=True)
    journal.put_pin(changed)
    assert journal.pins() == [changed]
    journal.close()


def test_old_invitations_are_forgotten(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal.db")
    journal.add_token(TOKEN)
    assert journal.forget_tokens(before_s=99.0) == 0
    assert journal.forget_tokens(before_s=99.1) == 1
    assert journal.tokens() == []
    journal.close()


def test_enrolment_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal.db")
    journal.add_token(TOKEN)
    journal.put_pin(PIN)
    same_name = Pin(worker=PIN.worker, public_key=b"q" * 40, role=Role.WORKER, pinned_at_s=8.0)
    with pytest.raises(ConfigInvalid, match="UNIQUE"):
        journal.record(Enrolment(pin=same_name, token=SPENT, is_repeat=False))
    assert journal.tokens() == [TOKEN]
    assert journal.pins() == [PIN]
    journal.close()


def test_a_second_coordinator_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator.database, "LOCK_TIMEOUT_S", 0.01)
    journal = Journal.open(tmp_path / "journal.db")
    with pytest.raises(ConfigInvalid, match="in use by another coordinator"):
        Journal.open(tmp_path / "journal.db")
    journal.close()


def test_a_file_of_the_first_schema_is_brought_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as past:
        past.setattr(coordinator.journal, "MIGRATIONS", coordinator.journal.MIGRATIONS[:1])
        journal = Journal.open(tmp_path / "journal.db")
        journal.put_pin(PIN)
        journal.close()
    journal = Journal.open(tmp_path / "journal.db")
    journal.put_port(7411)
    assert (journal.pins(), journal.port()) == ([PIN], 7411)
    journal.close()


def test_a_newer_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(ConfigInvalid, match=r"newer manyhands .schema 99; this release knows 2"):
        Journal.open(path)


def test_a_migration_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.db"
    journal = Journal.open(path)
    journal.put_pin(PIN)
    journal.close()
    longer = (*coordinator.journal.MIGRATIONS, "CREATE TABLE extra (x INTEGER); INSERT INTO extra VALUES (1);")
    monkeypatch.setattr(coordinator.journal, "MIGRATIONS", longer)
    for _ in range(2):
        journal = Journal.open(path)
        assert journal.pins() == [PIN]
        journal.close()
    db = sqlite3.connect(path)
    assert db.execute("SELECT count(*) FROM extra").fetchone() == (1,)
    db.close()


@pytest.mark.parametrize("damage", [b"this is no database, it only looks like a file" * 30, None])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "journal.db"
    if damage is None:  # a row that no release writes
        journal = Journal.open(path)
        journal.put_pin(PIN)
        journal.close()
        db = sqlite3.connect(path)
        db.execute("UPDATE pins SET role = 'king'")
        db.commit()
        db.close()
        journal = Journal.open(path)
        with pytest.raises(ConfigInvalid, match=r"journal\.db is damaged"):
            journal.pins()
        journal.close()
    else:
        path.write_bytes(damage)
        with pytest.raises(ConfigInvalid, match=r"journal\.db is damaged") as caught:
            Journal.open(path)
        assert "--state-dir" in caught.value.remedy


def test_a_folder_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigInvalid, match="can't be created"):
        Journal.open(tmp_path / "file" / "journal.db")


def test_a_full_disk_is_storage_full(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal.db")
    journal._database._db.execute("PRAGMA max_page_count = 8")
    with pytest.raises(StorageFull, match="full"):
        for number in range(10_000):
            journal.add_token(Token(public_key=b"%040d" % number, trusted=False, expires_at_s=1.0))
    journal.close()

"""The token log: what was written is there after a restart; what can't be written harms its own session only."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pytest

from coordinator.events import token_bytes
from coordinator.token_log import RESERVE_BYTES, Begun, Ended, Entry, Forgotten, Grown, Record, TokenLog
from protocol.batches import Sampling
from protocol.errors import ConfigInvalid, PeerLost, StorageFull
from protocol.ids import RequestId, SessionId
from protocol.messages import ErrorReport, Finished, FinishReason, Generate, Leg, PromptKind, Timings, Usage

MODEL, DIGEST = b"m" * 32, b"d" * 32
LEG = Leg(epoch=7, start=0, words="1/1", stages=("layers 0 to 1: pi",), repeated=3, cause="pad left")


def order(session: int) -> Generate:
    sampling = Sampling(temperature=0.5, seed=2**62)
    return Generate(
        request=RequestId(f"r{session}"), prompt_kind=PromptKind.TEXT, max_tokens=9, sampling=sampling, stop=("a", "b")
    )


def begun(session: int, num_prompt: int = 3) -> Begun:
    prompt = token_bytes(range(num_prompt))
    return Begun(session=SessionId(session), order=order(session), digest=DIGEST, prompt=prompt)


def grown(session: int, start: int, *tokens: int) -> Grown:
    return Grown(session=SessionId(session), start=start, tokens=tokens)


def finished(session: int) -> Finished:
    return Finished(
        request=RequestId(f"r{session}"), reason=FinishReason.LENGTH, legs=(LEG,),
        usage=Usage(prompt_tokens=3, completion_tokens=2),
        timings=Timings(queued_s=0.0, first_token_s=0.1, total_s=2.5),
    )  # fmt: skip


def ended(session: int) -> Ended:
    return Ended(session=SessionId(session), outcome=finished(session))


def reopened(log: TokenLog, path: Path) -> TokenLog:
    log.close()
    return TokenLog.open(path, MODEL)


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "tokens.db"
    log = TokenLog.open(path, MODEL)
    error = ErrorReport.of(PeerLost("pi left", node="pi"), request="r3")
    assert log.write([begun(1), begun(2), begun(3)], 100.0) == []
    assert log.write([grown(1, 0, 7), grown(2, 0, 2**31 - 1, 0)], 101.0) == []
    assert log.write([grown(1, 1, 8, 9), ended(2), Ended(session=SessionId(3), outcome=error)], 102.0) == []
    log = reopened(log, path)
    one, two, three = log.entries()
    assert one == Entry(
        session=SessionId(1), order=order(1), digest=DIGEST, model=MODEL, prompt=one.prompt, num_prompt=3,
        answer=one.answer, arrived_s=100.0, ended_s=None, outcome=None,
    )  # fmt: skip
    assert (list(one.prompt), list(one.answer)) == ([0, 1, 2], [7, 8, 9])
    assert (list(two.prompt), list(two.answer), two.num_prompt) == ([], [2**31 - 1, 0], 3)
    assert (two.outcome, two.ended_s) == (finished(2), 102.0)
    assert (three.outcome, list(three.answer)) == (error, [])
    assert log.write([Forgotten(session=SessionId(2)), grown(1, 3, 1)], 103.0) == []
    log = reopened(log, path)
    assert [(entry.session, list(entry.answer)) for entry in log.entries()] == [(1, [7, 8, 9, 1]), (3, [])]
    log.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_forgotten_session_leaves_nothing_behind(tmp_path: Path) -> None:
    log = TokenLog.open(tmp_path / "tokens.db", MODEL)
    log.write([begun(1), grown(1, 0, 5), ended(1)], 0.0)
    log.write([Forgotten(session=SessionId(1))], 1.0)
    assert log._database.rows("SELECT count(*) FROM tokens") == [(0,)]
    assert log.entries() == []
    log.close()


def test_the_file_does_not_grow_with_what_was_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "tokens.db"
    log = TokenLog.open(path, MODEL)
    sizes = []
    for session in range(1, 41):
        log.write([begun(session, 5000)], 0.0)
        log.write([grown(session, start, 1) for start in range(500)], 0.0)
        log.write([ended(session), Forgotten(session=SessionId(session))], 0.0)
        log._database.make_room()
        sizes.append(path.stat().st_size)
    log.close()
    assert max(sizes) <= sizes[1]


def fill(log: TokenLog, first: int) -> int:
    """Begin sessions until there is no room for one more; returns its number."""
    for session in range(first, first + 1000):
        if failed := log.write([begun(session, 2000)], 0.0):
            [one] = failed
            assert one.session == session
            assert isinstance(one.error, StorageFull) and "tokens.db" in one.error.message
            return session
    raise AssertionError("there is room without end")


@pytest.fixture
def small(tmp_path: Path) -> TokenLog:
    log = TokenLog.open(tmp_path / "tokens.db", MODEL, reserve_bytes=0)
    log._database._db.execute("PRAGMA max_page_count = 40")
    return log


def test_without_room_what_has_ended_makes_place(small: TokenLog) -> None:
    small.write([begun(1), grown(1, 0, *range(4000)), ended(1), begun(2)], 0.0)
    last = fill(small, 3)
    assert [entry.session for entry in small.entries()] == list(range(2, last))
    small.close()


def test_without_room_those_that_fit_are_written(small: TokenLog) -> None:
    last = fill(small, 1)
    large, fits = begun(last, 2000), grown(1, 0, 5)
    failed = small.write([large, fits, grown(last, 0, 5)], 1.0)
    assert [one.session for one in failed] == [last]
    assert [list(entry.answer) for entry in small.entries()] == [[5]] + [[]] * (last - 2)
    small.close()


def test_a_session_that_could_not_grow_is_taken_out_when_there_is_room(small: TokenLog) -> None:
    last = fill(small, 1)
    failed = small.write([grown(2, 0, *range(4000))], 1.0)
    assert [one.session for one in failed] == [2]
    assert small.write([grown(1, 0, 5)], 2.0) == []
    assert [entry.session for entry in small.entries()] == [1, *range(3, last)]
    small.close()


def test_requests_under_way_go_on_in_the_reserve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, reserve = tmp_path / "tokens.db", RESERVE_BYTES
    for _ in range(2):  # a second start takes the room of the first
        log = TokenLog.open(path, MODEL, reserve)
        size, size_of_wal = path.stat().st_size, path.with_name("tokens.db-wal").stat().st_size
        assert reserve < size < 1.1 * reserve and size_of_wal > reserve
        log.close()
    log = TokenLog.open(path, MODEL, reserve)
    log._database._db.execute(f"PRAGMA max_page_count = {size // 4096}")
    log.write([begun(1), begun(2)], 0.0)
    assert [log.write([grown(1, step, 5), grown(2, step, 6)], 0.0) for step in range(3000)] == [[]] * 3000
    assert (path.stat().st_size, path.with_name("tokens.db-wal").stat().st_size) == (size, size_of_wal)
    log.close()
    assert not caplog.records


def damaged(path: Path, statement: str, *values: object) -> TokenLog:
    log = TokenLog.open(path, MODEL)
    log.write([begun(1), grown(1, 0, 5), ended(1), begun(2), grown(2, 0, 5), grown(2, 1, 6)], 0.0)
    log.close()
    db = sqlite3.connect(path)
    db.execute(statement, values)
    db.commit()
    db.close()
    return TokenLog.open(path, MODEL)


@pytest.mark.parametrize(
    ("statement", "values", "told"),
    [
        ("DELETE FROM tokens WHERE start = 0", (), "session 2 has no token 0"),
        ("UPDATE sessions SET header = x'c1'", (), "can't be unpacked"),
        ("UPDATE sessions SET outcome = header WHERE id = 1", (), "frames"),
        ("UPDATE sessions SET prompt = x'010203'", (), "multiple"),
    ],
)
def test_a_damaged_log_is_named(tmp_path: Path, statement: str, values: tuple[object, ...], told: str) -> None:
    log = damaged(tmp_path / "tokens.db", statement, *values)
    with pytest.raises(ConfigInvalid, match=rf"tokens\.db is damaged: .*{told}") as caught:
        log.entries()
    assert "requests under way are then lost" in caught.value.remedy
    log.close()


def test_an_empty_write_touches_nothing(tmp_path: Path) -> None:
    log = TokenLog.open(tmp_path / "tokens.db", MODEL)
    records: list[Record] = []
    assert log.write(records, 0.0) == []
    log.close()

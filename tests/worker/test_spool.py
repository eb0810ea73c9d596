"""The spool: rows come back as they went in, room is bounded and used again, and a full disk costs one session."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.ids import SessionId
from worker import page_file
from worker.spool import PAGE_ROWS, Cell, Spool

ROW = 6
PAGE_BYTES = 2 * PAGE_ROWS * ROW
ONE, TWO = SessionId(1), SessionId(2)
CELL = Cell(3, 1)


def rows(seed: int, count: int) -> bytes:
    return bytes((seed * 31 + number) % 251 for number in range(count * ROW))


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    one = Spool(tmp_path / "spool", 100 * PAGE_BYTES)
    one.shape(ROW)
    return one


def test_rows_come_back_across_pages(spool: Spool) -> None:
    keys, values = rows(1, 200), rows(2, 200)
    for start, end in ((0, 1), (1, 64), (64, 65), (65, 200)):
        assert spool.write(ONE, CELL, start, keys[start * ROW : end * ROW], values[start * ROW : end * ROW])
    assert spool.length(ONE, CELL) == 200
    for start, count in ((0, 200), (63, 2), (64, 64), (199, 1)):
        found = spool.read(ONE, CELL, start, count)
        assert found == (keys[start * ROW :][: count * ROW], values[start * ROW :][: count * ROW])
    assert spool.read(ONE, CELL, 150, 51) is None
    assert spool.read(TWO, CELL, 0, 1) is None
    spool.close()


def test_rows_behind_a_gap_are_not_taken_and_rows_said_again_are(spool: Spool) -> None:
    assert not spool.write(ONE, CELL, 1, rows(1, 1), rows(2, 1))
    assert not spool.sessions
    assert spool.write(ONE, CELL, 0, rows(1, 5), rows(2, 5))
    assert not spool.write(ONE, CELL, 6, rows(1, 1), rows(2, 1))
    assert spool.write(ONE, CELL, 2, rows(7, 1), rows(8, 1))
    assert spool.length(ONE, CELL) == 5
    assert spool.read(ONE, CELL, 2, 1) == (rows(7, 1), rows(8, 1))


def test_the_file_has_no_name_and_goes_when_it_is_closed(spool: Spool, tmp_path: Path) -> None:
    assert not (tmp_path / "spool").exists()
    before = psutil.Process().num_fds()
    spool.write(ONE, CELL, 0, rows(1, 5), rows(2, 5))
    assert list((tmp_path / "spool").iterdir()) == []
    spool.close()
    assert spool.length(ONE, CELL) == 0
    assert psutil.Process().num_fds() == before


def test_room_is_bounded_and_a_session_too_many_is_not_kept(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 2 * PAGE_BYTES)
    spool.shape(ROW)
    assert spool.write(ONE, CELL, 0, rows(1, 60), rows(2, 60))
    assert not spool.write(TWO, CELL, 0, rows(3, 100), rows(4, 100))
    assert spool.sessions == {ONE}
    assert spool.write(TWO, CELL, 0, rows(3, 64), rows(4, 64))
    assert spool.num_bytes == 2 * PAGE_BYTES
    spool.forget(ONE)
    assert spool.write(TWO, CELL, 64, rows(5, 64), rows(6, 64)) and spool.num_bytes == 2 * PAGE_BYTES
    assert spool.read(TWO, CELL, 0, 128) == (rows(3, 64) + rows(5, 64), rows(4, 64) + rows(6, 64))
    spool.keep_only(())
    assert spool.num_bytes == 0


def test_a_full_disk_costs_one_session(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    spool.write(ONE, CELL, 0, rows(1, 5), rows(2, 5))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(page_file, "write_at", full)
        assert not spool.write(TWO, CELL, 0, rows(3, 5), rows(4, 5))
    assert spool.sessions == {ONE}
    assert spool.read(ONE, CELL, 0, 5) == (rows(1, 5), rows(2, 5))


def test_a_folder_that_is_none_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    spool = Spool(tmp_path / "file" / "spool", 100 * PAGE_BYTES)
    spool.shape(ROW)
    assert not spool.write(ONE, CELL, 0, rows(1, 5), rows(2, 5))
    assert not spool.sessions


def test_rows_of_another_size_are_forgotten(spool: Spool) -> None:
    spool.write(ONE, CELL, 0, rows(1, 5), rows(2, 5))
    spool.shape(ROW)
    assert spool.sessions
    spool.shape(2 * ROW)
    assert not spool.sessions


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(0, 150), st.integers(1, 90), st.integers(0, 9)),
        max_size=25,
    )
)
def test_any_order_of_writes_keeps_what_was_said_last(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[int, int, int, int, int]]
) -> None:
    spool = Spool(tmp_path_factory.mktemp("spool"), 30 * PAGE_BYTES)
    spool.shape(ROW)
    truth: dict[tuple[int, int], bytes] = {}
    for seed, (session, group, start, count, kind) in enumerate(events):
        key = (session, group)
        if kind == 0:
            spool.forget(SessionId(session))
            truth = {found: data for found, data in truth.items() if found[0] != session}
            continue
        data = rows(seed, count)
        known = truth.get(key, b"")
        if spool.write(SessionId(session), Cell(0, group), start, data, data[::-1]):
            assert start * ROW <= len(known)
            truth[key] = known[: start * ROW] + data + known[(start + count) * ROW :]
        elif start * ROW <= len(known):  # no room: the session is gone as a whole
            truth = {found: data for found, data in truth.items() if found[0] != session}
        for (other, other_group), expected in truth.items():
            found = spool.read(SessionId(other), Cell(0, other_group), 0, len(expected) // ROW)
            assert found is not None and found[0] == expected
    pages = sum(-(-len(data) // (PAGE_ROWS * ROW)) for data in truth.values())
    assert pages * PAGE_BYTES <= spool.num_bytes <= 30 * PAGE_BYTES
    spool.close()

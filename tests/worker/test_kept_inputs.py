"""Inputs of later stages: they come back as they went in, give way to keys and values, and are never wrong."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_cluster import SPEC, plan_of

from protocol.ids import SessionId
from protocol.specs import ActivationFormat, Span
from worker import page_file
from worker.spool import PAGE_ROWS, Cell, Spool

ROW = SPEC.hidden * 4
KV_ROW = 6
PAGE_BYTES = 2 * PAGE_ROWS * KV_ROW  # 768: six rows, which need not end where a page does
ONE, TWO = SessionId(1), SessionId(2)
PLAN = plan_of([(Span(0, SPEC.layers), [("a", Span(0, 2), Span(0, 3))], 0)], head="a")


def rows(seed: int, count: int, row_bytes: int = ROW) -> bytes:
    return bytes((seed * 31 + number) % 251 for number in range(count * row_bytes))


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return spool_of(tmp_path, 20)


def spool_of(folder: Path, num_pages: int) -> Spool:
    one = Spool(folder / "spool", num_pages * PAGE_BYTES)
    one.shape(KV_ROW)
    one.inputs.turn_to(PLAN)
    return one


def test_rows_come_back_across_pages(spool: Spool) -> None:
    data = rows(1, 40)
    for start, end in ((0, 1), (1, 7), (7, 40)):
        spool.inputs.keep(ONE, 2, start, data[start * ROW : end * ROW])
    assert spool.inputs.lengths(ONE) == {2: 40}
    for start, count in ((0, 40), (5, 2), (39, 1)):
        assert spool.inputs.read(ONE, 2, start, count) == data[start * ROW :][: count * ROW]
    assert spool.inputs.read(ONE, 2, 30, 11) is None
    assert spool.inputs.read(ONE, 3, 0, 1) is None
    assert spool.inputs.read(TWO, 2, 0, 1) is None
    spool.close()


def test_rows_behind_a_gap_are_not_kept_and_rows_said_again_are(spool: Spool) -> None:
    spool.inputs.keep(ONE, 2, 1, rows(1, 1))
    assert not spool.inputs.sessions
    spool.inputs.keep(ONE, 2, 0, rows(1, 5))
    spool.inputs.keep(ONE, 2, 6, rows(1, 1))
    spool.inputs.keep(ONE, 2, 2, rows(7, 1))
    assert spool.inputs.lengths(ONE) == {2: 5}
    assert spool.inputs.read(ONE, 2, 2, 1) == rows(7, 1)


def test_what_is_truncated_goes_on_where_it_was_cut(spool: Spool) -> None:
    spool.inputs.keep(ONE, 2, 0, rows(1, 5))
    spool.inputs.truncate(ONE, 3)
    assert spool.inputs.lengths(ONE) == {2: 3}
    spool.inputs.keep(ONE, 2, 4, rows(1, 1))
    assert spool.inputs.lengths(ONE) == {2: 3}


def test_they_give_way_to_keys_and_values(tmp_path: Path) -> None:
    spool = spool_of(tmp_path, 4)
    spool.inputs.keep(ONE, 2, 0, rows(1, 12))
    assert spool.write(TWO, Cell(0, 0), 0, rows(3, 128, KV_ROW), rows(4, 128, KV_ROW))
    assert spool.inputs.lengths(ONE) == {2: 12}
    assert spool.write(TWO, Cell(0, 0), 128, rows(3, 64, KV_ROW), rows(4, 64, KV_ROW))
    assert not spool.inputs.sessions
    assert spool.read(TWO, Cell(0, 0), 128, 64) == (rows(3, 64, KV_ROW), rows(4, 64, KV_ROW))
    assert spool.num_bytes <= 4 * PAGE_BYTES


def test_what_has_no_room_is_not_kept_and_the_others_are(tmp_path: Path) -> None:
    spool = spool_of(tmp_path, 3)
    spool.inputs.keep(ONE, 2, 0, rows(1, 12))
    spool.inputs.keep(TWO, 2, 0, rows(2, 13))
    assert spool.inputs.sessions == {ONE}
    assert spool.inputs.read(ONE, 2, 0, 12) == rows(1, 12)
    spool.inputs.keep(TWO, 2, 0, rows(2, 6))
    assert spool.inputs.read(TWO, 2, 0, 6) == rows(2, 6)
    spool.inputs.forget(ONE)
    spool.inputs.keep_only(())
    assert spool.num_bytes == 0


def test_a_full_disk_costs_no_more_than_what_was_to_be_kept(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    spool.inputs.keep(ONE, 2, 0, rows(1, 5))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(page_file, "write_at", full)
        spool.inputs.keep(TWO, 2, 0, rows(2, 5))
    assert spool.inputs.sessions == {ONE}


def test_rows_of_another_model_or_wire_are_forgotten(spool: Spool) -> None:
    spool.inputs.keep(ONE, 2, 0, rows(1, 5))
    spool.inputs.turn_to(dataclasses.replace(PLAN, epoch=2))
    assert spool.inputs.sessions
    spool.inputs.turn_to(dataclasses.replace(PLAN, wire=ActivationFormat.BFLOAT16))
    assert not spool.inputs.sessions
    assert spool.num_bytes == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(0, 30), st.integers(1, 20), st.integers(0, 9)),
        max_size=25,
    )
)
def test_any_order_of_events_gives_back_what_was_said_last_or_nothing(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[int, int, int, int, int]]
) -> None:
    spool = spool_of(tmp_path_factory.mktemp("spool"), 9)
    truth: dict[tuple[int, int], bytes] = {}
    for seed, (session, layer, start, count, kind) in enumerate(events):
        if kind == 0:
            spool.inputs.forget(SessionId(session))
        elif kind == 1:
            spool.inputs.truncate(SessionId(session), start)
        elif kind == 2:
            spool.write(SessionId(session), Cell(0, 0), 0, rows(1, 64, KV_ROW), rows(2, 64, KV_ROW))
        else:
            known = truth.get((session, layer), b"")
            if start * ROW <= len(known):
                truth[session, layer] = known[: start * ROW] + rows(seed, count) + known[(start + count) * ROW :]
            spool.inputs.keep(SessionId(session), layer, start, rows(seed, count))
        for (one, of), data in list(truth.items()):
            length = spool.inputs.lengths(SessionId(one)).get(of, 0)
            truth[one, of] = data[: length * ROW]
            assert length * ROW <= len(data)
            assert not length or spool.inputs.read(SessionId(one), of, 0, length) == data[: length * ROW]
    assert spool.num_bytes <= 9 * PAGE_BYTES
    spool.close()

"""Keys and values on their way: pieces of bounded size, patience that ends, copies that lag and catch up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_cluster import SPEC, TinyCluster, plan_of

from protocol.batches import SessionRows
from protocol.errors import FrameMalformed
from protocol.frames import Buffer
from protocol.ids import SessionId, WorkerId
from protocol.messages import Carry, Cells, KvMove, KvRows
from protocol.plans import Plan
from protocol.specs import Span
from runtime.kv import KvCache
from runtime.shares import NO_SHARE
from worker import kv_travel
from worker.commands import Failed, KvOrders
from worker.handover import SILENCE_S, Handover
from worker.kv_shelf import KvShelf
from worker.kv_travel import pieces, row_bytes, split_rows
from worker.mirrors import MOST_LENT, Mirrors
from worker.spool import Cell, Spool

ALL, GROUPS = Span(0, SPEC.layers), Span(0, SPEC.kv_heads)
A, B, ONE = WorkerId("a"), WorkerId("b"), SessionId(1)
EVERYTHING = Cells(layers=ALL, groups=GROUPS)
CARRY = Carry(session=ONE, at=0, capacity=64, computed=50)


def alone(epoch: int = 1) -> Plan:
    return plan_of([(ALL, [("a", GROUPS, Span(0, SPEC.ffn_tiles))], 0)], head="a", epoch=epoch)


class Loan:
    def __init__(self) -> None:
        self.done = False


class FakeLender:
    """Takes what it has room for."""

    def __init__(self, room: int = 10**6) -> None:
        self.room = room
        self.sent: list[tuple[WorkerId, KvRows, bytes]] = []
        self.loans: list[Loan] = []

    def offer(self, target: WorkerId, message: object, payload: Buffer) -> Loan | None:
        if len(self.sent) >= self.room:
            return None
        assert isinstance(message, KvRows)
        self.sent.append((target, message, bytes(payload)))
        self.loans.append(Loan())
        return self.loans[-1]

    def settle(self) -> None:
        for loan in self.loans:
            loan.done = True


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[KvShelf]:
    one = KvShelf(Spool(tmp_path, 2**24))
    yield one
    one.close()


def arena_of(length: int, seed: int = 0) -> KvCache:
    arena = KvCache(SPEC, layers=ALL, groups=GROUPS, positions=128, device=torch.device("cpu"))
    torch.manual_seed(seed)
    arena.keys_LGPd.normal_()
    arena.values_LGPd.normal_()
    arena.restore(ONE, at=0, capacity=64, lengths=[length] * SPEC.layers)
    return arena


def step(arena: KvCache, start: int) -> None:
    rows = (SessionRows(session=ONE, start=start, count=1, capacity=64),)
    arena.begin(rows)
    arena.commit(rows)


def rows_of(arena: KvCache, cell: Cell, length: int) -> tuple[bytes, bytes]:
    keys, values = arena.rows(cell.layer, cell.group, 0, length)
    return keys.numpy().tobytes(), values.numpy().tobytes()


def test_pieces_are_bounded_and_without_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    each = 2 * SPEC.layers * SPEC.kv_heads * row_bytes(SPEC)
    monkeypatch.setattr(kv_travel, "MOST_BYTES", 3 * each + 1)
    assert list(pieces(SPEC, EVERYTHING, 2, 9)) == [Span(2, 5), Span(5, 8), Span(8, 9)]
    monkeypatch.setattr(kv_travel, "MOST_BYTES", 1)
    assert list(pieces(SPEC, EVERYTHING, 0, 2)) == [Span(0, 1), Span(1, 2)]


def test_what_is_given_arrives(tmp_path: Path, shelf: KvShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_travel, "MOST_BYTES", 500)
    arena = shelf.arena = arena_of(50)
    lender = FakeLender()
    give = KvOrders(carries=(CARRY,), gives=(KvMove(peer=B, cells=EVERYTHING),))
    handover = Handover(alone(), give, shelf, lender, lambda: 0.0)
    while not handover.is_over:
        handover.advance()
        assert sum(not loan.done for loan in lender.loans) <= 4
        lender.settle()
    assert max(len(payload) for _, _, payload in lender.sent) <= 500
    other = KvShelf(Spool(tmp_path, 2**24))
    other.turn_to(alone(), NO_SHARE, 128, (CARRY,))
    take = KvOrders(carries=(CARRY,), takes=(KvMove(peer=A, cells=EVERYTHING),))
    taking = Handover(alone(), take, other, lender, lambda: 0.0)
    for target, message, payload in lender.sent:
        assert target == B and not taking.is_over
        assert taking.took(A, message, memoryview(payload))
    assert taking.is_over
    for layer in ALL:
        for group in GROUPS:
            cell = Cell(layer, group)
            assert other.length(ONE, cell) == 50
            assert other.read(ONE, cell, 0, 50) == rows_of(arena, cell, 50)
    other.close()


def test_patience_ends_and_progress_extends_it(shelf: KvShelf) -> None:
    shelf.arena = arena_of(50)
    now, lender = 0.0, FakeLender(room=1)
    orders = KvOrders(
        carries=(CARRY,), gives=(KvMove(peer=B, cells=EVERYTHING),), takes=(KvMove(peer=B, cells=EVERYTHING),)
    )
    handover = Handover(alone(), orders, shelf, lender, lambda: now)
    handover.advance()
    now = SILENCE_S - 1
    cells = Cells(layers=Span(0, 1), groups=Span(0, 1))
    empty = KvRows(epoch=1, session=SessionId(9), cells=cells, start=0, count=1)
    handover.took(B, empty, memoryview(b""))  # a session that is over: no progress is made with it, but B lives
    handover.advance()
    assert not handover.is_over
    now = SILENCE_S
    handover.advance()  # gives up to give
    assert not handover.is_over
    now = 2 * SILENCE_S
    handover.advance()
    assert handover.is_over


def test_a_peer_that_is_gone_is_not_waited_for(shelf: KvShelf) -> None:
    take = KvOrders(carries=(CARRY,), takes=(KvMove(peer=B, cells=EVERYTHING),))
    handover = Handover(alone(), take, shelf, FakeLender(), lambda: 0.0)
    handover.lost(B)
    assert handover.is_over


@pytest.mark.parametrize(
    ("cells", "count", "num_bytes"),
    [
        (Cells(layers=Span(0, 5), groups=GROUPS), 1, 0),
        (Cells(layers=ALL, groups=Span(1, 3)), 1, 0),
        (Cells(layers=Span(0, 1), groups=Span(0, 1)), 2, 2 * SPEC.head_dim * 4),
        (Cells(layers=Span(0, 1), groups=Span(0, 1)), SPEC.max_positions + 1, 0),
    ],
)
def test_rows_that_do_not_fit_name_their_sender(cells: Cells, count: int, num_bytes: int) -> None:
    message = KvRows(epoch=1, session=ONE, cells=cells, start=0, count=count)
    with pytest.raises(FrameMalformed, match="b sent") as caught:
        list(split_rows(SPEC, B, message, memoryview(bytes(num_bytes))))
    assert caught.value.node == B


def test_a_copy_lags_behind_a_slow_link_and_catches_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_travel, "MOST_BYTES", 2 * SPEC.layers * row_bytes(SPEC) * 4)
    arena, lender = arena_of(50), FakeLender()
    cells = Cells(layers=ALL, groups=Span(1, 2))
    mirrors = Mirrors(1, (KvMove(peer=B, cells=cells),), arena, lender)
    mirrors.push()
    assert len(lender.sent) == MOST_LENT
    mirrors.push()
    assert len(lender.sent) == MOST_LENT
    for _ in range(20):
        lender.settle()
        mirrors.push()
    shelf = KvShelf(Spool(tmp_path, 2**24))
    shelf.turn_to(alone(), NO_SHARE, 128, ())
    for _, message, payload in lender.sent:
        for rows in split_rows(SPEC, A, message, memoryview(payload)):
            assert shelf.take(ONE, rows.cell, message.start, rows.keys, rows.values)
    for layer in ALL:
        assert shelf.length(ONE, Cell(layer, 0)) == 0
        assert shelf.read(ONE, Cell(layer, 1), 0, 50) == rows_of(arena, Cell(layer, 1), 50)
    done = len(lender.sent)
    step(arena, 50)
    mirrors.push()
    assert [(message.start, message.count) for _, message, _ in lender.sent[done:]] == [(50, 1)]
    mirrors.lost(B)
    step(arena, 51)
    mirrors.push()
    assert len(lender.sent) == done + 1
    shelf.close()


def test_who_was_linked_for_keys_and_values_alone_may_go(tmp_path: Path) -> None:
    """A leaver gives what it has and ends; nobody takes that for a loss."""
    cluster = TinyCluster(tmp_path)
    try:
        cluster.add("a")
        cluster.add("b")
        before = plan_of([(ALL, [("b", GROUPS, Span(0, SPEC.ffn_tiles))], 0)], head="a")
        cluster.form(before)
        log = cluster.go_on(before, [3, 14, 15], 4, capacity=40)
        carry = Carry(session=ONE, at=0, capacity=40, computed=len(log) - 1)
        orders = {
            A: KvOrders(carries=(carry,), takes=(KvMove(peer=B, cells=EVERYTHING),)),
            B: KvOrders(carries=(carry,), gives=(KvMove(peer=A, cells=EVERYTHING),)),
        }
        cluster.form(alone(2), kv=orders)
        ready = cluster.ready("a", 2)
        assert ready is not None and [one.positions for one in ready.held] == [len(log) - 1]
        cluster.remove("b")
        more = cluster.go_on(alone(2), log, 4, capacity=40, computed=len(log) - 1)
        cluster.pump(lambda: not cluster.hands["a"].links._peers)
        assert cluster.go_on(alone(2), more, 2, capacity=40, computed=len(more) - 1)
        assert not any(isinstance(report, Failed) for report in cluster.hands["a"].reports)
    finally:
        cluster.close()

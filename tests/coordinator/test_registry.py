"""Members, their leases and their order."""

from __future__ import annotations

from core_cases import heartbeat, joined

from coordinator.registry import Registry
from protocol.ids import WorkerId

A, B = WorkerId("a"), WorkerId("b")


def test_order_is_that_of_first_joining_and_survives_a_return() -> None:
    registry = Registry(3.0)
    for name in ("a", "b", "c"):
        registry.join(joined(name), 0.0)
    registry.leave(A)
    assert [member.worker for member in registry] == ["b", "c"]
    registry.join(joined("a"), 1.0)
    assert [member.worker for member in registry] == ["a", "b", "c"]


def test_a_return_under_the_same_name_is_another_incarnation() -> None:
    registry = Registry(3.0)
    first = registry.join(joined("a"), 0.0)
    second = registry.join(joined("a", budget_bytes=5), 1.0)
    assert len(registry) == 1
    assert registry.get(A) is second
    assert first.incarnation < second.incarnation
    assert second.peer.addresses == ("tcp://a:1",)


def test_the_head_is_the_trusted_worker_that_came_first() -> None:
    registry = Registry(3.0)
    assert registry.head is None
    for name in ("a", "head-1", "head-2"):
        registry.join(joined(name), 0.0)
    assert registry.head is registry.get(WorkerId("head-1"))


def test_any_message_renews_the_lease_and_silence_ends_it() -> None:
    registry = Registry(3.0)
    registry.join(joined("a"), 0.0)
    registry.join(joined("b"), 0.0)
    registry.heard(A, None, 2.0)
    assert [member.worker for member in registry.silent(2.9)] == []
    assert [member.worker for member in registry.silent(3.0)] == ["b"]
    registry.renew_all(4.0)
    assert registry.silent(6.9) == []


def test_a_stranger_is_not_heard() -> None:
    registry = Registry(3.0)
    assert registry.heard(A, None, 0.0) is None
    assert registry.leave(A) is None
    assert A not in registry


def test_progress_is_noted_when_the_counter_moves() -> None:
    registry = Registry(3.0)
    member = registry.join(joined("a"), 0.0)
    for now, progress, moved_at in ((1.0, 5, 1.0), (2.0, 5, 1.0), (3.0, 6, 3.0)):
        registry.heard(A, heartbeat("a", progress=progress).heartbeat, now)
        assert member.progress_at == moved_at
    registry.heard(A, None, 4.0)
    assert member.progress_at == 3.0


def test_the_revision_rises_when_somebody_comes_goes_or_can_be_used_otherwise() -> None:
    registry = Registry(3.0)
    paused = heartbeat("a", 1, paused="on battery").heartbeat
    changes = (
        lambda: registry.join(joined("a"), 0.0),
        lambda: registry.heard(A, paused, 1.0),
        lambda: registry.heard(A, heartbeat("a", 2).heartbeat, 1.0),
        lambda: registry.mark_leaving(A, own_wish=False),
        lambda: registry.mark_staying(registry.get(A)),
        lambda: registry.leave(A),
    )
    for change in changes:
        before = registry.revision
        change()
        assert registry.revision == before + 1
    registry.join(joined("a"), 2.0)
    before = registry.revision
    registry.heard(A, heartbeat("a", 3, progress=7).heartbeat, 3.0)
    registry.leave(WorkerId("x"))
    assert registry.mark_leaving(WorkerId("x"), own_wish=True) is None
    assert registry.revision == before


def test_who_was_head_last_stays_head_as_long_as_it_does_not_leave() -> None:
    registry = Registry(3.0)
    for name in ("head-1", "head-2"):
        registry.join(joined(name), 0.0)
    registry.was_head(WorkerId("head-2"))
    assert registry.head is registry.get(WorkerId("head-2"))
    registry.mark_leaving(WorkerId("head-2"), own_wish=True)
    assert registry.head is registry.get(WorkerId("head-1"))
    registry.leave(WorkerId("head-1"))
    assert registry.head is registry.get(WorkerId("head-2"))
    assert [member.worker for member in registry.leaving] == ["head-2"]

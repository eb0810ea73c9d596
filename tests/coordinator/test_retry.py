"""When the next plan may be tried."""

from __future__ import annotations

from coordinator.retry import PROOF_S, Retry
from protocol.ids import WorkerId

B, C = WorkerId("b"), WorkerId("c")


def test_pauses_double_up_to_the_most_until_a_step_succeeds() -> None:
    retry = Retry(1.0, 5.0)
    assert retry.is_due(0.0)
    assert [retry.after_error(10.0) for _ in range(4)] == [1.0, 2.0, 4.0, 5.0]
    assert not retry.is_due(14.9)
    assert retry.is_due(15.0)
    retry.succeeded()
    assert retry.after_error(20.0) == 1.0


def test_a_lost_worker_is_answered_at_once() -> None:
    retry = Retry(1.0, 5.0)
    retry.after_error(0.0)
    assert retry.at_once(0.5) == 0.0
    assert retry.is_due(0.5)


def test_a_neighbour_that_is_doubted_has_time_to_turn_out_dead_and_the_pause_ends_when_it_does() -> None:
    retry = Retry(1.0, 5.0)
    assert retry.after_broken_link(B, 10.0) == PROOF_S
    retry.lost(C, 10.1)
    assert not retry.is_due(10.1)
    retry.lost(B, 10.1)
    assert retry.is_due(10.1)


def test_links_that_break_again_and_again_pause_like_errors() -> None:
    retry = Retry(1.0, 5.0)
    assert [retry.after_broken_link(B, 0.0) for _ in range(4)] == [PROOF_S, 2.0, 4.0, 5.0]

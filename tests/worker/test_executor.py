"""Compute threads with real sockets: any split gives the tokens of one worker, and faults name their cause."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_cluster import SPEC, TinyCluster, plan_of

from protocol.batches import Sampling, SessionRows
from protocol.ids import SessionId
from protocol.plans import Plan
from protocol.specs import Span

ALL = Span(0, SPEC.layers)
GROUPS, FFN = Span(0, SPEC.kv_heads), Span(0, SPEC.ffn_tiles)
PROMPT = [3, 14, 15, 92, 65, 35, 8, 9]
ALONE = plan_of([(ALL, [("a", GROUPS, FFN)], 0)], head="a")
SPLITS = {
    "two equal-ish": plan_of(
        [(ALL, [("a", Span(0, 1), Span(0, 1)), ("b", Span(1, 2), Span(1, 3))], 0)], head="a"
    ),
    "hub is second": plan_of(
        [(ALL, [("a", Span(0, 1), Span(0, 1)), ("b", Span(1, 2), Span(1, 3))], 1)], head="a"
    ),
    "member without attention": plan_of(
        [(ALL, [("a", Span(0, 1), Span(0, 1)), ("b", Span(1, 2), Span(1, 2)), ("c", Span(2, 2), Span(2, 3))], 0)],
        head="a",
    ),
    "hub without attention": plan_of(
        [(ALL, [("a", Span(0, 2), Span(0, 1)), ("b", Span(2, 2), Span(1, 3))], 1)], head="a"
    ),
    "two stages": plan_of(
        [(Span(0, 1), [("a", GROUPS, FFN)], 0), (Span(1, 4), [("b", GROUPS, FFN)], 0)], head="a"
    ),
    "mixed, head is no member": plan_of(
        [
            (Span(0, 3), [("b", Span(0, 1), Span(0, 2)), ("c", Span(1, 2), Span(2, 3))], 0),
            (Span(3, 4), [("d", GROUPS, FFN)], 0),
        ],
        head="a",
    ),
}  # fmt: skip


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[TinyCluster]:
    one = TinyCluster(tmp_path)
    yield one
    one.close()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    one = TinyCluster(tmp_path_factory.mktemp("alone"))
    try:
        one.add("a")
        one.form(ALONE)
        return one.greedy(ALONE, PROMPT, 12)
    finally:
        one.close()


@pytest.mark.parametrize("words", SPLITS)
@pytest.mark.parametrize("is_direct", [True, False], ids=["direct", "relayed"])
def test_any_split_gives_the_same_tokens(
    cluster: TinyCluster, expected: list[int], words: str, is_direct: bool
) -> None:
    plan: Plan = SPLITS[words]
    for name in plan.workers:
        cluster.add(name)
    cluster.form(plan, lambda one, other: is_direct)
    assert cluster.greedy(plan, PROMPT, 12) == expected
    assert bool(cluster.relayed) is not is_direct


def test_the_log_is_computed_again_under_a_plan_that_ended_a_step(
    cluster: TinyCluster, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub waits for a part that never comes; the new plan ends that wait, and the log is computed again."""
    for name in "ab":
        cluster.add(name)
    both, alone = SPLITS["two equal-ish"], dataclasses.replace(ALONE, epoch=2)
    cluster.form(both)
    log = cluster.go_on(both, PROMPT, 5, capacity=40)
    withheld = threading.Event()
    post = cluster.hands["b"].executor._post
    monkeypatch.setattr(post, "doors", lambda: None)
    monkeypatch.setattr(post, "send", lambda *_: withheld.set())
    cluster.step(both, 9, [SessionRows(session=SessionId(1), start=len(log) - 1, count=1, capacity=40)], log[-1:])
    cluster.pump(withheld.is_set)
    cluster.form(alone)
    assert cluster.ready("a", 2).held == ()
    assert cluster.go_on(alone, log, 7, capacity=40) == PROMPT + expected


def test_a_head_that_is_new_learns_the_history(cluster: TinyCluster) -> None:
    """A token that a repetition penalty forbids must be known to a head that never computed it."""
    sampling = Sampling(repetition_penalty=100.0)
    cluster.add("a")
    cluster.form(ALONE)
    log = cluster.go_on(ALONE, PROMPT, 12, capacity=40, sampling=sampling)
    again = dataclasses.replace(ALONE, epoch=2)
    cluster.form(again)
    assert cluster.go_on(again, log[:-4], 4, capacity=40, sampling=sampling) == log

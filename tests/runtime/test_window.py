"""The window's policy alone: what is pinned, what is read when, and the paper's conditions against a simulation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import BudgetTooSmall, InvariantBroken
from runtime.window import BlockTimes, Window, WindowPlan, is_loose, is_tight, plan_window, retention_period

SIZES = [21, 100] * 16


def simulate(plan: WindowPlan, compute_s: list[float], read_s: list[float], steps: int) -> tuple[float, float]:
    """Run steps in virtual time; return (time, time stood waiting) of the last step."""
    window = Window(plan.streamed, plan.num_slots)
    now, reader_free_at, pending_until = 0.0, 0.0, None
    stalls = began = 0.0

    def pump(until: float) -> None:
        """Let the loader work until a moment of the computing thread."""
        nonlocal reader_free_at, pending_until
        while True:
            if pending_until is not None:
                if pending_until > until:
                    return
                window.read_done()
                reader_free_at, pending_until = pending_until, None
            order = window.next_read()
            if order is None:
                reader_free_at = max(reader_free_at, until)
                return
            pending_until = reader_free_at + read_s[order.block]

    for _ in range(steps):
        began, stalls = now, 0.0
        for block, cost in enumerate(compute_s):
            pump(now)
            if block in plan.pinned:
                now += cost
                continue
            window.seek(block)
            pump(now)
            while window.ready_slot() is None:
                assert pending_until is not None, "the loader is idle while the computing thread waits"
                stalls += max(0.0, pending_until - now)
                now = max(now, pending_until)
                pump(now)
            now += cost
            pump(now)
            window.release()
    return now - began, stalls


def test_all_is_pinned_when_it_fits() -> None:
    plan = plan_window(SIZES, sum(SIZES))
    assert plan.pinned == frozenset(range(32)) and not plan.streamed and not plan.ring_bytes


def test_too_small_says_how_much_is_needed() -> None:
    with pytest.raises(BudgetTooSmall, match="200 bytes; 199"):
        plan_window(SIZES, 199)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.floats(0.0, 1.2))
def test_plans_stay_inside_their_budget(sizes: list[int], fraction: float) -> None:
    budget = int(sum(sizes) * fraction)
    try:
        plan = plan_window(sizes, budget)
    except BudgetTooSmall:
        assert budget < 2 * max(sizes)
        return
    assert plan.pinned.isdisjoint(plan.streamed)
    assert plan.pinned | set(plan.streamed) == set(range(len(sizes)))
    assert sum(sizes[index] for index in plan.pinned) + plan.ring_bytes <= budget
    assert all(sizes[index] <= plan.slot_bytes for index in plan.streamed)


@pytest.mark.parametrize("percent", [25, 30, 40, 50, 60, 70, 80, 90])
def test_pinned_blocks_are_spread(percent: int) -> None:
    plan = plan_window(SIZES, sum(SIZES) * percent // 100)
    halves = [sum(SIZES[i] for i in plan.streamed if i in part) for part in (range(16), range(16, 32))]
    assert abs(halves[0] - halves[1]) <= 2 * 121  # at most about a layer and a half out of balance


@pytest.mark.parametrize("percent", [25, 40, 60, 80])
def test_disk_bound_steps_take_the_reading_time(percent: int) -> None:
    plan = plan_window(SIZES, sum(SIZES) * percent // 100)
    read_s = [size / 100 for size in SIZES]
    took, _ = simulate(plan, [0.01] * 32, read_s, steps=4)
    assert took <= 1.02 * sum(read_s[i] for i in plan.streamed) + 0.5


def test_compute_bound_steps_never_wait() -> None:
    plan = plan_window(SIZES, sum(SIZES) * 30 // 100)
    took, stalled = simulate(plan, [1.0] * 32, [0.5] * 32, steps=3)
    assert stalled == 0.0 and took == pytest.approx(32.0)


TIMES = {
    "both": BlockTimes(attention_s=11, ffn_s=17, allreduce_s=14, read_attention_s=18, read_ffn_s=24),
    "paper": BlockTimes(attention_s=11, ffn_s=17, allreduce_s=14, read_attention_s=18, read_ffn_s=30),
    "slow disk": BlockTimes(attention_s=11, ffn_s=17, allreduce_s=14, read_attention_s=18, read_ffn_s=60),
    "hopeless": BlockTimes(attention_s=1, ffn_s=1, allreduce_s=1, read_attention_s=18, read_ffn_s=60),
}


@pytest.mark.parametrize(
    ("name", "tight", "loose", "period"),
    [
        ("both", True, True, 0),
        ("paper", False, True, 0),
        ("slow disk", False, False, 2),
        ("hopeless", False, False, None),
    ],
)
def test_conditions_of_the_paper(name: str, tight: bool, loose: bool, period: int | None) -> None:
    times = TIMES[name]
    assert (is_tight(times), is_loose(times, 32), retention_period(times, 32)) == (tight, loose, period)


def stall_of(times: BlockTimes, retained_every: int, num_slots: int) -> float:
    """Share of a steady step that the computing thread stands waiting, all streamed but the retained FFN blocks."""
    pinned = {2 * layer + 1 for layer in range(32) if retained_every and layer % retained_every == 0}
    streamed = tuple(block for block in range(64) if block not in pinned)
    plan = WindowPlan(pinned=frozenset(pinned), streamed=streamed, slot_bytes=1, num_slots=num_slots)
    compute = [times.attention_s + times.allreduce_s, times.ffn_s + times.allreduce_s] * 32
    took, stalled = simulate(plan, compute, [times.read_attention_s, times.read_ffn_s] * 32, steps=3)
    return stalled / took


def test_tight_needs_two_slots_only() -> None:
    assert stall_of(TIMES["both"], 0, 2) == 0.0


def test_loose_hides_reading_given_a_third_slot() -> None:
    assert stall_of(TIMES["paper"], 0, 2) > 0.0
    assert stall_of(TIMES["paper"], 0, 3) < 0.01


def test_retention_hides_a_slow_disk() -> None:
    assert stall_of(TIMES["slow disk"], 0, 6) > 0.1
    assert stall_of(TIMES["slow disk"], 2, 6) < 0.01


@given(st.integers(1, 12), st.integers(1, 4), st.lists(st.integers(0, 11), max_size=40), st.data())
def test_any_order_of_wants_is_served(streamed: int, slots: int, wants: list[int], data: st.DataObject) -> None:
    """Aborted steps jump anywhere; reads end or fail at any moment; every wanted block is held with its own bytes."""
    window = Window(range(streamed), slots)
    holds: dict[int, int] = {}
    order = None

    def read_some() -> None:
        nonlocal order
        for _ in range(data.draw(st.integers(0, 3))):
            if order is None:
                order = window.next_read()
                continue
            if data.draw(st.booleans()):
                holds[order.slot] = order.block
                window.read_done()
            else:
                window.read_failed()
            order = None

    for want in wants:
        read_some()
        window.seek(want % streamed)
        for _ in range(4 * (slots + 2)):
            if (slot := window.ready_slot()) is not None:
                break
            if order is None:
                order = window.next_read()
                assert order is not None
            else:
                holds[order.slot] = order.block
                window.read_done()
                order = None
        assert slot is not None and holds[slot] == want % streamed
        read_some()
        assert holds[slot] == want % streamed
        window.release()


def test_misuse_is_told() -> None:
    window = Window((3, 5), 2)
    with pytest.raises(InvariantBroken):
        window.read_done()
    with pytest.raises(InvariantBroken):
        window.release()
    with pytest.raises(InvariantBroken, match="not streamed"):
        window.seek(4)
    with pytest.raises(InvariantBroken):
        Window((), 2)

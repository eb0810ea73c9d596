"""Plans: shares, memory, seats, hubs and links."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
from core_cases import GB, make_spec, profile
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.links import decide_links, probe_targets
from coordinator.memory import Candidate, Holding, StepBounds, bytes_text, kv_room, need_of
from coordinator.planner import PlanRequest, make_plan, seat_workers
from coordinator.shares import format_words, parse_words
from protocol.contract import SLACK_BYTES, floor_of_blocks, resident_tile_bytes, window_blocks
from protocol.errors import BudgetTooSmall, PlanImpossible
from protocol.ids import WorkerId
from protocol.messages import LinkMode, Peer
from protocol.plans import Plan
from protocol.specs import ModelSpec, WeightFormat
from protocol.tiles import TileKind, all_tiles, tile_bytes

STEP = StepBounds(rows=48, sampled=16)  # the least there can be, so that a floor is a floor
KV = 8192


def request(spec: ModelSpec, words: str | None, *, head_only: bool = False) -> PlanRequest:
    shares = None if words is None else parse_words(words)
    return PlanRequest(spec=spec, shares=shares, head_only=head_only, step=STEP)


def candidates(*budgets: int) -> list[Candidate]:
    return [Candidate(worker=WorkerId(f"w{i}"), budget_bytes=budget) for i, budget in enumerate(budgets)]


def beside_slack(num_bytes: int) -> int:
    """A budget that leaves so much beside what every worker is allowed anyway; none for 0."""
    return num_bytes + SLACK_BYTES if num_bytes else 0


def layers_of(plan: Plan) -> list[int]:
    return [len(stage.layers) for stage in plan.stages]


# ---------------------------------------------------------------- explicit plans


def test_shares_cut_layers_then_tiles() -> None:
    plan = make_plan(request(make_spec(layers=6), "1,1/3,1"), candidates(GB, GB, GB, GB), epoch=7)
    assert layers_of(plan) == [2, 4]
    assert [[(len(s.groups), len(s.ffn)) for s in stage.members] for stage in plan.stages] == [
        [(1, 4), (1, 4)],
        [(2, 6), (0, 2)],
    ]
    assert (plan.epoch, plan.head, plan.words) == (7, "w0", "1,1/3,1")


def test_a_head_alone_holds_no_layers() -> None:
    spec = make_spec()
    plan = make_plan(request(spec, "1/1", head_only=True), candidates(GB, GB, GB), epoch=1)
    assert plan.stage_of(WorkerId("w0")) is None
    assert need_of(plan, candidates(GB)[0], STEP).kv_bytes_per_position == 0
    assert [stage.hub_worker for stage in plan.stages] == ["w1", "w2"]


@pytest.mark.parametrize(
    ("words", "head_only", "workers", "message"),
    [
        ("1/1", False, 1, "2 shares, but there are 1 workers"),
        ("1/1", True, 2, "1 workers beside the head"),
        ("1/1/1/1/1", False, 5, "5 stages, the model has 4 layers"),
        (",".join("1" * 11), False, 11, "11 members can't share 2 KV-head groups and 8 FFN tiles"),
    ],
)
def test_impossible_plans_say_the_numbers(words: str, head_only: bool, workers: int, message: str) -> None:
    with pytest.raises(PlanImpossible, match=message) as caught:
        make_plan(request(make_spec(), words, head_only=head_only), candidates(*[GB] * workers), epoch=1)
    assert caught.value.remedy


def test_nobody_here_is_impossible() -> None:
    with pytest.raises(PlanImpossible, match="no worker"):
        make_plan(request(make_spec(), None), [], epoch=1)


def test_an_explicit_plan_beyond_a_budget_names_the_worker() -> None:
    spec = make_spec(layers=40)
    with pytest.raises(BudgetTooSmall, match=r"w1 needs .* of weights.*budget is 3.0 MB") as caught:
        make_plan(request(spec, "1/1"), candidates(GB, 3_000_000), epoch=1)
    assert caught.value.node == "w1"


@st.composite
def explicit_cases(draw: st.DrawFn) -> tuple[ModelSpec, str, int]:
    spec = make_spec(
        layers=draw(st.integers(1, 12)), kv_heads=draw(st.integers(1, 6)), ffn_tiles=draw(st.integers(1, 10))
    )
    stages = draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4))
    return spec, format_words([tuple(stage) for stage in stages]), draw(st.integers(1, 20))


@given(explicit_cases())
@settings(max_examples=150, deadline=None)
def test_any_words_give_a_whole_plan_or_none(case: tuple[ModelSpec, str, int]) -> None:
    spec, words, workers = case
    try:
        plan = make_plan(request(spec, words), candidates(*[GB] * workers), epoch=1)
    except PlanImpossible:
        return
    held = [tile for worker in plan.workers for tile in plan.tiles_of(worker)]
    assert set(held) == set(all_tiles(spec))
    for stage, shares in zip(plan.stages, parse_words(words), strict=True):
        for (one, weight), (other, other_weight) in itertools.permutations(zip(stage.members, shares, strict=True), 2):
            if weight > other_weight and len(shares) <= spec.ffn_tiles:
                assert len(one.groups) >= len(other.groups)
                assert len(one.ffn) >= len(other.ffn)


# ---------------------------------------------------------------- automatic plans


def need_of_layers(spec: ModelSpec, layers: int, *, is_head: bool = False) -> int:
    """The budget that just holds so many layers, found by asking for a plan of one worker, with a head beside it."""
    one = make_spec(layers=layers)
    plan = make_plan(request(one, "1", head_only=not is_head), candidates(GB, GB), epoch=1)
    return need_of(plan, candidates(GB, GB)[0 if is_head else 1], STEP).total_bytes


def test_one_worker_takes_it_all() -> None:
    plan = make_plan(request(make_spec(), None), candidates(GB), epoch=1)
    assert layers_of(plan) == [4]
    assert plan.words == "auto"


def test_automatic_layers_follow_memory() -> None:
    spec = make_spec(layers=12)
    head, small = need_of_layers(spec, 6, is_head=True), need_of_layers(spec, 3)
    assert layers_of(make_plan(request(spec, None), candidates(head, small, small), epoch=1)) == [6, 3, 3]


def test_a_worker_without_room_for_a_layer_is_left_out() -> None:
    plan = make_plan(request(make_spec(), None), candidates(GB, 1000, GB), epoch=1)
    assert plan.workers == ("w0", "w2")


def test_a_small_head_may_hold_no_layers() -> None:
    spec = make_spec()
    head = need_of_layers(spec, 1, is_head=True) - 1
    plan = make_plan(request(spec, None), candidates(head, GB), epoch=1)
    assert plan.head == "w0"
    assert plan.stage_of(WorkerId("w0")) is None


def test_no_more_stages_than_layers_and_the_largest_win() -> None:
    spec = make_spec(layers=2)
    plan = make_plan(request(spec, None), candidates(GB, need_of_layers(spec, 1), GB, GB), epoch=1)
    assert plan.workers == ("w0", "w2")


def test_too_little_memory_says_what_is_missing() -> None:
    spec = make_spec(layers=12)
    budget = need_of_layers(spec, 5)
    with pytest.raises(PlanImpossible, match=r"holds 10 of 12 layers; about \S+ kB are missing") as caught:
        make_plan(request(spec, None, head_only=True), candidates(GB, budget, budget), epoch=1)
    assert all(way in caught.value.remedy for way in ("--memory", "more workers", "--dtype"))


def test_a_head_that_can_not_hold_its_own_tiles_is_named() -> None:
    with pytest.raises(BudgetTooSmall) as caught:
        make_plan(request(make_spec(), None), candidates(1000, GB), epoch=1)
    assert caught.value.node == "w0"


@given(
    st.integers(1, 20),
    st.lists(st.integers(0, 30_000_000).map(beside_slack), min_size=1, max_size=8),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_automatic_plans_keep_every_budget(layers: int, budgets: Sequence[int], head_only: bool) -> None:
    spec = make_spec(layers=layers)
    offered = candidates(*budgets)
    try:
        plan = make_plan(request(spec, None, head_only=head_only), offered, epoch=1)
    except (PlanImpossible, BudgetTooSmall):
        return
    used = [candidate for candidate in offered if candidate.worker in plan.workers]
    assert all(need_of(plan, candidate, STEP).total_bytes <= candidate.budget_bytes for candidate in used)
    assert kv_room(plan, offered, KV).positions == plan.kv_positions >= spec.max_positions
    if plan.kv_positions < KV:
        most = [need_of(plan, candidate, STEP).positions_in(candidate.budget_bytes) for candidate in used]
        assert plan.kv_positions == min(positions for positions in most if positions is not None)


# ---------------------------------------------------------------- budgets that hold less than all


def streaming(*budgets: int, base_bytes: int = 0) -> list[Candidate]:
    """Workers whose weights may flow from their disks."""
    return [replace(one, base_bytes=base_bytes, can_stream=True) for one in candidates(*budgets)]


def whole_plan(spec: ModelSpec, words: str = "1") -> Plan:
    return make_plan(request(spec, words), candidates(*[GB] * len(words.split("/"))), epoch=1)


@pytest.mark.parametrize("words", ["1", "1/1", "1,1/2,1", "5,1,1/1"])
@pytest.mark.parametrize(("head_only", "tied"), [(False, False), (True, True)])
@pytest.mark.parametrize("weights", WeightFormat)
def test_a_holding_is_what_the_contract_counts(words: str, head_only: bool, tied: bool, weights: WeightFormat) -> None:
    spec = replace(make_spec(layers=6, vocab=9000), tied_embeddings=tied, weights=weights, hidden=64, head_dim=32)
    plan = make_plan(request(spec, words, head_only=head_only), candidates(*[GB] * 5), epoch=1)
    for worker in plan.workers:
        holding, tiles = Holding.of(plan, worker), plan.tiles_of(worker)
        assert holding.blocks == window_blocks(plan, worker)
        assert holding.resident_bytes == resident_tile_bytes(spec, tiles)
        held = [tile for tile in tiles if tied or tile.kind is not TileKind.EMBEDDING]
        need = need_of(plan, Candidate(worker=worker, budget_bytes=GB), STEP)
        assert need.weight_bytes == need.least_bytes == sum(tile_bytes(spec, tile) for tile in held)
        need = need_of(plan, Candidate(worker=worker, budget_bytes=GB, can_stream=True), STEP)
        assert need.least_bytes == holding.resident_bytes + floor_of_blocks(holding.blocks)


@pytest.mark.parametrize(
    ("slack", "can_stream", "plans"),
    [(0, False, True), (-1, False, False), (0, True, True), (-1, True, False)],
)
@pytest.mark.parametrize("base_bytes", [0, 70_000_000])
def test_only_a_floor_that_does_not_fit_is_refused(slack: int, can_stream: bool, plans: bool, base_bytes: int) -> None:
    spec = make_spec(layers=12)
    worker = Candidate(worker=WorkerId("w0"), budget_bytes=GB, base_bytes=base_bytes, can_stream=can_stream)
    need = need_of(whole_plan(spec), worker, STEP)
    assert need.floor_bytes < need.total_bytes if can_stream else need.floor_bytes == need.total_bytes
    worker = replace(worker, budget_bytes=need.floor_bytes + slack)
    if plans:
        assert make_plan(request(spec, "1"), [worker], epoch=1).kv_positions == spec.max_positions
        return
    with pytest.raises(BudgetTooSmall, match=f"w0 needs {bytes_text(need.floor_bytes)} .* of weights") as caught:
        make_plan(request(spec, "1"), [worker], epoch=1)
    assert caught.value.node == "w0"
    assert ("flows from its disk" in caught.value.message) == can_stream
    assert bytes_text(worker.budget_bytes) in caught.value.message
    assert all(way in caught.value.remedy for way in ("--memory", "fewer tiles", "--dtype"))


@pytest.mark.parametrize(
    ("more_positions", "kv_positions", "expected"),
    [
        (0, 8192, 512),
        (1, 8192, 512),  # a block on its way into memory comes first
        (100, 8192, 612),
        (10**6, 8192, 8192),
        (10**6, 20_000, 20_000),
        (0, 100, 100),  # a floor that its owner lowers
        (-1, 8192, 512),  # streams: no more than the least
        (-100, 8192, 512),
    ],
)
def test_room_for_sessions_is_what_memory_leaves(more_positions: int, kv_positions: int, expected: int) -> None:
    spec = make_spec(layers=12, max_positions=512)
    asked = replace(request(spec, "1"), kv_positions=kv_positions)
    (worker,) = streaming(GB)
    need = need_of(whole_plan(spec), worker, STEP)
    budget = need.total_bytes + more_positions * need.kv_bytes_per_position + (more_positions > 1) * need.block_bytes
    plan = make_plan(asked, [replace(worker, budget_bytes=budget)], epoch=1)
    assert plan.kv_positions == expected
    assert (plan.step_rows, plan.step_samples) == (STEP.rows, STEP.sampled)


def test_the_narrowest_worker_names_the_room() -> None:
    spec = make_spec(layers=12)
    plan = whole_plan(spec, "1/1")
    need = need_of(plan, candidates(GB, GB)[1], STEP)
    offered = candidates(GB, need.total_bytes + need.block_bytes + need.kv_bytes_per_position)
    assert kv_room(plan, offered, KV) == (513, "w1")
    assert kv_room(plan, candidates(GB, GB), KV) == (KV, None)


def test_automatic_plans_stream_only_when_memory_is_short() -> None:
    spec = make_spec(layers=12)
    one = need_of(whole_plan(spec), candidates(GB)[0], STEP).total_bytes
    assert layers_of(make_plan(request(spec, None), streaming(one, one), epoch=1)) == [6, 6]
    plan = make_plan(request(spec, None), streaming(one - 1), epoch=1)
    assert (layers_of(plan), plan.kv_positions) == ([12], 512)


@pytest.mark.parametrize("head_only", [False, True])
def test_streamed_layers_follow_memory(head_only: bool) -> None:
    """All workers that hold layers have room for about the same part of their weights, the vocabulary counted."""
    spec = make_spec(layers=60, max_positions=64)
    offered = streaming(*(SLACK_BYTES + more for more in (4_000_000, 3_000_000, 6_000_000)))
    plan = make_plan(request(spec, None, head_only=head_only), offered, epoch=1)
    parts = []
    for candidate in offered[head_only:]:
        need = need_of(plan, candidate, STEP)
        assert need.total_bytes > candidate.budget_bytes
        parts.append(1 - (need.total_bytes - candidate.budget_bytes) / need.weight_bytes)
    assert max(parts) - min(parts) < 0.05


@pytest.mark.parametrize(
    ("rows", "prompt_rows"), [(272, 256), (271, 128), (144, 128), (143, 64), (80, 64), (79, 32), (48, 32)]
)
def test_prompts_are_computed_in_pieces_that_fit(rows: int, prompt_rows: int) -> None:
    """The budget is what a step of so many rows needs; a step of 272 is wanted."""
    spec = make_spec(layers=4)
    wanted = replace(request(spec, "1"), step=StepBounds(rows=272, sampled=16))
    worker = candidates(GB)[0]
    need = need_of(make_plan(wanted, [worker], epoch=1), worker, StepBounds(rows=rows, sampled=16))
    plan = make_plan(wanted, [replace(worker, budget_bytes=need.floor_bytes)], epoch=1)
    assert plan.prompt_rows(256) == prompt_rows
    assert plan.prompt_rows(7) == 7


def test_a_plan_that_bounds_no_step_leaves_prompts_as_they_are() -> None:
    plan = replace(make_plan(request(make_spec(), "1"), candidates(GB), epoch=1), step_rows=0)
    assert plan.prompt_rows(256) == 256


def test_no_streaming_where_the_device_can_not() -> None:
    profile_of = {"cpu": (70, True), "cuda": (0, False), "mps": (0, False)}
    for device, expected in profile_of.items():
        worker = Candidate.of(WorkerId("w"), replace(profile(1000), device=device, base_bytes=70))
        assert (worker.base_bytes, worker.can_stream) == expected
        assert worker.budget_bytes == 1000


def test_too_little_even_for_streaming_says_the_numbers() -> None:
    spec = make_spec(layers=100)
    (worker,) = streaming(GB)
    floor = need_of(whole_plan(spec), worker, STEP).floor_bytes
    short = replace(worker, budget_bytes=floor - 500_000)
    with pytest.raises(
        PlanImpossible, match=r"holds \d+ of 100 layers \(\d+ with streaming\); about 500.0 kB"
    ) as caught:
        make_plan(request(spec, None), [short], epoch=1)
    assert all(way in caught.value.remedy for way in ("--memory", "more workers", "--dtype"))


def test_a_head_without_layers_needs_a_worker() -> None:
    with pytest.raises(PlanImpossible, match="beside the head"):
        make_plan(request(make_spec(), None, head_only=True), streaming(GB), epoch=1)


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(0, 20_000_000).map(beside_slack), st.booleans()), min_size=1, max_size=8),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_streaming_plans_keep_every_floor(layers: int, workers: list[tuple[int, bool]], head_only: bool) -> None:
    spec = make_spec(layers=layers)
    offered = [
        replace(one, can_stream=can_stream)
        for one, (_, can_stream) in zip(candidates(*(budget for budget, _ in workers)), workers, strict=True)
    ]
    try:
        plan = make_plan(request(spec, None, head_only=head_only), offered, epoch=1)
    except (PlanImpossible, BudgetTooSmall):
        return
    for candidate in offered:
        if candidate.worker in plan.workers:
            need = need_of(plan, candidate, STEP)
            assert need.floor_bytes <= candidate.budget_bytes
            kv = need.kv_bytes_per_position * plan.kv_positions
            fixed = need.base_bytes + need.workspace_bytes + kv
            assert fixed + need.least_bytes <= candidate.budget_bytes
    assert spec.max_positions <= plan.kv_positions <= KV


# ---------------------------------------------------------------- seats, hubs, links


@pytest.mark.parametrize(
    ("others", "seats", "order"),
    [
        ("abc", "", "habc"),
        ("abc", "hcab", "hcab"),
        ("acd", "habc", "hadc"),  # d takes the seat of b
        ("ac", "habc", "hac"),
        ("abcd", "hab", "habcd"),
        ("abx", "gahb", "haxb"),  # another head: its old seat is free
    ],
)
def test_who_stays_keeps_the_seat(others: str, seats: str, order: str) -> None:
    names = [WorkerId(name) for name in others]
    assert "".join(seat_workers(WorkerId("h"), names, [WorkerId(name) for name in seats])) == order


def reach(*pairs: str) -> frozenset[tuple[WorkerId, WorkerId]]:
    return frozenset((WorkerId(f"w{pair[0]}"), WorkerId(f"w{pair[1]}")) for pair in pairs)


@pytest.mark.parametrize(
    ("pairs", "hub"),
    [((), 0), (("01", "12", "21", "10"), 1), (("20", "12"), 2), (("01", "02", "12"), 0)],
)
def test_the_hub_has_most_direct_links(pairs: tuple[str, ...], hub: int) -> None:
    plan = make_plan(request(make_spec(), "1,1,1"), candidates(GB, GB, GB), epoch=1, reach=reach(*pairs))
    assert plan.stages[0].hub == hub


def peers(plan: Plan) -> dict[WorkerId, Peer]:
    return {worker: Peer(worker=worker, public_key=b"k" * 40, addresses=()) for worker in plan.workers}


@pytest.mark.parametrize(
    ("pairs", "hub_mode", "other_mode"),
    [
        (("10",), LinkMode.LISTEN, LinkMode.DIAL),
        (("01",), LinkMode.DIAL, LinkMode.LISTEN),
        (("01", "10"), LinkMode.LISTEN, LinkMode.DIAL),
        ((), LinkMode.RELAY, LinkMode.RELAY),
    ],
)
def test_who_dials_whom(pairs: tuple[str, ...], hub_mode: LinkMode, other_mode: LinkMode) -> None:
    plan = make_plan(request(make_spec(), "1,1"), candidates(GB, GB), epoch=1)
    orders = decide_links(plan, reach(*pairs), peers(plan))
    assert [(order.peer.worker, order.mode) for order in orders[WorkerId("w0")]] == [("w1", hub_mode)]
    assert [(order.peer.worker, order.mode) for order in orders[WorkerId("w1")]] == [("w0", other_mode)]


def test_every_link_is_ordered_on_both_sides_and_was_probed() -> None:
    plan = make_plan(request(make_spec(), "1,1/1,1", head_only=True), candidates(*[GB] * 5), epoch=1)
    orders, targets = decide_links(plan, frozenset(), peers(plan)), probe_targets(plan)
    for hub, other in plan.links():
        assert other in [order.peer.worker for order in orders[hub]]
        assert hub in [order.peer.worker for order in orders[other]]
        assert other in targets[hub]
        assert hub in targets[other]


def test_a_worker_alone_has_nobody_to_probe() -> None:
    assert probe_targets(make_plan(request(make_spec(), None), candidates(GB), epoch=1)) == {}


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (1_250_000_000, "1.3 GB")]
)
def test_bytes_for_people(num_bytes: int, text: str) -> None:
    assert bytes_text(num_bytes) == text

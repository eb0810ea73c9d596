"""Specs, plans and batches: what may be built, and what a constructor refuses."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_samples import ALPHA, BETA, GAMMA, MODEL, PLAN, SAMPLING

from protocol.batches import Sampling, SessionRows, num_rows
from protocol.ids import SessionId, WorkerId, worker_id
from protocol.plans import Plan, Share, Stage
from protocol.schema import pack, unpack
from protocol.specs import ActivationFormat, ModelSpec, RopeKind, RopeSpec, Span, WeightFormat, require_tiling
from protocol.tiles import HEAD_KINDS, TileKind, all_tiles


def changed(value: Any, **changes: Any) -> Any:
    """The same value with some fields changed, built and checked anew."""
    names = value.__dataclass_fields__
    return type(value)(**{name: getattr(value, name) for name in names} | changes)


@st.composite
def cuts(draw: st.DrawFn, length: int, pieces: int) -> list[Span]:
    """`pieces` spans, some maybe empty, that tile `[0, length)`."""
    edges = sorted(draw(st.lists(st.integers(0, length), min_size=pieces - 1, max_size=pieces - 1)))
    return [Span(start, end) for start, end in zip([0, *edges], [*edges, length], strict=True)]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan of a small model over up to four stages of up to four members."""
    layers, groups, tiles = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    model = changed(MODEL, layers=layers, kv_heads=groups, heads=2 * groups, ffn_tiles=tiles, sliding_windows=())
    stages = []
    for layers_span in draw(cuts(layers, draw(st.integers(1, 4)))):
        if not len(layers_span):
            continue
        size = draw(st.integers(1, 4))
        spans = zip(draw(cuts(groups, size)), draw(cuts(tiles, size)), strict=True)
        held = [(g, f) for g, f in spans if len(g) or len(f)]
        names = [WorkerId(f"w{len(stages)}-{rank}") for rank in range(len(held))]
        members = tuple(Share(worker=name, groups=g, ffn=f) for name, (g, f) in zip(names, held, strict=True))
        stages.append(Stage(layers=layers_span, members=members, hub=draw(st.integers(0, len(members) - 1))))
    somebody = st.sampled_from([share.worker for stage in stages for share in stage.members])
    head = draw(st.one_of(st.just(WorkerId("head")), somebody))
    return Plan(epoch=1, model=model, head=head, stages=tuple(stages), wire=ActivationFormat.FLOAT32)


@settings(max_examples=100, deadline=None)
@given(plans())
def test_a_plan_places_every_tile_once_but_the_norms(plan: Plan) -> None:
    placed = [tile for worker in plan.workers for tile in plan.tiles_of(worker) if tile.kind is not TileKind.NORMS]
    assert sorted(placed) == sorted(tile for tile in all_tiles(plan.model) if tile.kind is not TileKind.NORMS)
    for worker in plan.workers:
        held = plan.tiles_of(worker)
        assert len(set(held)) == len(held)
        assert worker == plan.head or not HEAD_KINDS & {tile.kind for tile in held}


@settings(max_examples=100, deadline=None)
@given(plans())
def test_links_join_each_star_the_hubs_and_the_head_once(plan: Plan) -> None:
    links = plan.links()
    pairs = {frozenset(pair) for pair in links}
    assert len(pairs) == len(links)
    assert all(len(pair) == 2 for pair in pairs)
    hubs = [stage.hub_worker for stage in plan.stages]
    needed = [(stage.hub_worker, share.worker) for stage in plan.stages for share in stage.members]
    needed += [*itertools.pairwise(hubs), (plan.head, hubs[0]), (plan.head, hubs[-1])]
    assert pairs == {frozenset(pair) for pair in needed if pair[0] != pair[1]}


@settings(max_examples=50, deadline=None)
@given(plans())
def test_a_plan_survives_the_wire_and_knows_its_members(plan: Plan) -> None:
    assert unpack(Plan, pack(plan)) == plan
    assert plan.workers[0] == plan.head
    for number, stage in enumerate(plan.stages):
        for rank, share in enumerate(stage.members):
            assert plan.stage_of(share.worker) == number
            assert stage.rank_of(share.worker) == rank


def test_a_head_without_tiles_of_layers_belongs_to_no_stage() -> None:
    plan = changed(PLAN, head=WorkerId("delta"))
    assert plan.stage_of(WorkerId("delta")) is None
    assert {tile.kind for tile in plan.tiles_of(WorkerId("delta"))} == HEAD_KINDS
    assert plan.tiles_of(WorkerId("stranger")) == ()
    with pytest.raises(KeyError):
        plan.stages[0].rank_of(WorkerId("stranger"))


FIRST, SECOND = PLAN.stages
SHARE = FIRST.members[0]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Span(2, 1), r"\[2, 1\) is not in order"),
        (lambda: Span(-1, 1), "not in order"),
        (lambda: changed(SHARE, groups=Span(1, 1), ffn=Span(0, 0)), "share of alpha holds no tile"),
        (lambda: changed(FIRST, layers=Span(1, 1)), "at least one layer"),
        (lambda: changed(FIRST, members=()), "hub 1 is not one of 0"),
        (lambda: changed(FIRST, hub=2), "hub 2 is not one of 2"),
        (lambda: changed(FIRST, hub=-1), "hub -1"),
        (lambda: changed(FIRST, members=(SHARE, SHARE)), "twice in one stage"),
        (lambda: changed(PLAN, stages=()), "layers of the stages: spans end at 0, not at 3"),
        (lambda: changed(PLAN, stages=(FIRST,)), "spans end at 2, not at 3"),
        (lambda: changed(PLAN, stages=(SECOND,)), r"\[2, 3\) should start at 0"),
        (lambda: changed(PLAN, stages=(SECOND, FIRST)), "should start at 0"),
        (lambda: changed(PLAN, stages=(changed(FIRST, members=FIRST.members[:1], hub=0), SECOND)), "groups of stage 0"),
        (
            lambda: changed(PLAN, stages=(FIRST, changed(SECOND, members=(changed(SHARE, groups=Span(0, 2)),)))),
            "FFN tiles of stage 1",
        ),
        (
            lambda: changed(PLAN, stages=(FIRST, changed(SECOND, members=(changed(SECOND.members[0], worker=BETA),)))),
            "a worker stands in two stages",
        ),
        (lambda: require_tiling((Span(0, 1), Span(2, 3)), 3, "x"), r"x: \[2, 3\) should start at 1"),
        (lambda: changed(MODEL, heads=3), "heads 3 is not a multiple of kv_heads 2"),
        (lambda: changed(MODEL, kv_heads=0), "kv_heads 0 must be at least 1"),
        (lambda: changed(MODEL, layers=0), "layers 0 must be at least 1"),
        (lambda: changed(MODEL, head_dim=15), "head_dim 15 must be even"),
        (lambda: changed(MODEL, ffn_tiles=161), "ffn_tiles 161 exceeds intermediate 160"),
        (lambda: changed(MODEL, sliding_windows=(1, 2)), "sliding_windows has 2 entries for 3 layers"),
        (lambda: changed(MODEL, norm_eps=0.0), "norm_eps"),
        (lambda: changed(MODEL, norm_eps=math.nan), "norm_eps"),
        (lambda: RopeSpec(theta=math.inf), "theta inf"),
        (lambda: RopeSpec(theta=1e4, factor=0.0), "factor 0.0"),
        (lambda: RopeSpec(theta=1e4, kind=RopeKind.LLAMA3), "llama3 rope needs"),
        (
            lambda: SessionRows(session=SessionId(1), start=4, count=2, capacity=5),
            r"rows \[4, 6\) exceed the capacity 5",
        ),
        (lambda: changed(SAMPLING, temperature=math.nan), "temperature nan"),
        (lambda: changed(SAMPLING, top_p=0.0), "top_p 0.0"),
        (lambda: changed(SAMPLING, top_k=-1), "top_k -1"),
        (lambda: changed(SAMPLING, seed=2**63), "seed"),
        (lambda: Sampling(repetition_penalty=0.0), "repetition_penalty"),
        (lambda: worker_id("../etc"), r"worker name '../etc' must be 1 to 63 letters"),
        (lambda: worker_id(""), "must be 1 to 63"),
        (lambda: worker_id("a" * 64), "must be 1 to 63"),
        (lambda: worker_id("a\n"), "must be 1 to 63"),
    ],
)
def test_impossible_values_do_not_construct(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def test_spans() -> None:
    span = Span(2, 5)
    assert (len(span), list(span), str(span)) == (3, [2, 3, 4], "[2, 5)")
    assert 4 in span
    assert 5 not in span
    assert not Span(3, 3)


def test_rows_are_counted() -> None:
    rows = tuple(SessionRows(session=SessionId(i), start=0, count=i, capacity=9) for i in (1, 4))
    assert num_rows(rows) == 5


def test_what_a_model_says_of_itself() -> None:
    assert MODEL.queries_per_group == 2
    assert [MODEL.window_of(layer) for layer in range(3)] == [0, 16, 0]
    assert changed(MODEL, sliding_windows=()).window_of(2) == 0
    assert MODEL.kv_bytes_per_token(groups=2, layers=3) == 2 * 2 * 3 * 16 * 2
    assert PLAN.workers == (ALPHA, BETA, GAMMA)
    assert isinstance(MODEL, ModelSpec)
    assert WeightFormat("int8") is MODEL.weights

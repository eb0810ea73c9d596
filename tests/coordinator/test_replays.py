"""What is computed again after a change of plan: the fewest positions and layers that can be proven to be enough."""

from __future__ import annotations

import pytest
from core_cases import GB, make_spec
from hypothesis import given
from hypothesis import strategies as st

from coordinator.memory import Candidate, StepBounds
from coordinator.planner import PlanRequest, make_plan
from coordinator.replays import NOTHING, Kept, Remains, Repeated, Replay, find_remains, find_replay, repeated_by
from coordinator.shares import parse_words
from protocol.ids import SessionId, WorkerId
from protocol.messages import HeldKv, HeldLayers, KeptInputs, Loaded
from protocol.plans import Plan
from protocol.specs import Span

ONE, TWO = SessionId(1), SessionId(2)
LAYERS = 6

WAYS = {
    "nothing is lacking": ([9] * 6, {}, Replay(9, 9)),
    "nothing is left": ([0] * 6, {2: Kept(9, 0)}, Replay(0, 0)),
    "what was beyond the log does not count": ([12] * 6, {}, Replay(9, 9)),
    "the middle is gone and its inputs are kept": ([9, 9, 0, 0, 9, 9], {2: Kept(9, 0)}, Replay(0, 9, Span(2, 4))),
    "its inputs are not kept": ([9, 9, 0, 0, 9, 9], {}, Replay(0, 0)),
    "others' inputs are of no use": ([9, 9, 0, 0, 9, 9], {1: Kept(9, 0), 3: Kept(9, 0)}, Replay(0, 0)),
    "the first layers need the embedding alone": ([0, 0, 9, 9, 9, 9], {}, Replay(0, 9, Span(0, 2))),
    "the last layers": ([9, 9, 9, 9, 0, 0], {4: Kept(9, 1)}, Replay(0, 9, Span(4, 6), 1)),
    "a copy lags": ([9, 9, 7, 7, 9, 9], {2: Kept(9, 0)}, Replay(7, 9, Span(2, 4))),
    "a copy lags further in one layer": ([9, 9, 7, 3, 9, 9], {2: Kept(9, 0)}, Replay(3, 9, Span(2, 4))),
    "two stages are gone and the layers between are computed with them": (
        [9, 0, 9, 0, 9, 9], {1: Kept(9, 0)}, Replay(0, 9, Span(1, 4)),
    ),
    "the first and the last are gone: all of it": ([0, 9, 9, 9, 9, 0], {}, Replay(0, 0)),
    "a member is one position behind: that one through all": (
        [9, 9, 0, 0, 8, 8], {2: Kept(9, 0)}, Replay(0, 8, Span(2, 4)),
    ),
    "inputs end before the rest: what they reach, then all": (
        [9, 9, 0, 0, 9, 9], {2: Kept(6, 0)}, Replay(0, 6, Span(2, 4)),
    ),
    "inputs that reach too little for what is lacking": ([9, 9, 6, 6, 9, 9], {2: Kept(6, 0)}, Replay(6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_the_way_that_computes_least(name: str) -> None:
    lengths, inputs, wanted = WAYS[name]
    assert find_replay(Remains(lengths, inputs), 9) == wanted


@given(
    st.lists(st.sampled_from([0, 3, 8, 9, 12]), min_size=LAYERS, max_size=LAYERS),
    st.dictionaries(st.integers(1, LAYERS - 1), st.builds(Kept, st.integers(0, 12), st.integers(0, 2))),
    st.integers(0, 10),
)
def test_every_way_leaves_nothing_out(lengths: list[int], inputs: dict[int, Kept], reached: int) -> None:
    way = find_replay(Remains(lengths, inputs), reached)
    assert way.start == min(*lengths, reached)
    assert way.start <= way.until <= reached
    for layer, length in enumerate(lengths):
        assert length >= way.until or layer in way.layers or way.until == way.start
    if way.until > way.start:
        assert way.layers.start == 0 or inputs[way.layers.start].positions >= way.until
        assert way.num_rows(reached, LAYERS) < (reached - way.start) * LAYERS


@pytest.mark.parametrize(
    ("replay", "repeated", "text"),
    [
        (Replay(9, 9), NOTHING, ""),
        (Replay(0, 0), Repeated(9, 54, Span(0, 6)), "9 positions"),
        (Replay(0, 9, Span(2, 4)), Repeated(9, 18, Span(2, 4)), "layers 2 to 3 of 9 positions"),
        (Replay(4, 9, Span(2, 3)), Repeated(5, 5, Span(2, 3)), "layer 2 of 5 positions"),
        (Replay(0, 6, Span(2, 4)), Repeated(9, 30, Span(0, 6)), "9 positions"),
    ],
)
def test_what_is_computed_again_is_told(replay: Replay, repeated: Repeated, text: str) -> None:
    assert repeated_by(replay, 9, LAYERS) == repeated
    assert repeated.text(LAYERS) == text


def test_what_several_sessions_repeat_adds_up() -> None:
    one, other = Repeated(9, 18, Span(2, 4)), Repeated(5, 5, Span(4, 5))
    assert one.plus(NOTHING) == NOTHING.plus(one) == one
    assert one.plus(other) == Repeated(14, 23, Span(2, 5))


# ---------------------------------------------------------------- what workers say


def plan_of(words: str) -> Plan:
    step = StepBounds(rows=16, sampled=4)
    request = PlanRequest(spec=make_spec(layers=LAYERS), shares=parse_words(words), head_only=False, step=step)
    names = ("head", "b", "c", "d")[: request.num_workers]
    return make_plan(request, [Candidate(worker=WorkerId(name), budget_bytes=GB) for name in names], epoch=1)


def says(*held: HeldKv, knows_layers: bool = True) -> Loaded:
    return Loaded(
        epoch=1, weight_bytes=1, fetched_bytes=0, resident_bytes=1, load_s=0.1, held=held, knows_layers=knows_layers
    )


def held(positions: int, layers: tuple[int, int, int] | None = None, inputs: dict[int, int] | None = None) -> HeldKv:
    more = () if layers is None else (HeldLayers(layers=Span(*layers[:2]), positions=layers[2]),)
    kept = tuple(KeptInputs(layer=layer, positions=found) for layer, found in (inputs or {}).items())
    return HeldKv(session=ONE, positions=positions, layers=more, inputs=kept)


def remains(plan: Plan, *reports: Loaded) -> Remains:
    found = find_remains(plan, dict(zip(plan.workers, reports, strict=True)))
    assert set(found) <= {ONE}
    return found[ONE]


def test_a_pipeline_says_what_each_layer_has() -> None:
    plan = plan_of("1/1")  # three layers each
    found = remains(plan, says(held(0, (0, 2, 9), {2: 9})), says(held(0, (4, 6, 9), {4: 5, 2: 7})))
    assert found == Remains([9, 9, 0, 0, 9, 9], {2: Kept(9, 0), 4: Kept(5, 1)})


def test_the_least_of_a_stages_members_counts_and_its_hub_alone_puts_in() -> None:
    plan = plan_of("1,1/1")
    hub, other = plan.stages[0].hub_worker, plan.stages[0].members[1 - plan.stages[0].hub].worker
    reports = {hub: says(held(9, None, {1: 9})), other: says(held(4, (1, 2, 6), {2: 9})), WorkerId("c"): says(held(9))}
    found = find_remains(plan, reports)[ONE]
    stage = plan.stages[0].layers
    assert found.lengths == [4, 6, *[4] * (stage.end - 2), *[9] * (LAYERS - stage.end)]
    assert found.inputs == {1: Kept(9, 0)}


def test_who_says_nothing_has_nothing() -> None:
    plan = plan_of("1/1")
    assert remains(plan, says(), says(held(9))).lengths == [0, 0, 0, 9, 9, 9]


def test_where_one_worker_can_not_compute_some_layers_alone_all_are_computed() -> None:
    plan = plan_of("1/1")
    found = remains(plan, says(held(2, (0, 2, 9))), says(held(9), knows_layers=False))
    assert found.lengths == [2] * LAYERS


def test_what_a_hub_keeps_goes_no_further_than_the_next_stage() -> None:
    plan = plan_of("1/1/1")  # two layers each
    found = remains(plan, says(held(9, None, {2: 9, 3: 8, 4: 9})), says(held(9, None, {1: 9, 2: 7})), says(held(9)))
    assert found.inputs == {2: Kept(9, 0), 3: Kept(8, 0)}

"""The control side's decisions: a table of stories, and invariants under any order of events."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tiny_cluster import SPEC, plan_of

from protocol.errors import CoordinatorStale, PeerLost, StorageFull, TileUnavailable
from protocol.ids import WorkerId
from protocol.messages import Fault, Loaded
from protocol.specs import Span
from worker.commands import Failed, Ready, TilesSpoiled
from worker.events import (
    BeginPlan,
    DropPlan,
    Effect,
    End,
    Event,
    Fetched,
    FetchFailed,
    HoldOver,
    HoldPlan,
    LeaveWanted,
    LetGo,
    Ordered,
    Silent,
    StartFetch,
    StartLoad,
    StopAsked,
    StopFetch,
    Tell,
    Unloaded,
    Welcomed,
)
from worker.state import Phase, WorkerState, require_current

ALL = (Span(0, SPEC.layers), [("a", Span(0, SPEC.kv_heads), Span(0, SPEC.ffn_tiles))], 0)
WELCOME = Welcomed(worker=WorkerId("a"), term=1)


def order(epoch: int) -> Ordered:
    return Ordered(plan=plan_of([ALL], head="a", epoch=epoch), links=(), entries=())


def ready(epoch: int) -> Ready:
    return Ready(epoch=epoch, weight_bytes=7, resident_bytes=8, load_s=0.5)


def fetched(epoch: int, num_bytes: int = 5) -> Fetched:
    return Fetched(epoch=epoch, fetched_bytes=num_bytes)


def spoiled(epoch: int) -> TilesSpoiled:
    return TilesSpoiled(epoch=epoch, error=TileUnavailable("altered"))


def lost(epoch: int) -> Failed:
    return Failed(epoch=epoch, error=PeerLost("b is gone", node="b"), lost="b")


STORIES: dict[str, list[tuple[Event, str]]] = {
    "to ready": [
        (order(1), "BeginPlan StartFetch"), (fetched(1), "StartLoad"), (ready(1), "Tell"), (ready(1), ""),
    ],
    "a newer order takes the place of a fetch": [
        (order(1), "BeginPlan StartFetch"), (order(2), "StopFetch BeginPlan StartFetch"), (fetched(1), ""),
        (fetched(2), "StartLoad"), (ready(1), ""), (ready(2), "Tell"),
    ],
    "a newer order takes the place of a load": [
        (order(1), "BeginPlan StartFetch"), (fetched(1), "StartLoad"), (order(3), "BeginPlan StartFetch"),
        (ready(1), ""), (lost(1), ""),
    ],
    "an older or repeated order is dropped": [
        (order(2), "BeginPlan StartFetch"), (order(2), ""), (order(1), ""),
    ],
    "an order that its own unload has overtaken is dropped": [(Unloaded(epoch=2), ""), (order(2), "")],
    "unload of an older epoch changes nothing": [(order(2), "BeginPlan StartFetch"), (Unloaded(epoch=1), "")],
    "unload while fetching": [
        (order(1), "BeginPlan StartFetch"), (Unloaded(epoch=1), "StopFetch HoldPlan"), (fetched(1), ""),
    ],
    "a spoiled tile is fetched again, three times in all": [
        (order(1), "BeginPlan StartFetch"), (fetched(1), "StartLoad"), (spoiled(1), "StartFetch"),
        (fetched(1), "StartLoad"), (spoiled(1), "StartFetch"), (fetched(1), "StartLoad"), (spoiled(1), "Tell"),
        (spoiled(1), ""),
    ],
    "a fault is told once, and the plan waits for the coordinator's word": [
        (order(1), "BeginPlan StartFetch"), (fetched(1), "StartLoad"), (ready(1), "Tell"), (lost(1), "Tell"),
        (lost(1), ""), (Unloaded(epoch=1), "HoldPlan"), (order(2), "BeginPlan StartFetch"),
    ],
    "a fetch that fails": [
        (order(1), "BeginPlan StartFetch"), (FetchFailed(epoch=1, error=StorageFull("full")), "StopFetch Tell"),
    ],
    "silence ends the plan, and what it leaves is kept for a while": [
        (order(1), "BeginPlan StartFetch"), (fetched(1), "StartLoad"), (ready(1), "Tell"), (Silent(), "HoldPlan"),
        (Silent(), ""), (WELCOME, ""), (order(1), ""), (lost(1), ""), (HoldOver(), "DropPlan"), (HoldOver(), ""),
        (order(2), "BeginPlan StartFetch"), (HoldOver(), ""),
    ],
    "a new plan comes while the last one's leavings are kept": [
        (order(1), "BeginPlan StartFetch"), (Silent(), "StopFetch HoldPlan"), (WELCOME, ""),
        (order(2), "BeginPlan StartFetch"), (HoldOver(), ""), (fetched(2), "StartLoad"),
    ],
    "a restarted coordinator counts anew": [
        (order(5), "BeginPlan StartFetch"), (Silent(), "StopFetch HoldPlan"),
        (Welcomed(worker=WorkerId("a"), term=2), ""), (order(1), "BeginPlan StartFetch"),
    ],
    "who has no part in a plan leaves at once": [(LeaveWanted(reason="SIGTERM"), "End"), (order(1), "")],
    "who has a part hands over before": [
        (order(1), "BeginPlan StartFetch"), (fetched(1), "StartLoad"), (ready(1), "Tell"),
        (LeaveWanted(reason="SIGTERM"), "AskToLeave"), (order(2), "BeginPlan StartFetch"), (fetched(2), "StartLoad"),
        (ready(2), "Tell"), (LetGo(reason="handed over"), "HoldPlan DropPlan End"), (LetGo(reason="late"), ""),
    ],
    "nobody hands over to a coordinator that is silent": [
        (order(1), "BeginPlan StartFetch"), (LeaveWanted(reason="SIGTERM"), "AskToLeave"),
        (Silent(), "StopFetch HoldPlan DropPlan End"),
    ],
    "a goodbye that was not asked for": [
        (order(1), "BeginPlan StartFetch"), (LetGo(reason="drained"), "StopFetch HoldPlan DropPlan End"),
    ],
    "the end": [
        (order(1), "BeginPlan StartFetch"), (StopAsked(reason="SIGTERM"), "StopFetch HoldPlan DropPlan End"),
        (order(2), ""), (StopAsked(reason="again"), ""),
    ],
}  # fmt: skip


@pytest.mark.parametrize("words", STORIES)
def test_stories(words: str) -> None:
    state = WorkerState()
    state.handle(WELCOME)
    for event, expected in STORIES[words]:
        assert [type(effect).__name__ for effect in state.handle(event)] == expected.split(), event


def test_a_coordinator_of_a_lower_term_is_not_obeyed() -> None:
    require_current(3, 3)
    require_current(4, 3)
    with pytest.raises(CoordinatorStale, match="term 2, and this worker has obeyed one of term 3"):
        require_current(2, 3)


def test_what_is_told() -> None:
    state = WorkerState()
    state.handle(WELCOME)
    state.handle(order(4))
    state.handle(fetched(4, 5))
    state.handle(spoiled(4))
    state.handle(fetched(4, 6))
    (tell,) = state.handle(ready(4))
    loaded = Loaded(
        epoch=4, weight_bytes=7, fetched_bytes=11, resident_bytes=8, load_s=0.5, knows_layers=True
    )  # fmt: skip
    assert tell == Tell(message=loaded)
    (told,) = state.handle(lost(4))
    assert isinstance(told, Tell)
    assert isinstance(told.message, Fault)
    assert (told.message.epoch, told.message.lost) == (4, "b")
    assert isinstance(told.message.error.error(), PeerLost)


class AnyOrder(RuleBasedStateMachine):
    """Whatever comes in whatever order: one fetch, one plan, nothing told of an epoch that is over."""

    def __init__(self) -> None:
        super().__init__()
        self.state = WorkerState()
        self.state.handle(WELCOME)
        self.begun: list[int] = []
        self.is_fetching = self.is_ended = self.is_held = False

    @rule(
        event=st.builds(
            lambda make, epoch: make(epoch),
            st.sampled_from(
                [
                    order,
                    ready,
                    fetched,
                    spoiled,
                    lost,
                    lambda epoch: Unloaded(epoch=epoch),
                    lambda epoch: FetchFailed(epoch=epoch, error=StorageFull("full")),
                    lambda epoch: Silent(),
                    lambda epoch: HoldOver(),
                    lambda epoch: LeaveWanted(reason="x"),
                ]
            ),
            st.integers(1, 6),
        )
    )
    def any_event(self, event: Any) -> None:
        self.follow(self.state.handle(event))

    @rule()
    def let_go(self) -> None:
        self.follow(self.state.handle(LetGo(reason="x")))

    @rule()
    def stop(self) -> None:
        self.follow(self.state.handle(StopAsked(reason="x")))

    def follow(self, effects: list[Effect]) -> None:
        assert not (self.is_ended and effects)
        for effect in effects:
            match effect:
                case BeginPlan(plan=plan):
                    assert not self.begun or plan.epoch > self.begun[-1]
                    self.begun.append(plan.epoch)
                    self.is_held = False
                case StartFetch(epoch=epoch):
                    assert epoch == self.begun[-1]
                    assert not self.is_fetching
                    self.is_fetching = True
                case StopFetch():
                    self.is_fetching = False
                case StartLoad(epoch=epoch):
                    assert epoch == self.begun[-1] == self.state.epoch
                    self.is_fetching = False
                case HoldPlan(epoch=epoch):
                    assert epoch == self.begun[-1]
                    self.is_held = True
                case DropPlan():
                    assert self.is_held
                    self.is_held = False
                case Tell(message=message):
                    assert message.epoch == self.begun[-1] == self.state.epoch
                case End():
                    self.is_ended = True

    @invariant()
    def phase_and_epoch_agree(self) -> None:
        is_idle = self.state.phase in (Phase.IDLE, Phase.HELD, Phase.ENDING)
        assert (self.state.epoch == 0) is is_idle
        assert self.is_held is (self.state.phase is Phase.HELD)
        assert (self.state.held_epoch != 0) is (not is_idle or self.is_held)
        assert not self.is_fetching or self.state.phase is Phase.FETCHING


AnyOrder.TestCase.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
TestAnyOrder = AnyOrder.TestCase

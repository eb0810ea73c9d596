"""The plan's life: forming, failing, pausing, and taking in newcomers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from core_cases import GB, faulted, heartbeat, joined, loaded, make_spec, progressed, reached, sent

from coordinator.deployment import EPOCHS_PER_TERM, Deployment
from coordinator.events import Effect, Phase, SendControl
from coordinator.memory import KvRoom, StepBounds
from coordinator.planner import PlanRequest
from coordinator.policy import ClusterPolicy
from coordinator.registry import Registry
from coordinator.replays import NOTHING, Remains, Repeated
from coordinator.shares import parse_words
from protocol.contract import SLACK_BYTES
from protocol.errors import DeadlineExceeded, ManyhandsError, PeerLost, PlanImpossible, StepFailed
from protocol.ids import SessionId, WorkerId
from protocol.messages import Carry, Goodbye, LinkMode, Load, Probe, Stock, Stocked, Unload
from protocol.plans import Plan
from protocol.specs import Span
from protocol.tiles import HEAD_KINDS, TileId, TileKind


class Service:
    """Sessions that are as idle as the test says."""

    def __init__(self) -> None:
        self.is_held = False
        self.is_idle = self.is_between_steps = True
        self.num_tokens_shown = self.num_open = 0
        self.causes: list[str] = []

    def prepare(self, plan: Plan, room: KvRoom) -> tuple[Carry, ...]:
        return ()

    def serve(self, plan: Plan, remains: Mapping[SessionId, Remains]) -> Repeated:
        self.is_held = False
        return NOTHING

    def interrupt(self, error: ManyhandsError, now: float) -> list[Effect]:
        self.causes.append(error.message)
        return []

    def rest(self, cause: str, now: float) -> None:
        self.causes.append(cause)


class Stand:
    """A deployment and its registry, driven by hand."""

    def __init__(self, policy: ClusterPolicy, *, layers: int = 4, term: int = 1) -> None:
        shares = None if policy.plan_words is None else parse_words(policy.plan_words)
        request = PlanRequest(
            spec=make_spec(layers=layers),
            shares=shares,
            head_only=policy.head_only,
            step=StepBounds(rows=16, sampled=4),
        )
        self.registry = Registry(policy.lease_s)
        self.service = Service()
        self.core = Deployment(request, policy, self.registry, self.service, term=term)
        self.now = 0.0

    def advance(self, seconds: float = 0.0) -> list[Effect]:
        self.now += seconds
        return self.core.advance(self.now)

    def join(self, *names: str, budget_bytes: int = GB) -> list[Effect]:
        effects: list[Effect] = []
        for name in names:
            self.registry.join(joined(name, budget_bytes=budget_bytes), self.now)
            effects += self.advance()
        return effects

    def lose(self, name: str) -> list[Effect]:
        self.registry.leave(WorkerId(name))
        effects = self.core.lost(WorkerId(name), PeerLost(f"{name} is gone", node=name), self.now)
        return effects + self.advance()

    def answer_probe(self, *pairs: tuple[str, str]) -> list[Effect]:
        """Every probed worker answers; `pairs` (from, to) are the links that work."""
        effects: list[Effect] = []
        for worker in list(self.core._reach.unanswered):
            event = reached(worker, self.core._reach.probe, *(to for start, to in pairs if start == worker))
            self.core.reached(event.worker, event.reached)
            effects += self.advance()
        return effects

    def load_all(self) -> list[Effect]:
        for worker in self.core._watch.awaited:
            event = loaded(worker, self.core.epoch)
            self.core.loaded(event.worker, event.loaded)
        return self.advance()

    def stocked(self, name: str, order: int, *, error: str = "") -> None:
        done = Stocked(order=order, done_bytes=1, total_bytes=1, is_over=True, error=error)
        self.core.stocked(WorkerId(name), done, self.now)

    def fault(self, name: str, *, lost: str = "", epoch: int | None = None) -> list[Effect]:
        event = faulted(name, self.core.epoch if epoch is None else epoch, lost=lost)
        return self.core.faulted(event.worker, event.fault, self.now)

    def make_ready(self, *names: str) -> Stand:
        self.join(*names)
        self.answer_probe()
        self.load_all()
        assert self.core.phase is Phase.READY
        return self


PAIR = ClusterPolicy(plan_words="1/1")
BARELY = SLACK_BYTES + 1_440_000


def test_an_explicit_plan_waits_for_all_its_workers() -> None:
    stand = Stand(PAIR)
    assert stand.advance() == []
    assert "trusted worker" in stand.core.detail
    assert stand.join("b") == []
    assert stand.core.phase is Phase.WAITING
    probes = sent(Probe, stand.join("head"))
    assert {worker: [peer.worker for peer in probe.peers] for worker, probe in probes.items()} == {
        "head": ["b"],
        "b": ["head"],
    }


def test_missing_workers_are_told_with_numbers() -> None:
    stand = Stand(ClusterPolicy(plan_words="1/1/1"))
    stand.join("head", "b")
    assert stand.core.detail == "waiting for 1 of 3 workers; here: head, b"


def test_from_probe_to_ready() -> None:
    stand = Stand(PAIR)
    stand.join("head", "b")
    effects = stand.answer_probe(("b", "head"))
    assert stand.core.phase is Phase.LOADING
    loads = sent(Load, effects)
    assert [order.mode for order in loads["b"].links] == [LinkMode.DIAL]
    assert [order.mode for order in loads["head"].links] == [LinkMode.LISTEN]
    assert all(control.tiles for control in effects if isinstance(control, SendControl))
    assert stand.core.epoch == EPOCHS_PER_TERM + 1 == loads["b"].plan.epoch
    assert stand.core.ready_plan is None
    stand.load_all()
    assert stand.core.ready_plan is loads["b"].plan


def test_a_lone_worker_needs_no_probe() -> None:
    stand = Stand(ClusterPolicy())
    assert set(sent(Load, stand.join("head"))) == {"head"}


def test_who_does_not_answer_the_probe_is_relayed() -> None:
    stand = Stand(PAIR)
    stand.join("head", "b")
    event = reached("b", stand.core._reach.probe)
    stand.core.reached(event.worker, event.reached)
    assert stand.advance(2.9) == []
    loads = sent(Load, stand.advance(0.1))
    assert {order.mode for load in loads.values() for order in load.links} == {LinkMode.RELAY}
    assert stand.core.link_mode(WorkerId("b"), WorkerId("head")) is LinkMode.RELAY
    assert stand.core.link_mode(WorkerId("b"), WorkerId("x")) is None


def test_an_answer_to_an_older_probe_is_ignored() -> None:
    stand = Stand(PAIR)
    stand.join("head", "b")
    event = reached("b", stand.core._reach.probe - 1, "head")
    stand.core.reached(event.worker, event.reached)
    assert stand.core._reach.unanswered == {"head", "b"}


def test_losing_a_worker_while_probing_starts_over_without_a_pause() -> None:
    stand = Stand(ClusterPolicy(workers=3))
    stand.join("head", "b", "c")
    assert stand.lose("b") == []
    assert stand.core.phase is Phase.WAITING
    assert set(sent(Probe, stand.join("d"))) == {"head", "c", "d"}


@pytest.mark.parametrize("stale", [0, EPOCHS_PER_TERM, EPOCHS_PER_TERM + 9])
def test_messages_of_another_epoch_change_nothing(stale: int) -> None:
    stand = Stand(PAIR)
    stand.join("head", "b")
    stand.answer_probe()
    for name in ("head", "b"):
        event = loaded(name, stale)
        stand.core.loaded(event.worker, event.loaded)
        progress = progressed(name, stale, 500)
        stand.core.progressed(progress.worker, progress.progress, stand.now)
    assert stand.core.progress_text().startswith("0 bytes")
    assert stand.fault("b", epoch=stale) == []
    assert stand.core.phase is Phase.LOADING


# ---------------------------------------------------------------- failures


def test_a_fault_unloads_all_and_pauses_twice_as_long_each_time() -> None:
    stand = Stand(PAIR).make_ready("head", "b")
    for pause_s in (1, 2, 4, 8, 16, 30, 30):
        epoch = stand.core.epoch
        effects = stand.fault("b")
        assert {worker: unload.epoch for worker, unload in sent(Unload, effects).items()} == {
            "head": epoch,
            "b": epoch,
        }
        assert isinstance(stand.core.error, StepFailed)
        assert stand.core.error.node == "b"
        assert f"pausing {pause_s} s" in stand.core.detail
        assert stand.advance(pause_s - 0.1) == []
        assert set(sent(Load, stand.advance(0.1))) == {"head", "b"}  # their links are known
        stand.load_all()
        assert stand.core.epoch == epoch + 1


def test_a_step_that_succeeds_ends_the_long_pauses() -> None:
    stand = Stand(PAIR).make_ready("head", "b")
    for _ in range(3):
        stand.fault("b")
        stand.advance(30.0)
        stand.answer_probe()
        stand.load_all()
    stand.core.succeeded(stand.now, has_token=True)
    stand.fault("b")
    assert "pausing 1 s" in stand.core.detail


def test_a_broken_link_names_the_neighbour() -> None:
    stand = Stand(PAIR).make_ready("head", "b")
    stand.fault("head", lost="b")
    assert isinstance(stand.core.error, PeerLost)
    assert stand.core.error.node == "b"


def test_loading_fails_only_without_progress() -> None:
    stand = Stand(PAIR)
    stand.join("head", "b")
    stand.answer_probe()
    event = loaded("head", stand.core.epoch)
    stand.core.loaded(event.worker, event.loaded)
    for done_bytes in (100, 200):
        progress = progressed("b", stand.core.epoch, done_bytes)
        assert stand.advance(59.0) == []
        stand.core.progressed(progress.worker, progress.progress, stand.now)
    assert "200 bytes of 1.0 kB, waiting for b" in stand.core.progress_text()
    repeated = progressed("b", stand.core.epoch, 200)
    stand.advance(59.0)
    stand.core.progressed(repeated.worker, repeated.progress, stand.now)
    assert set(sent(Unload, stand.advance(1.0))) == {"head", "b"}
    assert isinstance(stand.core.error, DeadlineExceeded)
    assert stand.core.error.node == "b"


def test_a_lost_worker_is_answered_at_once_by_a_plan_for_those_who_are_left() -> None:
    stand = Stand(PAIR).make_ready("head", "b")
    (load,) = sent(Load, stand.lose("b")).values()
    assert (load.plan.words, load.plan.workers) == ("1", ("head",))
    assert stand.core.ready_plan is None
    assert stand.service.causes == ["b is gone"]
    stand.load_all()
    assert stand.core.phase is Phase.READY
    assert stand.core.detail == "some seats of plan 1/1 are empty"


def test_who_comes_back_takes_its_seat_again() -> None:
    """Also while sessions run: its tiles are fetched beside them, and the plan changes between two steps."""
    stand = Stand(ClusterPolicy(plan_words="1,1/1")).make_ready("head", "b", "c")
    stand.lose("b")
    stand.load_all()
    assert stand.core.plan is not None
    assert stand.core.plan.words == "1/1"
    stand.service.is_idle = stand.service.is_between_steps = False
    assert set(sent(Probe, stand.join("b"))) == {"head", "b", "c"}
    effects = stand.answer_probe(("b", "head"))
    assert stand.service.is_held  # its disk has the tiles from before, so there is nothing to fetch
    assert sent(Load, effects) == {}
    stand.service.is_between_steps = True
    loads = sent(Load, stand.advance())
    assert set(loads) == {"head", "b", "c"}
    assert loads["b"].plan.words == "1,1/1"
    assert [share.worker for stage in loads["b"].plan.stages for share in stage.members] == ["head", "b", "c"]


def test_who_comes_while_a_change_is_prepared_is_taken_in_by_the_next() -> None:
    stand = Stand(ClusterPolicy(plan_words="1/1/1")).make_ready("head", "b", "c")
    stand.lose("b")
    stand.load_all()
    stand.lose("c")
    stand.load_all()
    assert set(sent(Probe, stand.join("b"))) == {"head", "b"}
    assert stand.join("c") == []
    for wanted in ({"head", "b"}, {"head", "b", "c"}):
        effects = stand.answer_probe()
        for name, stock in sent(Stock, effects).items():
            stand.stocked(name, stock.order)
        assert set(sent(Load, effects + stand.advance())) == wanted
        stand.load_all()
        stand.advance()
    assert stand.core.detail == ""


def test_a_newcomer_fetches_its_tiles_before_anybody_pauses() -> None:
    stand = Stand(PAIR).make_ready("head", "b")
    stand.lose("b")
    stand.load_all()
    stand.service.is_idle = False
    stand.join("d")
    stocks = sent(Stock, stand.answer_probe())
    assert set(stocks) == {"d"}
    assert not stand.service.is_held
    stand.stocked("d", stocks["d"].order)
    assert set(sent(Load, stand.advance())) == {"head", "d"}


def test_a_newcomer_that_can_not_fetch_changes_nothing() -> None:
    stand = Stand(PAIR).make_ready("head", "b")
    stand.lose("b")
    stand.load_all()
    stand.service.is_idle = False
    stand.join("d")
    stocks = sent(Stock, stand.answer_probe())
    stand.stocked("d", stocks["d"].order, error="its disk is full")
    assert sent(Load, stand.advance()) == {}
    assert not stand.service.is_held
    assert stand.core.phase is Phase.READY


def test_a_newcomer_takes_the_seat_of_the_lost_one() -> None:
    stand = Stand(ClusterPolicy(plan_words="1/1/1")).make_ready("head", "b", "c")
    stand.join("spare")
    effects = stand.lose("b")
    assert set(sent(Probe, effects)) == {"head", "spare", "c"}
    stand.answer_probe()
    plan = stand.core.plan
    assert plan is not None
    assert [stage.hub_worker for stage in plan.stages] == ["head", "spare", "c"]


def test_a_spare_that_leaves_disturbs_nobody() -> None:
    stand = Stand(PAIR).make_ready("head", "b")
    stand.join("spare")
    assert stand.lose("spare") == []
    assert stand.core.phase is Phase.READY


def test_of_two_who_could_take_a_seat_the_one_with_tiles_does() -> None:
    stand = Stand(PAIR).make_ready("head", "b")
    stand.join("c", "d")
    stand.core._registry.note_tiles(WorkerId("d"), [TileId(0, TileKind.FFN, 0)])
    assert set(sent(Probe, stand.lose("b"))) == {"head", "d"}


# ---------------------------------------------------------------- leaving


def leave(stand: Stand, name: str, *, own_wish: bool = True) -> list[Effect]:
    assert stand.registry.mark_leaving(WorkerId(name), own_wish=own_wish) is not None
    return stand.advance()


def test_a_worker_that_leaves_hands_over_between_two_steps_and_is_let_go() -> None:
    stand = Stand(PAIR).make_ready("head", "b")
    stand.service.is_idle = stand.service.is_between_steps = False
    stocks = sent(Stock, leave(stand, "b"))
    assert set(stocks) == {"head"}  # it has to have b's tiles first
    stand.stocked("head", stocks["head"].order)
    assert stand.advance() == []
    assert stand.service.is_held
    stand.service.is_between_steps = True
    assert set(sent(Load, stand.advance())) == {"head"}
    assert stand.service.causes == ["b hands over"]
    effects = stand.load_all()
    assert stand.core.phase is Phase.READY
    assert set(sent(Goodbye, [*effects, *stand.advance()])) == {"b"}
    assert sent(Goodbye, stand.advance()) == {}


def test_a_worker_that_nobody_needs_is_let_go_at_once() -> None:
    stand = Stand(PAIR).make_ready("head", "b")
    stand.join("c")
    assert set(sent(Goodbye, leave(stand, "c"))) == {"c"}


def test_the_only_head_is_let_go_at_once() -> None:
    stand = Stand(PAIR).make_ready("head", "b")
    assert set(sent(Goodbye, leave(stand, "head"))) == {"head"}


@pytest.mark.parametrize("own_wish", [True, False])
def test_who_can_not_be_spared_goes_only_by_its_own_wish(own_wish: bool) -> None:
    stand = Stand(ClusterPolicy(plan_words="1/30"), layers=31)
    stand.join("head", budget_bytes=BARELY)
    stand.join("b")
    stand.answer_probe()
    stand.load_all()
    effects = leave(stand, "b", own_wish=own_wish)
    assert set(sent(Goodbye, effects)) == ({"b"} if own_wish else set())
    assert stand.core.phase is Phase.READY
    assert "b can't be spared" in stand.core.story.happenings[-1].text
    member = stand.registry.get(WorkerId("b"))
    assert member is not None
    assert member.is_leaving == own_wish


def test_an_owner_that_pauses_its_worker_is_obeyed_whatever_it_costs() -> None:
    stand = Stand(PAIR).make_ready("head", "b")
    beat = heartbeat("b").heartbeat
    assert beat is not None
    stand.registry.heard(WorkerId("b"), replace(beat, paused="on battery"), 1.0)
    stocks = sent(Stock, stand.advance())
    stand.stocked("head", stocks["head"].order)
    assert set(sent(Load, stand.advance())) == {"head"}
    stand.load_all()
    stand.registry.heard(WorkerId("b"), beat, 2.0)
    assert set(sent(Load, stand.advance())) == {"head", "b"}  # its tiles and its links are known


# ---------------------------------------------------------------- ready for a loss


def test_spares_are_what_a_loss_would_need_elsewhere() -> None:
    stand = Stand(ClusterPolicy(plan_words="1/1/1", spares=1))
    stand.join("head", "b", "c")
    stand.answer_probe()
    tiles = {effect.worker: effect.tiles for effect in stand.load_all() if isinstance(effect, SendControl)}
    plan = stand.core.plan
    assert plan is not None
    assert set(tiles) <= set(plan.workers)
    for worker, wanted in tiles.items():
        assert wanted
        assert not set(wanted) & set(plan.tiles_of(worker))
    assert not any(tile.kind in HEAD_KINDS for wanted in tiles.values() for tile in wanted or ())
    assert any("spare tiles" in one.text for one in stand.core.story.happenings)
    lost = sent(Load, stand.lose("c"))
    for worker, load in lost.items():
        assert set(load.plan.tiles_of(WorkerId(worker))) <= {
            *plan.tiles_of(WorkerId(worker)),
            *(tiles.get(WorkerId(worker)) or ()),
        }


def test_copies_go_to_who_would_take_over() -> None:
    stand = Stand(ClusterPolicy(plan_words="1/1/1", replicate_kv=True))
    stand.join("head", "b", "c")
    loads = sent(Load, stand.answer_probe())
    (mirror,) = loads["c"].mirrors
    assert (mirror.peer, mirror.cells.groups) == ("b", Span(0, 2))
    assert any(order.peer.worker == "c" for order in loads["b"].links)
    assert loads["head"].mirrors == ()  # without the head nothing goes on anyway


# ---------------------------------------------------------------- automatic


def test_an_automatic_plan_goes_on_over_who_is_left() -> None:
    stand = Stand(ClusterPolicy(workers=3)).make_ready("head", "b", "c")
    assert set(sent(Load, stand.lose("c"))) == {"head", "b"}  # how these two reach each other is known
    stand.load_all()
    assert set(sent(Load, stand.lose("b"))) == {"head"}
    stand.load_all()
    stand.lose("head")
    assert "trusted worker" in stand.core.detail


def test_newcomers_enter_when_no_session_runs() -> None:
    stand = Stand(ClusterPolicy()).make_ready("head")
    stand.service.is_idle = False
    assert stand.join("b") == []
    stand.service.is_idle = True
    assert set(sent(Probe, stand.advance())) == {"head", "b"}
    stocks = sent(Stock, stand.answer_probe())
    assert set(stocks) == {"b"}
    stand.stocked("b", stocks["b"].order)
    assert set(sent(Load, stand.advance())) == {"head", "b"}


def test_a_newcomer_that_can_not_help_changes_nothing() -> None:
    stand = Stand(ClusterPolicy()).make_ready("head")
    assert stand.join("tiny", budget_bytes=10) == []
    assert stand.advance(1.0) == []
    assert stand.core.phase is Phase.READY


def test_an_impossible_plan_is_told_and_tried_again_with_new_members() -> None:
    stand = Stand(ClusterPolicy())
    stand.join("head", budget_bytes=10)
    assert isinstance(stand.core.error, PlanImpossible)
    assert "are missing" in stand.core.detail
    assert stand.advance(100.0) == []
    stand.registry.leave(WorkerId("head"))
    assert sent(Load, stand.join("head"))


def test_stopping_unloads_and_never_forms_again() -> None:
    stand = Stand(PAIR).make_ready("head", "b")
    assert set(sent(Unload, stand.core.stop())) == {"head", "b"}
    assert stand.join("c") == []
    assert stand.core.detail == "stopping"


def test_a_later_term_has_greater_epochs() -> None:
    early, late = Stand(ClusterPolicy(), term=3).make_ready("head"), Stand(ClusterPolicy(), term=4).make_ready("head")
    for _ in range(10):
        early.fault("head")
        early.advance(30.0)
        early.load_all()
    assert late.core.epoch > early.core.epoch


def test_a_worker_that_wants_to_leave_is_not_let_go_between_two_plans() -> None:
    stand = Stand(ClusterPolicy(plan_words="1/1/1")).make_ready("head", "b", "c")
    stand.fault("head", lost="c")
    assert stand.core.phase is Phase.WAITING
    assert sent(Goodbye, leave(stand, "b")) == {}  # it has keys and values to give


def test_the_only_head_is_kept_when_others_want_it_to_leave() -> None:
    stand = Stand(PAIR).make_ready("head", "b")
    assert sent(Goodbye, leave(stand, "head", own_wish=False)) == {}
    assert "head can't be spared" in stand.core.story.happenings[-1].text
    head = stand.registry.head
    assert head is not None
    assert not head.is_leaving


def test_a_change_is_given_up_when_somebody_wants_to_leave_who_was_to_take_part() -> None:
    stand = Stand(ClusterPolicy()).make_ready("head")
    stand.service.is_between_steps = False
    stand.join("b")
    stand.answer_probe()
    assert stand.core.detail.startswith("a worker joined")
    leave(stand, "b")
    assert not stand.core.detail.startswith("a worker joined")

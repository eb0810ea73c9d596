"""A seeded world in virtual time around the coordinator's core: workers and coordinators that die, freeze, are cut off,
come back and contradict each other; messages that are late, lost or doubled; clients that change their minds.

One `random.Random` drives it all: the same seed gives the same trace. A `Referee` checks every effect of every core,
the workers check what they are asked to do, and `World.check` looks at what is left in the end.
"""

from __future__ import annotations

import heapq
import itertools
import random

from core_cases import arrived

from coordinator.events import Effect, Event, RequestCancelled, SessionEnded, SessionFailed
from coordinator.policy import ClusterPolicy
from protocol.errors import Overloaded
from protocol.ids import SessionId, WorkerId
from world.books import Journal, Request
from world.chaos import Chaos
from world.coordinator import SimCoordinator
from world.model import VOCAB
from world.network import Network
from world.node import Action
from world.scenario import Scenario, scenario_of
from world.worker import SimWorker

CHAOS_S, SETTLE_S = 20.0, 5.0
MOST_S = 350.0  # by then all must be answered, one after the other where only one may run
LATE_QUESTIONS = (1001, 1002)


class World:
    """Virtual time, the network, the coordinators, the workers and the clients."""

    def __init__(self, seed: int, scenario: Scenario | None = None) -> None:
        self.dice = random.Random(seed)
        self.now = 0.0
        self.scenario = scenario or scenario_of(self.dice)
        self.is_chaos = True
        self.trace: list[tuple[float, str, object]] = []
        self.network = Network(self, self.dice, loss=self.scenario.loss, doubling=self.scenario.doubling)
        self.coordinators = [SimCoordinator(self, "coordinator1", Journal())]
        names, budgets = self.scenario.workers, self.scenario.budgets
        self.workers = {
            WorkerId(name): SimWorker(self, name, budget) for name, budget in zip(names, budgets, strict=True)
        }
        self.never_released: set[tuple[WorkerId, SessionId]] = set()  # a Release was lost on its way
        self.seen: dict[SessionId, list[int]] = {}  # by clients, whoever told them
        self._highest: dict[WorkerId, int] = {}
        self._dials: dict[tuple[str, str], bool] = {}
        self._heap: list[tuple[float, int, Action]] = []
        self._order = itertools.count()

    # ------------------------------------------------------------ what its parts ask

    @property
    def policy(self) -> ClusterPolicy:
        return self.scenario.policy

    @property
    def primary(self) -> SimCoordinator:
        """The coordinator that started last; clients ask this one."""
        return self.coordinators[-1]

    def after(self, delay_s: float, action: Action) -> None:
        heapq.heappush(self._heap, (self.now + delay_s, next(self._order), action))

    def chance(self, probability: float) -> bool:
        """Bad luck, which ends with the chaos."""
        return self.is_chaos and probability > 0.0 and self.dice.random() < probability

    def note(self, who: str, what: Event | Effect | str) -> None:
        self.trace.append((self.now, who, what))

    def can_dial(self, worker: str, peer: str) -> bool:
        if (worker, peer) not in self._dials:
            self._dials[worker, peer] = self.dice.random() < 0.7
        return self._dials[worker, peer] and self.workers[WorkerId(peer)].is_alive and self.network.passes(worker, peer)

    def are_linked(self, worker: str, peer: str, epoch: int) -> bool:
        """Say whether the link between two workers is complete: both follow the epoch and frames pass."""
        other = self.workers[WorkerId(peer)]
        is_there = other.is_alive and not other.is_frozen
        follows = other.compute.epoch == epoch and not other.compute.has_failed
        return is_there and follows and self.network.passes(worker, peer)

    def coordinator_for(self, worker: str) -> SimCoordinator | None:
        """Return whom a worker reaches when it dials: mostly the latest coordinator."""
        able = [one for one in self.coordinators if one.is_alive and self.network.passes(worker, one.name)]
        if not able:
            return None
        return able[-1] if self.dice.random() < 0.7 else self.dice.choice(able)

    def obeyed(self, worker: WorkerId, epoch: int) -> None:
        """A worker obeys a plan: never an older one than any that it, or an earlier process of it, obeyed before."""
        assert epoch > self._highest.get(worker, 0), f"{worker} obeys {epoch} after {self._highest[worker]}"
        self._highest[worker] = epoch

    def show(self, session: SessionId, answer: list[int]) -> None:
        """A client gets what it has not seen of an answer; what it has seen stays as it is, whoever tells it."""
        seen = self.seen.setdefault(session, [])
        both = min(len(seen), len(answer))
        assert seen[:both] == answer[:both]
        seen += answer[both:]

    # ------------------------------------------------------------ faults

    def come_back(self, worker: SimWorker) -> None:
        self.after(self.dice.uniform(0.1, 12), worker.start)

    def crash_coordinator(self, coordinator: SimCoordinator) -> None:
        """Kill a coordinator; whoever is the latest is started again on what it had written."""
        if coordinator.is_alive:
            coordinator.die()
            self.note("chaos", f"{coordinator.name} dies")
            self.after(self.dice.uniform(0.1, 6), lambda: self._restart(coordinator))

    def _restart(self, coordinator: SimCoordinator) -> None:
        if coordinator is self.primary and not coordinator.is_alive:
            self.note("chaos", f"{coordinator.name} starts again")
            coordinator.start()

    def usurp(self) -> None:
        """Start another coordinator beside the one that is."""
        journal = self.primary.journal.copied()
        self.coordinators.append(SimCoordinator(self, f"coordinator{len(self.coordinators) + 1}", journal))
        self.primary.start()

    # ------------------------------------------------------------ from the beginning to the end

    def run(self) -> None:
        """Let the world run until all is quiet, or for too long."""
        self.primary.start()
        for worker in self.workers.values():
            self.after(self.dice.uniform(0, 3), worker.start)
        for number in range(self.scenario.num_requests):
            self.after(self.dice.uniform(0, CHAOS_S), lambda number=number: self.ask(number))  # type: ignore[misc]
        Chaos(self, self.scenario, self.dice).begin()
        self.after(CHAOS_S, self._calm_down)
        while self.now < MOST_S and (self.is_chaos or not (self._are_late_asked and self.primary.is_quiet)):
            self.now, _, action = heapq.heappop(self._heap)
            action()

    @property
    def _are_late_asked(self) -> bool:
        return self.primary.is_alive and self.primary.knows(SessionId(LATE_QUESTIONS[-1]))

    def _calm_down(self) -> None:
        """End all faults: what is frozen thaws, what is dead starts again, and one coordinator remains."""
        self.is_chaos = False
        self.note("chaos", "is over")
        self.network.heal()
        for coordinator in self.coordinators[:-1]:
            coordinator.die()
        self._restart(self.primary)
        self.primary.thaw(self.primary.life)
        for worker in self.workers.values():
            worker.thaw(worker.life)
            worker.paused = ""
            worker.start()
        self.after(SETTLE_S, self._ask_late_questions)

    def _ask_late_questions(self) -> None:
        """When all has settled: these must be answered."""
        if not self.primary.is_quiet:
            self.after(0.5, self._ask_late_questions)
            return
        for number in LATE_QUESTIONS:
            self.ask(number)

    def ask(self, number: int) -> None:
        """A client asks the latest coordinator; while nobody is there it tries again."""
        dice, session, coordinator = self.dice, SessionId(number), self.primary
        if coordinator.knows(session):
            return
        if not coordinator.is_alive or coordinator.is_frozen:
            self.after(0.5, lambda: self.ask(number))
            return
        prompt = [dice.randrange(VOCAB) for _ in range(dice.randint(1, 80))]
        stop = frozenset(dice.sample(range(VOCAB), 2))
        request = Request(prompt, dice.randint(1, 40), stop, arrived_at=self.now)
        coordinator.journal.requests[session] = request
        coordinator.tell(arrived(number, prompt, max_tokens=request.max_tokens, stop_tokens=stop))
        if self.chance(self.scenario.cancels):
            self.after(dice.uniform(0, 3), lambda: self._cancel(session))

    def _cancel(self, session: SessionId) -> None:
        if self.primary.is_alive and not self.primary.is_frozen:
            self.primary.tell(RequestCancelled(session=session))

    def check(self) -> None:
        """What must hold at the end: nothing hangs, the cluster serves, and nothing is left of what is over."""
        primary = self.primary
        requests = primary.journal.requests
        hanging = [number for number, request in requests.items() if request.end is None]
        assert not hanging, f"sessions {hanging} hang: {primary.core._deployment.detail}"
        assert primary.is_alive
        assert primary.is_quiet, primary.core._deployment.detail
        for number in LATE_QUESTIONS:
            request = requests[SessionId(number)]
            assert isinstance(request.end, SessionEnded), request.end
            assert request.answer == request.whole
        if self.scenario.is_calm:
            self._check_that_all_went_well()
        self._check_leaks()

    def _check_that_all_went_well(self) -> None:
        """Where nothing went wrong, only what was refused fails, and what can't be computed."""
        for number, request in self.primary.journal.requests.items():
            if isinstance(request.end, SessionFailed) and number != self.scenario.poison:
                assert isinstance(request.end.error, Overloaded), f"{number}: {request.end.error}"

    def _check_leaks(self) -> None:
        """No worker of the plan holds anything of a session that is over, but what the last Releases are about."""
        plan = self.primary.core.plan
        assert plan is not None
        on_their_way = set(map(SessionId, LATE_QUESTIONS))
        for name in plan.workers:
            worker = self.workers[name]
            assert worker.compute.epoch == plan.epoch
            lost = {session for of, session in self.never_released if of == name}
            left = worker.compute.shelf.sessions - on_their_way - lost
            assert not left, f"{name} still holds something of {sorted(left)}"


def run_world(seed: int) -> World:
    """Run one world to its end and check what must hold then."""
    world = World(seed)
    world.run()
    world.check()
    return world

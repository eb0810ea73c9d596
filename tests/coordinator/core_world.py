"""A seeded world in virtual time around the coordinator's core: workers that die, freeze, fail and come back, messages
that are late, lost or doubled, clients that change their minds. A `Referee` checks every effect.

One `random.Random` drives it all: the same seed gives the same trace.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

from core_cases import arrived, done, faulted, heartbeat, joined, loaded, progressed, reached
from core_referee import SPEC, VOCAB, FoldedLog, Referee, Request

from coordinator.events import (
    DisconnectWorker,
    Event,
    Phase,
    RequestCancelled,
    SendControl,
    SendStep,
    SessionEnded,
    StepFinished,
    Tick,
    TilesStocked,
    WorkerGone,
    WorkerLoaded,
    token_ids,
)
from coordinator.policy import ClusterPolicy
from coordinator.state import ClusterState
from protocol.contract import SLACK_BYTES
from protocol.errors import ManyhandsError
from protocol.ids import SessionId, WorkerId
from protocol.messages import Carry, HeartbeatReply, Load, Probe, Release, Step, Stock, Stocked, Unload

CHAOS_S, SETTLE_S = 20.0, 5.0
MOST_S = 200.0  # by then all must be answered
LATE_QUESTIONS = (1001, 1002)
BUDGET = SLACK_BYTES + 1_440_000  # one worker alone has room for a few sessions only


def policy_of(dice: random.Random) -> ClusterPolicy:
    """One of the ways to run a cluster of a head and three workers, with short deadlines."""
    words, workers, head_only = dice.choice(
        [("1", 1, False), ("1/1", 1, False), ("1,1/1", 1, False), ("1/1", 1, True), (None, 1, False), (None, 3, False)]
    )
    return ClusterPolicy(
        plan_words=words,
        workers=workers,
        head_only=head_only,
        load_timeout_s=5.0,
        step_timeout_s=5.0,
        form_timeout_s=20.0,
        retry_most_s=4.0,
        max_sessions=dice.choice([1, 3, 8]),
        max_waiting=dice.choice([2, 20]),
        prefill_chunk=dice.choice([4, 16]),
    )


class World:
    """Virtual time, the network, the workers and the clients."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.now = 0.0
        self.policy = policy_of(self.dice)
        self.core = ClusterState(SPEC, self.policy, term=1)
        self.referee = Referee(self.core, self.policy)
        self.is_chaos = True
        self.trace: list[tuple[float, str]] = []
        self.workers = {WorkerId(name): SimWorker(self, name) for name in ("head", "a", "b", "c")}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._arrivals: dict[tuple[str, str], float] = {}

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + delay_s, next(self._order), action))

    def chance(self, probability: float) -> bool:
        """Bad luck, which ends with the chaos."""
        return self.is_chaos and self.dice.random() < probability

    def run(self) -> None:
        for worker in self.workers.values():
            self.after(self.dice.uniform(0, 3), worker.start)
        for number in range(self.dice.randint(1, 25)):
            self.after(self.dice.uniform(0, CHAOS_S), lambda number=number: self.ask(number))  # type: ignore[misc]
        self.after(CHAOS_S, self._calm_down)
        self._tick()
        while self.now < MOST_S and not (self._is_quiet and self._are_late_asked):
            self.now, _, action = heapq.heappop(self._heap)
            action()

    @property
    def _are_late_asked(self) -> bool:
        return all(SessionId(number) in self.referee.requests for number in LATE_QUESTIONS)

    @property
    def _is_quiet(self) -> bool:
        return self.core._deployment.phase is Phase.READY and self.core._sessions.is_idle

    def _calm_down(self) -> None:
        self.is_chaos = False
        for worker in self.workers.values():
            if not worker.is_alive:
                worker.start()
        self.after(SETTLE_S, self._ask_late_questions)

    def _ask_late_questions(self) -> None:
        """When all has settled: these must be answered."""
        if not self._is_quiet:
            self.after(0.5, self._ask_late_questions)
            return
        for number in LATE_QUESTIONS:
            self.ask(number)

    def _tick(self) -> None:
        self.tell(Tick())
        self.referee.check_leases(self.now)
        self.after(0.2, self._tick)

    def ask(self, number: int) -> None:
        dice, session = self.dice, SessionId(number)
        prompt = [dice.randrange(VOCAB) for _ in range(dice.randint(1, 80))]
        stop = frozenset(dice.sample(range(VOCAB), 2))
        request = Request(prompt, dice.randint(1, 40), stop)
        self.referee.requests[session] = request
        self.tell(arrived(number, prompt, max_tokens=request.max_tokens, stop_tokens=stop))
        if self.chance(0.3):
            self.after(dice.uniform(0, 3), lambda: self.tell(RequestCancelled(session=session)))

    def tell(self, event: Event) -> None:
        """Hand an event to the core, check its effects and carry them out."""
        if isinstance(event, StepFinished):
            self.referee.flying.pop(event.done.step, None)
        if isinstance(event, WorkerLoaded) and event.loaded.epoch == self.referee.epoch:
            held = {one.session: one.positions for one in event.loaded.held}
            self.referee.claims.setdefault(event.worker, held)
        effects = self.core.handle(event, self.now)
        self.trace.append((self.now, type(event).__name__))
        self.trace += [(self.now, type(effect).__name__) for effect in effects]
        self.referee.check(effects)
        for effect in effects:
            match effect:
                case SendControl():
                    self._to_worker(effect.worker, "control", effect.message)
                case DisconnectWorker():
                    self._to_worker(effect.worker, "control", effect.error)
                case SendStep():
                    self._to_worker(effect.worker, "data", effect.step, token_ids(effect.tokens).tolist())
                case _:
                    pass

    def _to_worker(self, name: WorkerId, channel: str, message: object, tokens: list[int] | None = None) -> None:
        worker = self.workers[name]
        self.send(name, channel, lambda: worker.receive(message, tokens or []))

    def from_worker(self, name: str, event: Event) -> None:
        for _ in range(2 if self.chance(0.03) else 1):
            self.send(name, "up", lambda: self.tell(event))

    def send(self, name: str, channel: str, deliver: Callable[[], None]) -> None:
        """Deliver late but in order, or, rarely, not at all."""
        if self.chance(0.004):
            return
        way = (name, channel)
        at = max(self._arrivals.get(way, 0.0), self.now + self.dice.uniform(0.001, 0.08))
        self._arrivals[way] = at
        self.after(at - self.now, deliver)


class SimWorker:
    """A worker as the core sees it. It follows the newest epoch and computes with `FoldedLog`."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.life = 0
        self.is_alive = self.is_frozen = False
        self.epoch = 0
        self.is_loaded = False
        self.logs: dict[SessionId, FoldedLog] = {}
        self.carries: tuple[Carry, ...] = ()
        self.heard_at = 0.0
        self.sequence = 0

    def start(self) -> None:
        if self.is_alive:
            return
        self.life += 1
        self.is_alive, self.is_frozen = True, False
        self._say_hello()
        self._beat(self.life)

    def _say_hello(self) -> None:
        self.epoch, self.is_loaded, self.logs = 0, False, {}
        self.heard_at = self.world.now
        self.world.from_worker(self.name, joined(self.name, budget_bytes=BUDGET))

    def _beat(self, life: int) -> None:
        if life != self.life or not self.is_alive:
            return
        world = self.world
        if self.is_frozen:
            self.is_frozen = not world.is_chaos or world.dice.random() < 0.8
            self.is_frozen = self.is_frozen and world.is_chaos
        elif world.now - self.heard_at > world.policy.lease_s:
            self._say_hello()
        else:
            self.sequence += 1
            world.from_worker(self.name, heartbeat(self.name, self.sequence))
        if world.chance(0.012):
            self.is_frozen = True
        elif world.chance(0.012):
            self._die()
            return
        world.after(0.5, lambda: self._beat(life))

    def _die(self) -> None:
        self.is_alive = False
        world = self.world
        if world.dice.random() < 0.3:
            world.from_worker(self.name, WorkerGone(worker=WorkerId(self.name), reason="told to"))
        for neighbour in world.workers.values():
            if neighbour.is_alive and neighbour.epoch == self.epoch != 0 and world.dice.random() < 0.5:
                world.from_worker(neighbour.name, faulted(neighbour.name, self.epoch, lost=self.name))
        world.after(world.dice.uniform(0.1, 12), self.start)

    def receive(self, message: object, tokens: list[int]) -> None:
        if not self.is_alive or self.is_frozen:
            return
        self.heard_at = self.world.now
        match message:
            case Probe():
                peers = [peer.worker for peer in message.peers if self.world.dice.random() < 0.7]
                self._later(0.3, lambda: reached(self.name, message.probe, *peers))
            case Load() if message.plan.epoch > self.epoch:
                self.epoch, self.is_loaded, self.logs = message.plan.epoch, False, {}
                self.carries = message.carries
                self._load(message.plan.epoch, left=self.world.dice.randint(1, 4))
            case Stock():
                stocked = Stocked(order=message.order, done_bytes=1, total_bytes=1, is_over=True)
                self._later(1.0, lambda: TilesStocked(worker=WorkerId(self.name), stocked=stocked))
            case Unload() if message.epoch == self.epoch:
                self.is_loaded, self.logs = False, {}
            case Release():
                for session in message.sessions:
                    self.logs.pop(session, None)
            case Step():
                self._compute(message, tokens)
            case ManyhandsError():
                self._say_hello()
            case HeartbeatReply() | _:
                pass

    def _later(self, most_s: float, make: Callable[[], Event | None]) -> None:
        life, epoch = self.life, self.epoch

        def act() -> None:
            if self.is_alive and not self.is_frozen and (self.life, self.epoch) == (life, epoch):
                event = make()
                if event is not None:
                    self.world.from_worker(self.name, event)

        self.world.after(self.world.dice.uniform(0.001, most_s), act)

    def _load(self, epoch: int, *, left: int) -> None:
        def go_on() -> Event | None:
            if self.world.chance(0.02):
                return None  # hangs
            if self.world.chance(0.03):
                return faulted(self.name, epoch)
            if left:
                self._load(epoch, left=left - 1)
                return progressed(self.name, epoch, 100 - left)
            self.is_loaded = True
            return loaded(self.name, epoch, self._claims())

        self._later(1.0, go_on)

    def _claims(self) -> dict[SessionId, int]:
        """What is left of each carried session here: mostly all, sometimes less or nothing."""
        dice = self.world.dice
        kept = [carry for carry in self.carries if dice.random() < 0.8]
        return {one.session: one.computed if dice.random() < 0.7 else dice.randint(0, one.computed) for one in kept}

    def _compute(self, step: Step, tokens: list[int]) -> None:
        if step.epoch != self.epoch or not self.is_loaded:
            return
        answer = []
        for new in step.opens:
            self.logs[new.session] = log = FoldedLog()
            log.extend(tokens[: new.history])
            tokens = tokens[new.history :]
        for part in step.rows:
            log = self.logs.setdefault(part.session, FoldedLog())
            if log.length != part.start:  # an earlier step was lost on its way
                self.world.from_worker(self.name, faulted(self.name, self.epoch, code="session-lost"))
                return
            log.extend(tokens[: part.count])
            tokens = tokens[part.count :]
            if part.sample:
                answer.append(log.next_token)
        if self.world.chance(0.003):
            self.world.from_worker(self.name, faulted(self.name, self.epoch))
            return
        self._later(0.06, lambda: StepFinished(worker=WorkerId(self.name), done=done(step, *answer)))


def run_world(seed: int) -> World:
    """Run one world to its end and check what must hold then: nothing hangs, and the cluster serves again."""
    world = World(seed)
    world.run()
    requests = world.referee.requests
    assert all(request.end is not None for request in requests.values())
    assert world.core._deployment.phase is Phase.READY
    assert world.core._sessions.is_idle
    for number in LATE_QUESTIONS:
        end = requests[SessionId(number)].end
        assert isinstance(end, SessionEnded), (world.policy, end)
    return world

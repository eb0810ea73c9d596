"""A coordinator of the world: the core and a rim that journals, sends, and sees connections break.

Knows nothing of faults; the world kills, freezes and cuts it off.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.events import (
    DisconnectWorker,
    Effect,
    Event,
    Phase,
    SendControl,
    SendStep,
    StepFinished,
    Tick,
    TokensCommitted,
    WorkerGone,
    WorkerJoined,
    token_ids,
)
from coordinator.state import ClusterState
from protocol.ids import SessionId, WorkerId
from protocol.messages import Release
from world.books import Journal
from world.model import SPEC
from world.node import Node
from world.referee import Referee

if TYPE_CHECKING:
    from world.world import World

TICK_S = 0.2


@dataclass(eq=False)
class Connection:
    """A worker's control and data connection to one life of one coordinator."""

    worker: WorkerId
    worker_life: int
    coordinator: SimCoordinator
    coordinator_life: int
    is_closed: bool = False  # by the worker
    is_broken: bool = field(default=False)  # and the coordinator knows


class SimCoordinator(Node):
    """One process after the other on one state folder."""

    def __init__(self, world: World, name: str, journal: Journal) -> None:
        super().__init__(name, world)
        self.world = world
        self.journal = journal
        self.offset_s = world.dice.uniform(0.0, 1000.0)
        self.connections: dict[WorkerId, Connection] = {}
        self.core: ClusterState
        self.referee: Referee
        self.term = 0
        self.slept_s = self._froze_at = 0.0
        self._todo: deque[Event] = deque()

    @property
    def clock(self) -> float:
        return self.world.now + self.offset_s

    @property
    def awake_s(self) -> float:
        """Its clock, less what it slept."""
        return self.clock - self.slept_s

    def jump(self, far_s: float) -> None:
        """Its clock goes forward at once; a long way is what a suspended machine sees."""
        self.offset_s += far_s
        if far_s > self.world.policy.lease_s / 2:
            self.slept_s += far_s

    def freeze(self, for_s: float) -> None:
        if not self.is_frozen:
            self._froze_at = self.world.now
        super().freeze(for_s)

    def thaw(self, life: int) -> None:
        frozen_s = self.world.now - self._froze_at
        if self.is_frozen and life == self.life and frozen_s > self.world.policy.lease_s / 2:
            self.slept_s += frozen_s  # a shorter gap is time like any other
        super().thaw(life)

    def start(self) -> None:
        """Start the process, or start it again on the same state."""
        self.begin_life()
        self.connections, self._todo = {}, deque()
        self.term = self.journal.begin_term()
        saved = self.journal.saved(self.offset_s)
        policy = self.world.policy
        self.core = ClusterState(SPEC, policy, term=self.term, seats=self.journal.seats, saved=saved)
        self.referee = Referee(self.core, policy, self.journal, self.awake_s)
        self._tick()

    def die(self) -> None:
        self.end_life()
        for connection in self.connections.values():
            connection.is_broken = True

    @property
    def is_quiet(self) -> bool:
        """Whether it serves and has nothing to do."""
        sessions = self.core._sessions
        is_ready = self.core._deployment.phase is Phase.READY
        return is_ready and sessions.is_idle and not sessions.counts.waiting and not sessions.is_held

    def _tick(self) -> None:
        self.tell(Tick())
        self.referee.check_leases(self.clock)
        self.later(TICK_S, self._tick)

    # ------------------------------------------------------------ what comes in

    def hello(self, connection: Connection, event: WorkerJoined) -> None:
        """A worker dials."""
        if connection.coordinator_life != self.life or connection.is_closed:
            return
        worker = self.world.workers[event.worker]
        self.connections[event.worker] = connection
        self._send(connection, "control", lambda: worker.on_welcome(connection, self.term))
        self.tell(event)

    def hear(self, connection: Connection, event: Event) -> None:
        """A worker says something; on a connection of its earlier life as well, as long as that is not broken."""
        if connection.coordinator_life == self.life and not connection.is_broken:
            self.tell(event)

    def broke(self, connection: Connection) -> None:
        """A connection is seen to break."""
        connection.is_broken = True
        if self.connections.get(connection.worker) is connection:
            del self.connections[connection.worker]
            self.tell(WorkerGone(worker=connection.worker, reason="its connection broke"))

    def tell(self, event: Event) -> None:
        """Hand an event to the core: journal what follows, check it, then carry it out."""
        self._todo.append(event)
        if len(self._todo) > 1:
            return
        while self._todo and self.is_alive:
            first = self._todo[0]
            effects = self.core.handle(first, self.clock)
            self.world.note(self.name, first)
            self.referee.check(first, effects, self.awake_s)
            self.journal.write(effects)
            if self.world.chance(self.world.scenario.crash_between):
                self.world.crash_coordinator(self)
                return
            for effect in effects:
                self.world.note(self.name, effect)
                self._carry_out(effect)
            self._todo.popleft()

    # ------------------------------------------------------------ what goes out

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case SendControl(worker=name, message=message):
                worker = self.world.workers[name]
                self._to_worker(name, "control", lambda connection: worker.on_control(connection, message), message)
            case DisconnectWorker(worker=name, error=error):
                worker = self.world.workers[name]
                connection = self.connections.get(name)
                if connection is not None:
                    self._send(connection, "control", lambda: worker.on_control(connection, error))
            case TokensCommitted():
                if self is self.world.primary:
                    self.world.show(effect.session, self.journal.requests[effect.session].answer)
            case SendStep(worker=name, step=step):
                worker, tokens = self.world.workers[name], token_ids(effect.tokens).tolist()
                self._to_worker(name, "data", lambda connection: worker.compute.on_step(connection, step, tokens))
            case _:
                pass

    def _to_worker(self, name: WorkerId, channel: str, act, message: object = None) -> None:  # type: ignore[no-untyped-def]
        connection = self.connections.get(name)
        if connection is None or connection.is_broken:
            self._todo.append(WorkerGone(worker=name, reason=f"its {channel} connection can't be reached"))
            return
        was_sent = self._send(connection, channel, lambda: act(connection))
        if not was_sent and isinstance(message, Release):
            self.world.never_released |= {(name, session) for session in message.sessions}

    def _send(self, connection: Connection, channel: str, act) -> bool:  # type: ignore[no-untyped-def]
        worker, life = self.world.workers[connection.worker], connection.worker_life
        return self.world.network.send(
            self.name, connection.worker, (connection, channel, "down"), lambda: worker.take(life, act)
        )

    def knows(self, session: SessionId) -> bool:
        """Say whether a request came before."""
        return session in self.journal.requests


def up(connection: Connection, channel: str, event: Event) -> None:
    """Let a worker say something to the coordinator at the other end."""
    coordinator, life = connection.coordinator, connection.coordinator_life
    hear = coordinator.hello if isinstance(event, WorkerJoined) else coordinator.hear
    coordinator.world.network.send(
        connection.worker,
        coordinator.name,
        (connection, channel, "up"),
        lambda: coordinator.take(life, lambda: hear(connection, event)),  # type: ignore[arg-type]
        may_lose=not isinstance(event, StepFinished) or channel == "data",
    )

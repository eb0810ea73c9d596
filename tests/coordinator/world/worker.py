"""A worker of the world: its control side, as far as the core can tell it from a real one.

Knows nothing of faults beyond its owner's wishes; the world kills, freezes and cuts it off. What it computes and holds
is in `world.compute`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core_cases import heartbeat, joined, reached

from coordinator.events import Event, LeaveAsked, TilesStocked, WorkerGone
from protocol.errors import ManyhandsError
from protocol.ids import WorkerId
from protocol.messages import Goodbye, HeartbeatReply, LeaveAsk, Load, Probe, Release, Stock, Stocked, Unload
from world.compute import Compute
from world.coordinator import Connection, up
from world.node import Node

if TYPE_CHECKING:
    from world.world import World

DIAL_S = 1.5  # how long it waits for a welcome
HEARTBEAT_S = 0.5


class SimWorker(Node):
    """One device. Its identity (name, highest term it obeyed) outlives its processes."""

    def __init__(self, world: World, name: str, budget_bytes: int) -> None:
        super().__init__(name, world)
        self.world = world
        self.worker = WorkerId(name)
        self.budget_bytes = budget_bytes
        self.highest_term = 0
        self.term = 0  # of the coordinator by which this process was welcomed
        self.connection: Connection | None = None
        self.compute = Compute(self)
        self.paused = ""
        self.wants_to_leave = False
        self._dialling: Connection | None = None
        self._heard_at = 0.0
        self._sequence = 0

    # ------------------------------------------------------------ life

    def start(self) -> None:
        if self.is_alive:
            return
        self.begin_life()
        self.term, self.connection, self._dialling = 0, None, None
        self.paused, self.wants_to_leave = "", False
        self.compute = Compute(self)
        self._dial()

    def die(self, *, is_seen: bool) -> None:
        """End; `is_seen`: its connections break at once, as those of a process do and those of a host don't."""
        connection = self.connection
        self.end_life()
        if is_seen:
            self.compute.links_end()
            self._hang_up(connection)
        self.compute.forget_epoch()
        self.connection = self._dialling = None

    def leave(self, reason: str) -> None:
        """Say goodbye and end."""
        self.say(WorkerGone(worker=self.worker, reason=reason, on_purpose=True))
        self.die(is_seen=True)

    def ask_to_leave(self) -> None:
        """SIGTERM: hand over first."""
        self.wants_to_leave = True
        self.say(LeaveAsked(worker=self.worker, ask=LeaveAsk(reason="it is late")))

    # ------------------------------------------------------------ being connected

    def _dial(self) -> None:
        self.connection = None
        coordinator = self.world.coordinator_for(self.name)
        if coordinator is None:
            self.later(self.world.dice.uniform(0.2, 1.0), self._dial)
            return
        connection = self._dialling = Connection(self.worker, self.life, coordinator, coordinator.life)
        hello = joined(
            self.name, budget_bytes=self.budget_bytes, phase=self.compute.told_phase, epoch=self.compute.held_epoch
        )
        up(connection, "control", hello)
        self.later(DIAL_S, lambda: self._give_up(connection))

    def _give_up(self, connection: Connection) -> None:
        if self._dialling is connection:
            connection.is_closed = True
            self._dial()

    def on_welcome(self, connection: Connection, term: int) -> None:
        """Obey a coordinator, unless a later one was obeyed before."""
        if connection is not self._dialling:
            return
        self._dialling = None
        if term < self.highest_term:
            self._hang_up(connection)
            self.later(self.world.dice.uniform(0.3, 1.5), self._dial)
            return
        self.connection = connection
        self._heard_at = self.world.now
        self.compute.hold()
        if term != self.term:
            self.compute.newest = 0
        self.term = self.highest_term = term
        if self.wants_to_leave:
            self.ask_to_leave()
        self._beat(connection)

    def _beat(self, connection: Connection) -> None:
        if connection is not self.connection:
            return
        if self.world.now - self._heard_at > self.world.policy.lease_s:
            self._lose_coordinator()
            return
        self._sequence += 1
        compute = self.compute
        self.say(
            heartbeat(self.name, self._sequence, progress=compute.progress, epoch=compute.epoch, paused=self.paused)
        )
        self.later(HEARTBEAT_S, lambda: self._beat(connection))

    def _lose_coordinator(self) -> None:
        """Stop at the next step and keep what it holds; dial again."""
        self.compute.hold()
        self._hang_up(self.connection)
        self.later(self.world.dice.uniform(0.05, 0.5), self._dial)
        self.connection = None

    def break_connection(self) -> None:
        """The connection is reset: the coordinator sees it at once, this side when its lease is over."""
        connection = self.connection
        if connection is not None:
            self._hang_up(connection)

    def _hang_up(self, connection: Connection | None) -> None:
        if connection is None or connection.is_closed:
            return
        connection.is_closed = True
        coordinator, life = connection.coordinator, connection.coordinator_life

        def broke() -> None:
            coordinator.take(life, lambda: coordinator.broke(connection))

        self.world.network.send(self.name, coordinator.name, (connection, "control", "up"), broke, may_lose=False)

    def say(self, event: Event, channel: str = "control") -> None:
        """Say something to the coordinator."""
        if self.connection is not None and not self.connection.is_closed:
            up(self.connection, channel, event)

    # ------------------------------------------------------------ what it is told

    def on_control(self, connection: Connection, message: object) -> None:
        """Take a message on the control connection."""
        if connection is not self.connection or connection.is_closed:
            return
        world = self.world
        self._heard_at = world.now
        match message:
            case Probe():
                found = [peer.worker for peer in message.peers if world.can_dial(self.name, peer.worker)]
                self.later(world.dice.uniform(0.01, 0.3), lambda: self.say(reached(self.name, message.probe, *found)))
            case Load():
                self.compute.on_load(message)
            case Unload():
                self.compute.on_unload(message.epoch)
            case Release():
                self.compute.on_release(message.sessions)
            case Stock():
                self._stock(message)
            case Goodbye():
                self.leave("goodbye")
                world.come_back(self)
            case ManyhandsError():
                self._lose_coordinator()
            case HeartbeatReply():
                pass
            case _:
                raise AssertionError(f"{self.name} does not know {message}")

    def _stock(self, order: Stock) -> None:
        """Fetch, slowly; at times without success, at times without an answer."""
        dice, scenario, told = self.world.dice, self.world.scenario, self.connection
        if self.world.chance(scenario.stock_silence):
            return
        error = "disk full" if self.world.chance(scenario.stock_failure) else ""

        def tell(stocked: Stocked) -> None:
            if self.connection is told:
                self.say(TilesStocked(worker=self.worker, stocked=stocked))

        half = Stocked(order=order.order, done_bytes=1, total_bytes=2)
        over = Stocked(order=order.order, done_bytes=2 - bool(error), total_bytes=2, is_over=True, error=error)
        first_s = dice.uniform(0.05, 1.0)
        self.later(first_s, lambda: tell(half))
        self.later(first_s + dice.uniform(0.05, 1.0), lambda: tell(over))

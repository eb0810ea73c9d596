"""Carries out what the core and the desk decide: hands them events, sends their messages, feeds back what failed.

Knows nothing of how messages arrive. Events that come up while effects are carried out wait their turn, so the core
is never entered twice. What clients are told stands in the token log before: all of one event's effects are written
in one transaction, and a session that can't be written fails.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from coordinator.admission import Channel, Route
from coordinator.desk import Act, Desk
from coordinator.events import (
    DisconnectWorker,
    Effect,
    Event,
    PhaseChanged,
    RequestCancelled,
    SeatsChanged,
    SendControl,
    SendStep,
    SessionEnded,
    SessionFailed,
    TokensCommitted,
    WorkerGone,
)
from coordinator.exchange import Exchange
from coordinator.journal import Journal
from coordinator.state import ClusterState
from coordinator.tickets import Say
from coordinator.token_log import Begun, Ended, Forgotten, Grown, Record, TokenLog
from protocol.errors import InvariantBroken, ManyhandsError
from protocol.frames import Buffer, encode, pack_manifest
from protocol.ids import SessionId, WorkerId
from protocol.messages import ErrorReport
from protocol.tiles import TileEntry, TileId

_log = logging.getLogger(__name__)
MAX_HELD = 64  # steps for a head that is not connected yet; the core has far fewer in flight


class _Held(NamedTuple):
    """Frames for a data connection that is still on its way, and until when it is worth waiting."""

    worker: WorkerId
    frames: list[Buffer]
    deadline: float


class Actor:
    """The core, the desk, and the way out. One event loop uses it."""

    def __init__(
        self,
        *,
        state: ClusterState,
        desk: Desk,
        exchange: Exchange,
        log: TokenLog,
        journal: Journal,
        entries: Mapping[TileId, TileEntry],
        clock: Callable[[], float],
        unix_time: Callable[[], float],
        patience_s: float,
    ) -> None:
        """`patience_s`: how long a step waits for the head's data connection. Both clocks in seconds."""
        self.state = state
        self.desk = desk
        self.clock = clock
        self._exchange = exchange
        self._log = log
        self._journal = journal
        self._unix_time = unix_time
        self._entries = entries
        self._patience_s = patience_s
        self._todo: deque[Event] = deque()
        self._is_running = False
        self._held: deque[_Held] = deque()
        self._nonces: dict[WorkerId, str] = {}  # bounded by the number of pinned keys

    def know_nonce(self, route: Route) -> None:
        """Remember from a worker's hello what its connections are called; steps held for those before are dropped."""
        self._nonces[route.worker] = route.nonce
        self._forget(route.worker)

    def routing_id(self, worker: WorkerId, channel: Channel) -> bytes:
        """Return the routing id of a worker's connection."""
        return Route(worker, channel, self._nonces.get(worker, "")).routing_id()

    def run(self, *events: Event) -> None:
        """Hand events to the core and carry out all that follows from them."""
        self._todo.extend(events)
        if self._is_running:
            return
        self._is_running = True
        try:
            while self._todo:
                self._carry_out_all(self.state.handle(self._todo.popleft(), self.clock()))
        finally:
            self._is_running = False

    def act(self, acts: Iterable[Act]) -> None:
        """Carry out what the desk wants, in order; a request that can't be written ends there."""
        for act in acts:
            match act:
                case Say(client, message):
                    self.say(client, message)
                case Begun():
                    if error := self._write([act]).get(act.session):
                        self._tell(SessionFailed(session=act.session, error=error))
                        return
                case Grown() | Ended() | Forgotten():
                    self._write([act])
                case _:
                    self.run(act)

    def say(self, client: bytes, message: object, payload: Buffer | None = None) -> None:
        """Send to a client; one that is gone or does not keep up is told nothing more until it comes back."""
        if not self._exchange.send(client, encode(message, payload)):
            self.desk.client_gone(client, self.clock())

    def send(self, routing_id: bytes, message: object, payload: Buffer | None = None) -> bool:
        """Send to a routing id and say whether it was taken."""
        return self._exchange.send(routing_id, encode(message, payload))

    def forward(self, worker: WorkerId, frames: Sequence[Buffer]) -> bool:
        """Send frames as they are to a worker's data connection and say whether they were taken."""
        return self._exchange.send(self.routing_id(worker, Channel.DATA), frames)

    def follow(self, routing_id: bytes) -> None:
        """Have the break of the connection told by which the message came that is being handled."""
        self._exchange.follow(routing_id)

    def lose(self, worker: WorkerId, reason: str) -> None:
        """Tell the core that a worker can't be reached any more; steps held for it are dropped."""
        self._forget(worker)
        self.run(WorkerGone(worker=worker, reason=reason))

    def retry_held(self) -> None:
        """Try again to send steps to a head that was not connected; give it up when its time is over."""
        now, held = self.clock(), self._held
        self._held = deque()
        for one in held:
            if any(other.worker == one.worker for other in self._held) or not self.forward(one.worker, one.frames):
                self._held.append(one)  # behind one that still waits: steps stay in order
        overdue = {one.worker for one in self._held if now >= one.deadline}
        for worker in overdue:
            self.lose(worker, "its data connection can't be reached")

    def _carry_out_all(self, effects: Sequence[Effect]) -> None:
        unwritten = self._write(self.desk.records(effects))
        for effect in effects:
            if not isinstance(effect, TokensCommitted | SessionEnded | SessionFailed):
                self._carry_out(effect)
            elif error := unwritten.get(effect.session):
                self._tell(SessionFailed(session=effect.session, error=error))
                self.run(RequestCancelled(session=effect.session))
            else:
                self._tell(effect)

    def _tell(self, effect: TokensCommitted | SessionEnded | SessionFailed) -> None:
        if isinstance(effect, SessionFailed):
            _log.info("session %d: %s", effect.session, effect.error)
        if isinstance(effect, TokensCommitted):
            self.act(self.desk.committed(effect, self.clock()))
        else:
            self.act(self.desk.ended(effect, self.clock()))

    def _write(self, records: Sequence[Record]) -> dict[SessionId, ManyhandsError]:
        unwritten = dict(self._log.write(records, self._unix_time()))
        for session, error in unwritten.items():
            _log.error("session %d can't be written: %s", session, error)
        return unwritten

    def _remember(self, effect: SeatsChanged) -> None:
        try:
            self._journal.put_seats(effect.seats)
        except ManyhandsError as error:  # the plan serves all the same; only the next start may choose another one
            _log.error("the seats of the plan can't be remembered: %s", error)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case SendControl():
                self._send_control(effect)
            case SendStep():
                self._send_step(effect)
            case DisconnectWorker():
                _log.warning("worker %s: %s", effect.worker, effect.error)
                self._forget(effect.worker)
                self.send(self.routing_id(effect.worker, Channel.CONTROL), ErrorReport.of(effect.error))
            case SeatsChanged():
                self._remember(effect)
            case PhaseChanged():
                _log.info("%s (epoch %d): %s", effect.phase, effect.epoch, effect.detail)
            case _:
                raise InvariantBroken(f"no way to carry out {type(effect).__name__}")

    def _send_control(self, effect: SendControl) -> None:
        payload = None if effect.tiles is None else pack_manifest(self._entries[tile] for tile in effect.tiles)
        if not self.send(self.routing_id(effect.worker, Channel.CONTROL), effect.message, payload):
            self.lose(effect.worker, "its control connection can't be reached")

    def _send_step(self, effect: SendStep) -> None:
        frames = encode(effect.step, effect.tokens)
        if any(one.worker == effect.worker for one in self._held) or not self.forward(effect.worker, frames):
            if len(self._held) >= MAX_HELD:
                self.lose(effect.worker, "it does not take its steps")
                return
            self._held.append(_Held(effect.worker, frames, self.clock() + self._patience_s))

    def _forget(self, worker: WorkerId) -> None:
        self._held = deque(one for one in self._held if one.worker != worker)

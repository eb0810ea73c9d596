"""What workers and invited guests say: enrolment, hello, reports for the core, tiles, frames to be relayed.

Knows nothing of clients. The sender's name and role come from its key; errors are raised for the caller to tell.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from coordinator.actor import Actor
from coordinator.admission import Channel, Party, agree_version, require_own_name, route_of
from coordinator.events import (
    Event,
    LeaveAsked,
    LoadProgressed,
    PeersReached,
    StepFinished,
    TilesStocked,
    WorkerFaulted,
    WorkerGone,
    WorkerHeard,
    WorkerJoined,
    WorkerLoaded,
)
from coordinator.invitations import Invitations
from coordinator.tile_service import TileService
from protocol.errors import AccessRefused, InvariantBroken, ManyhandsError
from protocol.frames import Buffer
from protocol.ids import WorkerId
from protocol.messages import (
    Enroll,
    Enrolled,
    ErrorReport,
    Fault,
    Heartbeat,
    Hello,
    Leave,
    LeaveAsk,
    Loaded,
    LoadProgress,
    Reached,
    Relay,
    StepDone,
    Stocked,
    TileChunk,
    TileRequest,
    Welcome,
)
from protocol.transport import Envelope
from protocol.version import SOFTWARE

_log = logging.getLogger(__name__)
Spawn = Callable[[Coroutine[Any, Any, None]], object]

# How a report becomes an event of the core, which takes every one as a sign of life as well.
_REPORTS: Final[dict[type, Callable[[WorkerId, Any], Event]]] = {
    Heartbeat: lambda worker, said: WorkerHeard(worker=worker, heartbeat=said),
    Reached: lambda worker, said: PeersReached(worker=worker, reached=said),
    LoadProgress: lambda worker, said: LoadProgressed(worker=worker, progress=said),
    Loaded: lambda worker, said: WorkerLoaded(worker=worker, loaded=said),
    Fault: lambda worker, said: WorkerFaulted(worker=worker, fault=said),
    StepDone: lambda worker, said: StepFinished(worker=worker, done=said),
    Leave: lambda worker, said: WorkerGone(
        worker=worker, reason=f"it left: {said.reason}" if said.reason else "it left", on_purpose=True
    ),
    LeaveAsk: lambda worker, said: LeaveAsked(worker=worker, ask=said),
    Stocked: lambda worker, said: TilesStocked(worker=worker, stocked=said),
}


@dataclass(slots=True)
class RelayCounts:
    """Data frames that went through here, and those that were dropped."""

    relayed: int = 0
    dropped: int = 0


class WorkerSide:
    """Takes messages of workers and guests. `welcome` is what every worker is greeted with, but for the version."""

    def __init__(
        self, actor: Actor, tiles: TileService, invitations: Invitations, welcome: Welcome, spawn: Spawn
    ) -> None:
        self.counts = RelayCounts()
        self._actor = actor
        self._tiles = tiles
        self._invitations = invitations
        self._welcome = welcome
        self._spawn = spawn
        self._noted_at: dict[WorkerId, float] = {}

    def enroll(self, envelope: Envelope, asked: Enroll, unix_time: float) -> None:
        """Pin a guest's key and tell it its name; raises AccessRefused, VersionMismatch."""
        agree_version(asked, node=asked.name, own_software=SOFTWARE)
        pin = self._invitations.enroll(envelope.public_key, asked, unix_time)
        _log.info("worker %s enrolled as %s (%s)", pin.worker, pin.role, asked.software)
        self._actor.send(envelope.routing_id, Enrolled(worker=pin.worker, cluster=self._welcome.cluster))

    def take(self, party: Party, envelope: Envelope, message: object) -> None:
        """Act on a worker's message; raises AccessRefused, VersionMismatch."""
        route = route_of(party, envelope.routing_id)
        worker, report = route.worker, _REPORTS.get(type(message))
        if isinstance(message, Hello):
            self._hello(party, envelope, message)
            return
        if report is not None:
            self._actor.run(report(worker, message))
            return
        self._note_life(worker)
        match message:
            case TileRequest():
                self._tiles.reserve(party, message)
                self._spawn(self._send_tile(party, envelope.routing_id, message))
            case Relay():
                self._relay(party, message, envelope.frames)
            case ErrorReport():
                _log.warning("worker %s reports: %s", worker, message.error())
            case _:
                raise InvariantBroken(f"the table lets workers send {type(message).__name__}, but nobody takes it")

    def broke(self, routing_id: bytes) -> None:
        """Give up a worker whose control connection broke; one that is here by a newer connection stays."""
        worker = WorkerId(routing_id.partition(b"/")[0].decode())
        if self._actor.routing_id(worker, Channel.CONTROL) == routing_id:
            self._actor.lose(worker, "its connection broke")

    def _hello(self, party: Party, envelope: Envelope, hello: Hello) -> None:
        require_own_name(party, hello.worker)
        worker = WorkerId(party.name)
        route = route_of(party, envelope.routing_id)
        if route.channel is not Channel.CONTROL:
            raise AccessRefused(f"{worker} says hello on its {route.channel} connection", node=worker, phase="hello")
        version = agree_version(hello, node=worker, own_software=SOFTWARE)
        if not self._actor.send(envelope.routing_id, self._welcome_of(version)):
            _log.info("worker %s was gone before it was welcomed", worker)
            return
        self._actor.know_nonce(route)
        self._actor.follow(envelope.routing_id)
        _log.info("worker %s (%s) is here: %s", worker, party.role, hello.software)
        self._actor.run(WorkerJoined(worker=worker, role=party.role, public_key=envelope.public_key, hello=hello))

    def _welcome_of(self, version: int) -> Welcome:
        own = self._welcome
        return Welcome(
            version=version, software=own.software, cluster=own.cluster, term=own.term,
            heartbeat_s=own.heartbeat_s, lease_s=own.lease_s,
        )  # fmt: skip

    def _relay(self, party: Party, header: Relay, frames: Sequence[Buffer]) -> None:
        if header.source != party.name:
            raise AccessRefused(f"worker {party.name} relays as {header.source!r:.80}", node=party.name, phase="relay")
        # A frame of a plan that has just ended is nothing unusual: dropped like frames of another epoch.
        linked = self._actor.state.can_relay(header.source, header.target)
        if linked and self._actor.forward(header.target, frames):
            self.counts.relayed += 1
        else:
            self.counts.dropped += 1
            _log.debug("dropped a frame from %s to %s", header.source, header.target)

    def _note_life(self, worker: WorkerId) -> None:
        """Tell the core at the pace of heartbeats: relayed frames come by the thousand."""
        now = self._actor.clock()
        if now - self._noted_at.get(worker, -math.inf) >= self._welcome.heartbeat_s:
            self._noted_at[worker] = now
            self._actor.run(WorkerHeard(worker=worker))

    async def _send_tile(self, party: Party, routing_id: bytes, asked: TileRequest) -> None:
        try:
            data = await self._tiles.read(party, asked)
        except ManyhandsError as error:
            _log.warning("tile %s for %s: %s", asked.digest.hex()[:16], party.name, error)
            self._actor.send(routing_id, ErrorReport.of(error, digest=asked.digest))
            return
        if not self._actor.send(routing_id, TileChunk(digest=asked.digest, offset=asked.offset), data):
            _log.debug("worker %s no longer waits for tile %s", party.name, asked.digest.hex()[:16])

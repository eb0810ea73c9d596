"""Who says what: takes an envelope, finds out whose key it is, checks and decodes it, and passes it on.

Knows nothing of what a message leads to. Whatever is wrong with one is told to its sender and counted; it never ends
the loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.actor import Actor
from coordinator.admission import AccessBook, Party, is_worker, require_may_send
from coordinator.client_side import ClientSide
from coordinator.worker_side import WorkerSide
from protocol.errors import AccessRefused, FrameMalformed, InvariantBroken, ManyhandsError, ProtocolViolation
from protocol.frames import Received, decode
from protocol.messages import Enroll, ErrorReport, Generate, Relay, Resume, TileRequest, Welcome
from protocol.transport import Envelope

_log = logging.getLogger(__name__)
MAX_COMPLAINTS = 1000  # logged in full; a peer that only sends rubbish must not fill the disk


@dataclass(slots=True)
class Complaints:
    """How many messages broke the protocol, and how many were refused."""

    violations: int = 0
    refusals: int = 0


class Switchboard:
    """Passes messages to the side they belong to. `unix_time` in seconds."""

    def __init__(
        self, *, book: AccessBook, actor: Actor, workers: WorkerSide, clients: ClientSide, welcome: Welcome,
        unix_time: Callable[[], float],
    ) -> None:  # fmt: skip
        self.complaints = Complaints()
        self._book = book
        self._actor = actor
        self._workers = workers
        self._clients = clients
        self._welcome = welcome
        self._unix_time = unix_time

    def take(self, envelope: Envelope) -> None:
        """Act on one message; only a bug of ours raises."""
        message: object = None
        try:
            party = self._book.party_of(envelope.public_key)
            message, payload = decode_from(party, envelope)
            require_may_send(party, message)
            if isinstance(message, Enroll):
                self._workers.enroll(envelope, message, self._unix_time())
            elif is_worker(party):
                self._workers.take(party, envelope, message)
            else:
                self._clients.take(envelope, message, payload, self._welcome)
        except InvariantBroken:
            raise
        except ManyhandsError as error:
            self._complain(envelope, message, error)

    def broke(self, routing_id: bytes) -> None:
        """A connection that is followed is no more; only workers' are."""
        self._workers.broke(routing_id)

    def _complain(self, envelope: Envelope, message: object, error: ManyhandsError) -> None:
        self.complaints.violations += isinstance(error, ProtocolViolation)
        self.complaints.refusals += isinstance(error, AccessRefused)
        if self.complaints.violations + self.complaints.refusals <= MAX_COMPLAINTS:
            _log.warning("from %r: %s", envelope.routing_id[:80], error)
        request = message.request if isinstance(message, Generate | Resume) else ""
        digest = message.digest if isinstance(message, TileRequest) else b""
        # To the sender's own connection. If it is gone there is nobody to tell.
        self._actor.send(envelope.routing_id, ErrorReport.of(error, request=request, digest=digest))


def decode_from(party: Party, envelope: Envelope) -> Received:
    """Decode a message; of a relayed one only the envelope, the frames behind it are not ours to read.

    Raises FrameMalformed, FrameTooLarge. Workers send the coordinator nothing with a payload but `Relay`.
    """
    frames = envelope.frames
    if not is_worker(party) or len(frames) < 2:
        return decode(frames)
    received = decode(frames[:1])
    if not isinstance(received.message, Relay):
        raise FrameMalformed(f"{type(received.message).__name__}: {len(frames)} frames")
    return received

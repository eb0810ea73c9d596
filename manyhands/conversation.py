"""The client's side of a conversation with the coordinator: which message moves which request to which state.

Knows nothing of sockets, threads or clocks: messages and the time come in, updates for the callers go out.

    sent --Accepted--> queued --Piece--> streaming --Finished--> ended
      \\___________________\\________________\\________ErrorReport, silence, broken protocol--> ended

A request that its caller has abandoned is still listened to until the coordinator confirms, but tells nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from manyhands.results import Generation, Piece
from protocol import messages
from protocol.errors import CoordinatorLost, FrameMalformed, ManyhandsError, RequestInvalid
from protocol.ids import RequestId
from protocol.liveness import Lease
from protocol.messages import Accepted, ErrorReport, Finished, Generate, Waiting

MAX_OPEN_REQUESTS = 256
MAX_TEXT_PER_TOKEN = 1024  # characters; a generous bound for what a hostile coordinator could make us hold
PING_EVERY_S = 3.0  # while requests are open; the coordinator counts a client as gone after 15 s of silence


class RequestPhase(StrEnum):
    """How far a request has come."""

    SENT = "sent"
    QUEUED = "queued"
    STREAMING = "streaming"
    ENDED = "ended"


class WaitsFor(NamedTuple):
    """The coordinator says what the request waits for."""

    phase: str


Update = Piece | WaitsFor | Generation | ManyhandsError


class Told(NamedTuple):
    """An update for the caller of one request."""

    request: RequestId
    update: Update


class RequestLog:
    """One request: its phase and all it has received so far."""

    def __init__(self, max_tokens: int) -> None:
        self.phase = RequestPhase.SENT
        self.max_tokens = max_tokens
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.num_chars = 0

    def receive(self, message: Any) -> Update | None:
        """Apply a message of this request; raises FrameMalformed when it does not fit the phase."""
        match message:
            case ErrorReport():
                self.phase = RequestPhase.ENDED
                return message.error()
            case Waiting():
                return WaitsFor(message.phase)
            case Accepted() if self.phase is RequestPhase.SENT:
                self.phase = RequestPhase.QUEUED
                return None
            case messages.Piece() if self.phase in (RequestPhase.QUEUED, RequestPhase.STREAMING):
                return self._append(message)
            case Finished():  # also right after the request: it may be cancelled before it is accepted
                self.phase = RequestPhase.ENDED
                return Generation(
                    text="".join(self.texts),
                    token_ids=tuple(self.token_ids),
                    finish_reason=message.reason,
                    usage=message.usage,
                    timings=message.timings,
                )
            case _:
                raise FrameMalformed(f"{type(message).__name__} for a request that is {self.phase}", phase="stream")

    def _append(self, message: messages.Piece) -> Piece:
        if message.index != len(self.token_ids):
            raise FrameMalformed(f"piece from token {message.index}, expected {len(self.token_ids)}", phase="stream")
        num_tokens = len(self.token_ids) + len(message.tokens)
        num_chars = self.num_chars + len(message.text)
        if num_tokens > self.max_tokens or num_chars > MAX_TEXT_PER_TOKEN * (num_tokens + 1):
            bound = f"{num_tokens} tokens and {num_chars} characters, asked for {self.max_tokens} tokens"
            raise FrameMalformed(f"more than was asked for: {bound}", phase="stream")
        self.phase = RequestPhase.STREAMING
        self.num_chars = num_chars
        self.token_ids += message.tokens
        if message.text:
            self.texts.append(message.text)
        return Piece(text=message.text, token_ids=tuple(message.tokens))


class Conversation:
    """All open requests of one connection, and how long each has been silent.

    `timeout_s` bounds the silence about a request; any message about it, `Waiting` too, starts it again.
    """

    def __init__(self, *, timeout_s: float, addresses: Sequence[str], now: float) -> None:
        self._timeout_s = timeout_s
        self._where = ", ".join(addresses)
        self._logs: dict[RequestId, RequestLog] = {}
        self._leases: dict[RequestId, Lease] = {}
        self._abandoned: set[RequestId] = set()
        self._last_ping = self._last_look = now

    @property
    def open_requests(self) -> tuple[RequestId, ...]:
        """The requests that have not ended, oldest first."""
        return tuple(self._logs)

    def open(self, generate: Generate, now: float) -> None:
        """Note a request that is being sent; raises RequestInvalid when too many are open."""
        if len(self._logs) >= MAX_OPEN_REQUESTS:
            raise RequestInvalid(
                f"{MAX_OPEN_REQUESTS} requests are open on this client", remedy="wait for some of them to end"
            )
        lease = Lease(self._timeout_s)
        lease.heard(now)
        self._logs[generate.request] = RequestLog(generate.max_tokens)
        self._leases[generate.request] = lease

    def receive(self, message: Any, now: float) -> list[Told]:
        """Apply a message; one about a request that is not open (any more) is ignored."""
        request: RequestId = message.request
        log = self._logs.get(request)
        if log is None:
            return []
        self._leases[request].heard(now)
        try:
            update = log.receive(message)
        except FrameMalformed as error:
            return self._end(request, error)
        if isinstance(update, Generation | ManyhandsError):
            return self._end(request, update)
        return [Told(request, update)] if update is not None and request not in self._abandoned else []

    def abandon(self, request: RequestId) -> bool:
        """Forget the caller of a request; returns whether the coordinator should be told to stop it."""
        if request not in self._logs or request in self._abandoned:
            return False
        self._abandoned.add(request)
        return True

    def overdue(self, now: float) -> list[Told]:
        """End the requests that have been silent for too long; call it several times in `timeout_s`.

        After a longer pause of our own (a suspended laptop, a blocked loop) silence proves nothing: all start again.
        """
        was_away = now - self._last_look > self._timeout_s / 2
        self._last_look = max(now, self._last_look)
        if was_away:
            for lease in self._leases.values():
                lease.heard(now)
        silent = [request for request, lease in self._leases.items() if lease.is_over(now)]
        return [told for request in silent for told in self._end(request, self._silence(request, now))]

    def is_ping_due(self, now: float) -> bool:
        """Return whether the coordinator should hear from us now, and count on it being done."""
        if not self._logs or now - self._last_ping < PING_EVERY_S:
            return False
        self._last_ping = now
        return True

    def fail_all(self, error: ManyhandsError) -> list[Told]:
        """End every request with one error."""
        return [told for request in self.open_requests for told in self._end(request, error)]

    def _silence(self, request: RequestId, now: float) -> CoordinatorLost:
        silence_s = self._leases[request].silence_s(now)
        return CoordinatorLost(
            f"the coordinator at {self._where} has been silent for {silence_s:.0f} s",
            phase=self._logs[request].phase,
        )

    def _end(self, request: RequestId, update: Update) -> list[Told]:
        del self._logs[request], self._leases[request]
        if request in self._abandoned:
            self._abandoned.discard(request)
            return []
        return [Told(request, update)]

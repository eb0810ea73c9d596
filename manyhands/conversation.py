"""The client's side of a conversation with the coordinator: which message moves which request to which state.

Knows nothing of sockets, threads or clocks: messages and the time come in, updates for the callers go out.

    sent --Accepted--> queued --Piece--> streaming --Finished--> ended
      \\___________________\\________________\\________ErrorReport, broken protocol, away for too long--> ended

A conversation outlives its connection: on the next one every open request is said again, and goes on after the last
token that was received. A request that its caller has abandoned is still listened to until the coordinator confirms,
but tells nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from manyhands.options import Order
from manyhands.results import Generation, Piece
from protocol import messages
from protocol.errors import CoordinatorLost, FrameMalformed, ManyhandsError, RequestInvalid
from protocol.frames import Buffer, encode
from protocol.ids import RequestId
from protocol.liveness import Lease
from protocol.messages import Accepted, Cancel, ErrorReport, Finished, Resume, Waiting

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

    def __init__(self, order: Order) -> None:
        self.phase = RequestPhase.SENT
        self.max_tokens = order.message.max_tokens
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.num_chars = 0
        self.is_resuming = False
        self._request = order.message.request
        self._order: Order | None = order  # until something of the answer is here

    def receive(self, message: Any) -> Update | None:
        """Apply a message of this request; raises FrameMalformed when it does not fit the phase."""
        match message:
            case ErrorReport():
                self.phase = RequestPhase.ENDED
                return message.error()
            case Waiting():
                return WaitsFor(message.phase)
            case Accepted() if self.is_resuming or self.phase is RequestPhase.SENT:
                self.phase = RequestPhase.STREAMING if self._order is None else RequestPhase.QUEUED
                was_away, self.is_resuming = self.is_resuming, False
                return WaitsFor("") if was_away else None
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
                    legs=message.legs,
                )
            case _:
                raise FrameMalformed(f"{type(message).__name__} for a request that is {self.phase}", phase="stream")

    def say_again(self) -> list[Buffer]:
        """Return what to say on a new connection: the whole request, or from where its answer is to go on."""
        self.is_resuming = True
        if self._order is not None:
            self.phase = RequestPhase.SENT
            return encode(self._order.message, self._order.payload)
        return encode(Resume(request=self._request, tokens=len(self.token_ids), chars=self.num_chars))

    def _append(self, message: messages.Piece) -> Piece:
        if message.index != len(self.token_ids):
            raise FrameMalformed(f"piece from token {message.index}, expected {len(self.token_ids)}", phase="stream")
        num_tokens = len(self.token_ids) + len(message.tokens)
        num_chars = self.num_chars + len(message.text)
        if num_tokens > self.max_tokens or num_chars > MAX_TEXT_PER_TOKEN * (num_tokens + 1):
            bound = f"{num_tokens} tokens and {num_chars} characters, asked for {self.max_tokens} tokens"
            raise FrameMalformed(f"more than was asked for: {bound}", phase="stream")
        self.phase = RequestPhase.STREAMING
        self._order = None
        self.num_chars = num_chars
        self.token_ids += message.tokens
        if message.text:
            self.texts.append(message.text)
        return Piece(text=message.text, token_ids=tuple(message.tokens))


class Conversation:
    """All open requests of one client, and how long each has been silent.

    `timeout_s` bounds the silence about a request; any message about it, `Waiting` too, starts it again. `reconnect_s`
    bounds the time from the loss of a connection to the first message about a request on another one.
    """

    def __init__(self, *, timeout_s: float, reconnect_s: float, addresses: Sequence[str], now: float) -> None:
        self._timeout_s = timeout_s
        self._reconnect_s = reconnect_s
        self._where = ", ".join(addresses)
        self._logs: dict[RequestId, RequestLog] = {}
        self._leases: dict[RequestId, Lease] = {}
        self._lost_at: dict[RequestId, float] = {}
        self._abandoned: set[RequestId] = set()
        self._last_ping = self._last_look = now

    @property
    def open_requests(self) -> tuple[RequestId, ...]:
        """The requests that have not ended, oldest first."""
        return tuple(self._logs)

    def open(self, order: Order, now: float) -> None:
        """Note a request that is being sent; raises RequestInvalid for a name that is open, or when too many are."""
        request = order.message.request
        if request in self._logs:
            raise RequestInvalid(
                f"request {request!r} is open on this client already", remedy="give every request a name of its own"
            )
        if len(self._logs) >= MAX_OPEN_REQUESTS:
            raise RequestInvalid(
                f"{MAX_OPEN_REQUESTS} requests are open on this client", remedy="wait for some of them to end"
            )
        self._leases[request] = Lease(self._timeout_s)
        self._leases[request].heard(now)
        self._logs[request] = RequestLog(order)

    def receive(self, message: Any, now: float) -> list[Told]:
        """Apply a message; one about a request that is not open (any more) is ignored."""
        request: RequestId = message.request
        log = self._logs.get(request)
        if log is None:
            return []
        self._leases[request].heard(now)
        self._lost_at.pop(request, None)
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

    # ------------------------------------------------------------ time

    def silence(self, now: float) -> CoordinatorLost | None:
        """Return the error when a request has been silent for too long; call it several times in `timeout_s`.

        After a longer pause of our own (a suspended laptop, a blocked loop) silence proves nothing: all start again.
        Requests that nobody waits for are forgotten in silence.
        """
        was_away = now - self._last_look > self._timeout_s / 2
        self._last_look = max(now, self._last_look)
        if was_away:
            for lease in self._leases.values():
                lease.heard(now)
        silent = [request for request, lease in self._leases.items() if lease.is_over(now)]
        for request in self._abandoned.intersection(silent):
            self._forget(request)
        for request in silent:
            if request in self._logs:
                silence_s = self._leases[request].silence_s(now)
                text = f"the coordinator at {self._where} has been silent for {silence_s:.0f} s"
                return CoordinatorLost(text, phase=self._logs[request].phase)
        return None

    def is_ping_due(self, now: float) -> bool:
        """Return whether the coordinator should hear from us now, and count on it being done."""
        if not self._logs or now - self._last_ping < PING_EVERY_S:
            return False
        self._last_ping = now
        return True

    # ------------------------------------------------------------ from one connection to the next

    def lost(self, error: CoordinatorLost, now: float) -> list[Told]:
        """The connection is lost, or there is none; what is open goes on with the next one."""
        for request in self._logs:
            self._lost_at.setdefault(request, now)
        waits_for = WaitsFor(f"reconnecting: {error.message}")
        return [Told(request, waits_for) for request in self._logs if request not in self._abandoned]

    def patience_s(self, now: float) -> float:
        """Return how long it may take to reconnect before the first request is given up; negative: too long already."""
        return min((at + self._reconnect_s - now for at in self._lost_at.values()), default=0.0)

    def give_up(self, error: CoordinatorLost, now: float) -> list[Told]:
        """End the requests that have waited too long for another connection, with the error that prevented it."""
        late = [request for request, at in self._lost_at.items() if now - at >= self._reconnect_s]
        return [told for request in late for told in self._end(request, error)]

    def say_again(self, now: float) -> list[list[Buffer]]:
        """Return the frames that a new connection begins with: every open request, from where it stopped."""
        for lease in self._leases.values():
            lease.heard(now)
        return [
            encode(Cancel(request=request)) if request in self._abandoned else log.say_again()
            for request, log in self._logs.items()
        ]

    def fail_all(self, error: ManyhandsError) -> list[Told]:
        """End every request with one error."""
        return [told for request in self.open_requests for told in self._end(request, error)]

    def _end(self, request: RequestId, update: Update) -> list[Told]:
        was_abandoned = request in self._abandoned
        self._forget(request)
        return [] if was_abandoned else [Told(request, update)]

    def _forget(self, request: RequestId) -> None:
        del self._logs[request], self._leases[request]
        self._lost_at.pop(request, None)
        self._abandoned.discard(request)

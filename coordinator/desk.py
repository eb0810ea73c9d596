"""The clients' side: requests with their names, streams of text, who waits, who has gone.

Knows nothing of sockets, threads or clocks. What arrives and the time come in; out come `Say` (a message for a client)
and events for the core, to be carried out in order.

    opened --submit--> queued --committed--> streaming --ended | failed--> forgotten
      \\________\\___________\\__cancel, silence of the client, stop string, unreachable--> forgotten
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from coordinator.answer_text import AnswerText
from coordinator.events import RequestArrived, RequestCancelled, SessionEnded, SessionFailed, TokensCommitted
from coordinator.tokens import Found, TextCodec
from protocol.errors import Cancelled, ManyhandsError, Overloaded, RequestInvalid, TokenizerMissing
from protocol.ids import RequestId, SessionId
from protocol.liveness import Lease
from protocol.messages import (
    Accepted,
    Cancel,
    ErrorReport,
    Finished,
    FinishReason,
    Generate,
    Piece,
    PromptKind,
    Timings,
    Usage,
    Waiting,
)

SAY_EVERY_S = 1.0
MAX_READING = 64  # prompts being turned into tokens at once
MAX_OPEN_PER_CLIENT = 256
MAX_PIECE_CHARS = 8192  # at most 4 bytes each: well inside a header
MAX_PIECE_TOKENS = 1024
MAX_PHASE_CHARS = 1000
READING = "reading the prompt"


class Say(NamedTuple):
    """A message for a client, by its routing id."""

    client: bytes
    message: object


Act = Say | RequestArrived | RequestCancelled


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket:
    """One open request. `session` is set when its prompt has been read."""

    client: bytes
    order: Generate
    last_said: float
    text: AnswerText | None
    session: SessionId | None = None
    is_stopping: bool = False
    num_tokens: int = field(default=0)

    @property
    def request(self) -> RequestId:
        """The client's name for it."""
        return self.order.request


class Desk:
    """All open requests of all clients. `codec` None: the model has no tokenizer, so only token ids are taken."""

    def __init__(self, codec: TextCodec | None, *, eos: Iterable[int], client_silence_s: float) -> None:
        self._codec = codec
        self._eos = frozenset(eos)
        self._client_silence_s = client_silence_s
        self._numbers = itertools.count(1)
        self._tickets: dict[tuple[bytes, RequestId], Ticket] = {}
        self._by_session: dict[SessionId, Ticket] = {}
        self._leases: dict[bytes, Lease] = {}  # of clients with open requests

    @property
    def num_open(self) -> int:
        """How many requests have not ended."""
        return len(self._tickets)

    def heard(self, client: bytes, now: float) -> None:
        """Note that a client lives; only of interest while it has open requests."""
        if client in self._leases:
            self._leases[client].heard(now)

    def open(self, client: bytes, order: Generate, now: float) -> Ticket:
        """Take a request in; its prompt is read next (`coordinator.prompts.read_prompt`), then `submit` or `refuse`.

        Raises RequestInvalid for a name that is open already, TokenizerMissing for text without a tokenizer,
        Overloaded when too many prompts are being read.
        """
        key = (client, order.request)
        if key in self._tickets:
            raise RequestInvalid(
                f"request {order.request!r} is open already", remedy="give every request a name of its own"
            )
        if sum(1 for ticket in self._tickets.values() if ticket.client == client) >= MAX_OPEN_PER_CLIENT:
            raise Overloaded(f"{MAX_OPEN_PER_CLIENT} requests of this client are open", remedy="wait for some to end")
        if len(self._tickets) - len(self._by_session) >= MAX_READING:
            raise Overloaded(f"{MAX_READING} prompts are being read", remedy="ask again in a moment")
        if self._codec is None and (order.prompt_kind is not PromptKind.IDS or order.stop):
            raise TokenizerMissing("this model has no tokenizer, so it takes no text and knows no stop strings")
        text = None if self._codec is None else AnswerText(self._codec, order.stop)
        ticket = self._tickets[key] = Ticket(client=client, order=order, last_said=now, text=text)
        lease = self._leases.setdefault(client, Lease(self._client_silence_s))
        lease.heard(now)
        return ticket

    def is_open(self, ticket: Ticket) -> bool:
        """Say whether a ticket still counts: nobody has cancelled it while its prompt was read."""
        return self._tickets.get((ticket.client, ticket.request)) is ticket

    def submit(self, ticket: Ticket, prompt: bytes, now: float) -> list[Act]:
        """Queue a request whose prompt has been read (little-endian int32)."""
        if not self.is_open(ticket):
            return []
        ticket.session = session = SessionId(next(self._numbers))
        self._by_session[session] = ticket
        ticket.last_said = now
        accepted = Accepted(request=ticket.request, session=session, prompt_tokens=len(prompt) // 4)
        order = ticket.order
        return [
            Say(ticket.client, accepted),
            RequestArrived(
                session=session,
                prompt=prompt,
                max_tokens=order.max_tokens,
                sampling=order.sampling,
                stop_tokens=frozenset() if order.ignore_eos else self._eos,
            ),
        ]

    def refuse(self, ticket: Ticket, error: ManyhandsError) -> list[Act]:
        """End a request whose prompt can't be used."""
        if not self.is_open(ticket):
            return []
        self._forget(ticket)
        return [Say(ticket.client, ErrorReport.of(error, request=ticket.request))]

    def cancel(self, client: bytes, cancel: Cancel) -> list[Act]:
        """Stop a request; one that is not open (any more) is ignored, its end is on its way."""
        ticket = self._tickets.get((client, cancel.request))
        if ticket is None:
            return []
        if ticket.session is not None:  # the core answers with SessionEnded
            return [RequestCancelled(session=ticket.session)]
        self._forget(ticket)
        nothing = Timings(queued_s=0.0, first_token_s=0.0, total_s=0.0)
        usage = Usage(prompt_tokens=0, completion_tokens=0)
        finished = Finished(request=ticket.request, reason=FinishReason.CANCELLED, usage=usage, timings=nothing)
        return [Say(client, finished)]

    def committed(self, effect: TokensCommitted, now: float) -> list[Act]:
        """Pass new tokens on, with the text they make certain; a stop string ends the session."""
        ticket = self._by_session.get(effect.session)
        if ticket is None or ticket.is_stopping:
            return []
        ticket.last_said = now
        found = Found("", False) if ticket.text is None else ticket.text.push(effect.tokens)
        acts: list[Act] = list(_pieces(ticket, effect.index, effect.tokens, found.text))
        ticket.num_tokens = effect.index + len(effect.tokens)
        if found.stopped:
            ticket.is_stopping = True
            acts.append(RequestCancelled(session=effect.session, reason=FinishReason.STOP))
        return acts

    def ended(self, effect: SessionEnded) -> list[Act]:
        """Say the last words of a session that ended well."""
        ticket = self._by_session.get(effect.session)
        if ticket is None:
            return []
        self._forget(ticket)
        rest = Found("", False)
        if ticket.text is not None and not ticket.is_stopping and effect.reason is not FinishReason.CANCELLED:
            rest = ticket.text.finish()
        reason = FinishReason.STOP if rest.stopped else effect.reason
        finished = Finished(request=ticket.request, reason=reason, usage=effect.usage, timings=effect.timings)
        return [*_pieces(ticket, ticket.num_tokens, (), rest.text), Say(ticket.client, finished)]

    def failed(self, effect: SessionFailed) -> list[Act]:
        """Say that a session can't go on."""
        ticket = self._by_session.get(effect.session)
        if ticket is None:
            return []
        self._forget(ticket)
        return [Say(ticket.client, ErrorReport.of(effect.error, request=ticket.request))]

    def client_gone(self, client: bytes) -> list[Act]:
        """Cancel everything of a client that can't be reached or has fallen silent; nothing is said to it."""
        gone = [ticket for ticket in self._tickets.values() if ticket.client == client]
        for ticket in gone:
            self._forget(ticket)
        return [RequestCancelled(session=ticket.session) for ticket in gone if ticket.session is not None]

    def tick(self, now: float, phase_of: Callable[[SessionId], str]) -> list[Act]:
        """Cancel for clients that fell silent, and tell the others every second what their requests wait for."""
        acts: list[Act] = []
        for client in [client for client, lease in self._leases.items() if lease.is_over(now)]:
            acts += self._silent(client)
        for ticket in self._tickets.values():
            if now - ticket.last_said >= SAY_EVERY_S:
                ticket.last_said = now
                phase = READING if ticket.session is None else phase_of(ticket.session)
                acts.append(Say(ticket.client, Waiting(request=ticket.request, phase=phase[:MAX_PHASE_CHARS])))
        return acts

    def close(self, error: ManyhandsError) -> list[Act]:
        """Refuse what is still open; call it after the core has ended its sessions."""
        tickets = list(self._tickets.values())
        return [act for ticket in tickets for act in self.refuse(ticket, error)]

    def _silent(self, client: bytes) -> list[Act]:
        """Say goodbye once, in case it lives after all and only its messages were lost; then cancel."""
        error = Cancelled(
            f"the client was silent for {self._client_silence_s:g} s", remedy="check its network", phase="stream"
        )
        requests = [ticket.request for ticket in self._tickets.values() if ticket.client == client]
        goodbyes = [Say(client, ErrorReport.of(error, request=request)) for request in requests]
        return [*self.client_gone(client), *goodbyes]

    def _forget(self, ticket: Ticket) -> None:
        del self._tickets[ticket.client, ticket.request]
        if ticket.session is not None:
            del self._by_session[ticket.session]
        if not any(other.client == ticket.client for other in self._tickets.values()):
            del self._leases[ticket.client]


def _pieces(ticket: Ticket, index: int, tokens: tuple[int, ...], text: str) -> Iterable[Say]:
    """Cut tokens and text into messages within the bounds of `Piece`; the text goes with the first ones."""
    while tokens or text:
        piece = Piece(
            request=ticket.request, index=index, text=text[:MAX_PIECE_CHARS], tokens=tokens[:MAX_PIECE_TOKENS]
        )
        yield Say(ticket.client, piece)
        index += len(piece.tokens)
        tokens, text = tokens[MAX_PIECE_TOKENS:], text[MAX_PIECE_CHARS:]

"""The clients' side: requests with their names, streams of text, who listens, who has gone.

Knows nothing of sockets, threads, files or clocks. What arrives and the time come in; out come `Say` (a message for a
client), records for the token log and events for the core, to be carried out in order.

    opened --submit--> queued --committed--> streaming --ended | failed--> kept for a while --> forgotten
      \\________\\___________\\__cancel, stop string, nobody came back____/

A request belongs to its name, not to a connection: whoever says the name goes on listening where it stopped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from coordinator.answer_text import AnswerText
from coordinator.ended_requests import EndedRequest, EndedRequests, whole_answer
from coordinator.events import Effect, RequestArrived, RequestCancelled, SessionEnded, SessionFailed, TokensCommitted
from coordinator.tickets import Listener, Say, Ticket, fitting
from coordinator.token_log import Begun, Ended, Entry, Forgotten, Grown, Outcome, Record
from coordinator.tokens import TextCodec
from protocol.errors import (
    Cancelled,
    ManyhandsError,
    Overloaded,
    RequestInvalid,
    RequestUnknown,
    TokenizerMissing,
)
from protocol.ids import RequestId, SessionId
from protocol.liveness import Lease
from protocol.messages import (
    Cancel,
    ErrorReport,
    Finished,
    FinishReason,
    Generate,
    PromptKind,
    Resume,
    Timings,
    Usage,
    Waiting,
)

SAY_EVERY_S = 1.0
MAX_READING = 64  # prompts being turned into tokens at once
MAX_OPEN_PER_CLIENT = 256
MAX_PHASE_CHARS = 1000
READING = "reading the prompt"

Act = Say | RequestArrived | RequestCancelled | Record


class Desk:
    """All requests of all clients. `codec` None: the model has no tokenizer, so only token ids are taken."""

    def __init__(
        self,
        codec: TextCodec | None,
        *,
        eos: Iterable[int],
        client_silence_s: float,
        client_return_s: float,
        first_session: int = 1,
    ) -> None:
        """`client_return_s`: how long a request goes on while nobody listens. Sessions are numbered from the first."""
        self._codec = codec
        self._eos = frozenset(eos)
        self._client_silence_s = client_silence_s
        self._client_return_s = client_return_s
        self._numbers = itertools.count(first_session)
        self._tickets: dict[RequestId, Ticket] = {}
        self._by_session: dict[SessionId, Ticket] = {}
        self._ended = EndedRequests()
        self._leases: dict[bytes, Lease] = {}  # of connections that listen

    @property
    def num_open(self) -> int:
        """How many requests have not ended."""
        return len(self._tickets)

    def stop_tokens(self, order: Generate) -> frozenset[int]:
        """Return the tokens that end an answer to this request."""
        return frozenset() if order.ignore_eos else self._eos

    # ------------------------------------------------------------ connections

    def heard(self, client: bytes, now: float) -> None:
        """Note that a client lives; only of interest while it listens."""
        if client in self._leases:
            self._leases[client].heard(now)

    def client_gone(self, client: bytes, now: float) -> None:
        """Say nothing more to a client that can't be reached or has fallen silent; its requests go on for a while."""
        for ticket in self._tickets.values():
            ticket.detach(client, now)
        self._leases.pop(client, None)

    def _listen(self, ticket: Ticket, client: bytes, listener: Listener, now: float) -> None:
        listening = sum(1 for other in self._tickets.values() if client in other.listeners and other is not ticket)
        if listening >= MAX_OPEN_PER_CLIENT:
            raise Overloaded(f"{MAX_OPEN_PER_CLIENT} requests of this client are open", remedy="wait for some to end")
        ticket.attach(client, listener)
        self._leases.setdefault(client, Lease(self._client_silence_s)).heard(now)

    # ------------------------------------------------------------ requests

    def open(self, client: bytes, order: Generate, digest: bytes, now: float) -> Ticket:
        """Take a new request in; its prompt is read next (`coordinator.prompts`), then `submit` or `refuse`.

        Raises TokenizerMissing for text without a tokenizer, Overloaded when too many prompts are being read.
        """
        if len(self._tickets) - len(self._by_session) >= MAX_READING:
            raise Overloaded(f"{MAX_READING} prompts are being read", remedy="ask again in a moment")
        if self._codec is None and (order.prompt_kind is not PromptKind.IDS or order.stop):
            raise TokenizerMissing("this model has no tokenizer, so it takes no text and knows no stop strings")
        ticket = Ticket(order=order, digest=digest, answer=AnswerText(self._codec, order.stop), last_said=now)
        self._listen(ticket, client, Listener(), now)
        self._tickets[order.request] = ticket
        return ticket

    def repeated(self, client: bytes, order: Generate, digest: bytes, now: float) -> list[Act] | None:
        """Answer a request that is known, from its beginning; None for a new one, or one to be tried again.

        Raises RequestInvalid when the name stands for something else, Overloaded.
        """
        ticket, ended = self._tickets.get(order.request), self._ended.get(order.request)
        known = ticket or ended
        if known is None:
            return None
        if known.digest != digest:
            raise RequestInvalid(
                f"request {order.request!r} was something else before", remedy="give every request a name of its own"
            )
        if ticket is not None:
            return self._go_on(ticket, client, Listener(), now)
        return self._tell_again(ended, client, Listener()) if ended is not None and ended.is_answered else None

    def resume(self, client: bytes, resume: Resume, now: float) -> list[Act]:
        """Go on with a stream where a client stopped to hear it; raises RequestUnknown, RequestInvalid, Overloaded."""
        ticket, ended = self._tickets.get(resume.request), self._ended.get(resume.request)
        known, listener = ticket or ended, Listener(resume.tokens, resume.chars)
        if known is None:
            raise RequestUnknown(f"request {resume.request!r} is not known here")
        if resume.tokens > known.order.max_tokens:
            raise RequestInvalid(f"{resume.tokens} tokens are more than were asked for: {known.order.max_tokens}")
        if ticket is not None:
            return self._go_on(ticket, client, listener, now)
        return [] if ended is None else self._tell_again(ended, client, listener)

    def _go_on(self, ticket: Ticket, client: bytes, listener: Listener, now: float) -> list[Act]:
        self._listen(ticket, client, listener, now)
        if ticket.session is None:
            return []
        return [Say(client, ticket.accepted), *listener.catch_up(client, ticket.request, ticket.answer)]

    def _tell_again(self, ended: EndedRequest, client: bytes, listener: Listener) -> list[Act]:
        answer, outcome = ended.told(self._codec)
        return [
            Say(client, ended.accepted),
            *listener.catch_up(client, ended.order.request, answer),
            listener.last_word(client, answer, outcome),
        ]

    def is_open(self, ticket: Ticket) -> bool:
        """Say whether a ticket still counts: nobody has cancelled it while its prompt was read."""
        return self._tickets.get(ticket.request) is ticket

    def submit(self, ticket: Ticket, prompt: bytes, now: float) -> list[Act]:
        """Queue a request whose prompt has been read (little-endian int32)."""
        if not self.is_open(ticket):
            return []
        ticket.session = session = SessionId(next(self._numbers))
        self._by_session[session] = ticket
        ticket.last_said, ticket.num_prompt = now, len(prompt) // 4
        order = ticket.order
        acts: list[Act] = []
        if self._ended.get(ticket.request) is not None:  # it failed before and is tried again
            acts.append(Forgotten(session=self._ended.drop(ticket.request)))
        acts.append(Begun(session=session, order=order, digest=ticket.digest, prompt=prompt))
        acts += ticket.tell_all(ticket.accepted)
        acts.append(
            RequestArrived(
                session=session,
                prompt=prompt,
                max_tokens=order.max_tokens,
                sampling=order.sampling,
                stop_tokens=self.stop_tokens(order),
            )
        )
        return acts

    def refuse(self, ticket: Ticket, error: ManyhandsError) -> list[Act]:
        """End a request whose prompt can't be used."""
        if not self.is_open(ticket):
            return []
        self._forget(ticket)
        return [*ticket.tell_all(ErrorReport.of(error, request=ticket.request))]

    def cancel(self, client: bytes, cancel: Cancel, now: float) -> list[Act]:
        """Stop a request, whoever listens; one that has ended says so again."""
        ticket, ended = self._tickets.get(cancel.request), self._ended.get(cancel.request)
        if ended is not None and ticket is None:
            return [Say(client, ended.outcome)]
        if ticket is None:
            error = RequestUnknown(f"request {cancel.request!r} is not known here")
            return [Say(client, ErrorReport.of(error, request=cancel.request))]
        if client not in ticket.listeners:  # it came back only to say this
            here = Listener(len(ticket.answer.tokens), len(ticket.answer.text))
            self._listen(ticket, client, here, now)
        if ticket.session is not None:  # the core answers with SessionEnded
            return [RequestCancelled(session=ticket.session)]
        self._forget(ticket)
        nothing = Timings(queued_s=0.0, first_token_s=0.0, total_s=0.0)
        usage = Usage(prompt_tokens=0, completion_tokens=0)
        finished = Finished(request=ticket.request, reason=FinishReason.CANCELLED, usage=usage, timings=nothing)
        return [*ticket.tell_all(finished)]

    # ------------------------------------------------------------ what the core says

    def records(self, effects: Iterable[Effect]) -> list[Record]:
        """Return what must be in the token log before these effects are shown to anybody."""
        records: list[Record] = []
        for effect in effects:
            match effect:
                case TokensCommitted() if effect.session in self._by_session:
                    records.append(Grown(session=effect.session, start=effect.index, tokens=effect.tokens))
                case SessionEnded() | SessionFailed() if effect.session in self._by_session:
                    outcome = self._outcome(self._by_session[effect.session], effect)
                    records.append(Ended(session=effect.session, outcome=outcome))
        return records

    def committed(self, effect: TokensCommitted, now: float) -> list[Act]:
        """Pass new tokens on, with the text they make certain; a stop string ends the session."""
        ticket = self._by_session.get(effect.session)
        if ticket is None or ticket.answer.is_stopped:
            return []
        ticket.last_said = now
        ticket.answer.push(effect.tokens)
        acts: list[Act] = [*ticket.catch_up()]
        if ticket.answer.is_stopped:
            acts.append(RequestCancelled(session=effect.session, reason=FinishReason.STOP))
        return acts

    def ended(self, effect: SessionEnded | SessionFailed, now: float) -> list[Act]:
        """Say the last words of a session, and keep it for a while."""
        ticket = self._by_session.get(effect.session)
        if ticket is None:
            return []
        self._forget(ticket)
        if isinstance(effect, SessionEnded) and effect.reason is not FinishReason.CANCELLED:
            ticket.answer.finish()
        outcome = self._outcome(ticket, effect)
        self._ended.put(ticket.kept(outcome, now))
        acts: list[Act] = [*ticket.catch_up()]
        acts += [one.last_word(client, ticket.answer, outcome) for client, one in ticket.listeners.items()]
        return acts

    def _outcome(self, ticket: Ticket, effect: SessionEnded | SessionFailed) -> Outcome:
        if isinstance(effect, SessionFailed):
            return ErrorReport.of(effect.error, request=ticket.request)
        if ticket.given_up is not None:
            return ticket.given_up
        return Finished(
            request=ticket.request,
            reason=FinishReason.STOP if ticket.answer.is_stopped else effect.reason,
            usage=effect.usage,
            timings=effect.timings,
            legs=fitting(effect.legs),
        )

    # ------------------------------------------------------------ time

    def tick(self, now: float, phase_of: Callable[[SessionId], str]) -> list[Act]:
        """Give up what nobody came back for, and tell the others every second what their requests wait for."""
        for client in [client for client, lease in self._leases.items() if lease.is_over(now)]:
            self.client_gone(client, now)
        acts: list[Act] = [Forgotten(session=session) for session in self._ended.prune(now)]
        for ticket in list(self._tickets.values()):
            if ticket.alone_since is not None:
                if now - ticket.alone_since >= self._client_return_s and ticket.given_up is None:
                    acts += self._give_up(ticket)
            elif now - ticket.last_said >= SAY_EVERY_S:
                ticket.last_said = now
                phase = READING if ticket.session is None else phase_of(ticket.session)
                acts += ticket.tell_all(Waiting(request=ticket.request, phase=phase[:MAX_PHASE_CHARS]))
        return acts

    def _give_up(self, ticket: Ticket) -> list[Act]:
        if ticket.session is None:
            self._forget(ticket)
            return []
        error = Cancelled(
            f"nobody listened for {self._client_return_s:g} s",
            remedy="ask again, and check the network",
            phase="stream",
        )
        ticket.given_up = ErrorReport.of(error, request=ticket.request)
        return [RequestCancelled(session=ticket.session)]

    def close(self, error: ManyhandsError) -> list[Act]:
        """End what is still open; call it after the core has ended its sessions."""
        acts: list[Act] = []
        for ticket in list(self._tickets.values()):
            report = ErrorReport.of(error, request=ticket.request)
            if ticket.session is not None:
                acts.append(Ended(session=ticket.session, outcome=report))
            acts += self.refuse(ticket, error)
        return acts

    # ------------------------------------------------------------ over a restart

    def restore(self, entry: Entry, now: float, unix_now: float) -> list[Act]:
        """Take over a session of an earlier start; nobody listens to it yet."""
        order, outcome = entry.order, entry.outcome
        if outcome is not None:
            age_s = max(0.0, unix_now - (entry.ended_s or 0.0))
            self._ended.put(
                EndedRequest(
                    session=entry.session, order=order, digest=entry.digest, num_prompt=entry.num_prompt,
                    tokens=entry.answer, outcome=outcome, ended_at=now - age_s,
                )
            )  # fmt: skip
            return []
        ticket = Ticket(
            order=order, digest=entry.digest, answer=whole_answer(self._codec, order, entry.answer, None),
            last_said=now, session=entry.session, num_prompt=entry.num_prompt, alone_since=now,
        )  # fmt: skip
        self._tickets[order.request] = self._by_session[entry.session] = ticket
        if not ticket.answer.is_stopped:
            return []
        return [RequestCancelled(session=entry.session, reason=FinishReason.STOP)]

    # ------------------------------------------------------------ bookkeeping

    def _forget(self, ticket: Ticket) -> None:
        del self._tickets[ticket.request]
        if ticket.session is not None:
            del self._by_session[ticket.session]
        listening = {client for other in self._tickets.values() for client in other.listeners}
        for client in ticket.listeners.keys() - listening:
            self._leases.pop(client, None)

"""One open request at the desk: what was asked, its answer so far, and how much of it each connection was told.

Knows nothing of other requests, leases or sockets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from coordinator.answer_text import AnswerText
from coordinator.ended_requests import EndedRequest
from coordinator.token_log import Outcome
from protocol.errors import SessionLost
from protocol.frames import Buffer, encode
from protocol.ids import RequestId, SessionId
from protocol.messages import Accepted, ErrorReport, Generate, Leg, Piece

MAX_PIECE_CHARS = 8192  # at most 4 bytes each: well inside a header
MAX_PIECE_TOKENS = 1024
MAX_LISTENERS = 8  # of one request; the one that came first makes place
MAX_LEG_BYTES = 32 * 1024  # of all legs of an answer, well inside a header


class Say(NamedTuple):
    """A message for a client, by its routing id."""

    client: bytes
    message: object


@dataclass(slots=True, eq=False)
class Listener:
    """How much of an answer one connection has: so many tokens, so many characters.

    Maybe more than there is: after a power cut the log has lost what a client has seen, and it is computed again.
    """

    num_tokens: int = 0
    num_chars: int = 0

    def catch_up(self, client: bytes, request: RequestId, answer: AnswerText) -> Iterator[Say]:
        """Yield what is new for it, in messages within the bounds of `Piece`; the text goes with the first tokens."""
        while self.num_tokens < len(answer.tokens) or self.num_chars < len(answer.text):
            text = answer.text[self.num_chars : self.num_chars + MAX_PIECE_CHARS]
            tokens = tuple(answer.tokens[self.num_tokens : self.num_tokens + MAX_PIECE_TOKENS])
            yield Say(client, Piece(request=request, index=self.num_tokens, text=text, tokens=tokens))
            self.num_tokens += len(tokens)
            self.num_chars += len(text)

    def last_word(self, client: bytes, answer: AnswerText, outcome: Outcome) -> Say:
        """Say how it ended; to one who has seen more than that, that something is wrong."""
        if not isinstance(outcome, ErrorReport) and self.num_tokens > len(answer.tokens):
            error = SessionLost(
                f"the answer has ended after {len(answer.tokens)} tokens, but {self.num_tokens} were sent before",
                remedy="ask again; the coordinator lost what it knew, and what it computed anew differs",
            )
            return Say(client, ErrorReport.of(error, request=outcome.request))
        return Say(client, outcome)


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket:
    """An open request. `session` is set when its prompt has been read; `listeners` are connections, by routing id.

    `alone_since`: since when nobody listens. `given_up`: why its session was cancelled, when nobody came back.
    """

    order: Generate
    digest: bytes
    answer: AnswerText
    last_said: float
    session: SessionId | None = None
    num_prompt: int = 0
    listeners: dict[bytes, Listener] = field(default_factory=dict)
    alone_since: float | None = None
    given_up: ErrorReport | None = None

    @property
    def request(self) -> RequestId:
        """The client's name for it."""
        return self.order.request

    @property
    def accepted(self) -> Accepted:
        """What is said when its prompt has been read."""
        return Accepted(request=self.request, session=self.session or SessionId(0), prompt_tokens=self.num_prompt)

    def kept(self, outcome: Outcome, now: float) -> EndedRequest:
        """Return what is kept of it when it has ended."""
        return EndedRequest(
            session=self.session or SessionId(0), order=self.order, digest=self.digest, num_prompt=self.num_prompt,
            tokens=self.answer.tokens, outcome=outcome, ended_at=now,
        )  # fmt: skip

    def attach(self, client: bytes, listener: Listener) -> None:
        """Let a connection listen, from where it is; one that listens already begins anew there."""
        self.listeners.pop(client, None)
        while len(self.listeners) >= MAX_LISTENERS:
            del self.listeners[next(iter(self.listeners))]
        self.listeners[client] = listener
        self.alone_since = None

    def detach(self, client: bytes, now: float) -> None:
        """A connection is gone; without effect for one that does not listen."""
        if self.listeners.pop(client, None) is not None and not self.listeners:
            self.alone_since = now

    def catch_up(self) -> list[Say]:
        """Tell everybody what is new."""
        return [
            say
            for client, listener in self.listeners.items()
            for say in listener.catch_up(client, self.request, self.answer)
        ]

    def tell_all(self, message: object) -> list[Say]:
        """Say the same to everybody who listens."""
        return [Say(client, message) for client in self.listeners]


def digest_of(order: Generate, payload: Buffer) -> bytes:
    """Return the digest of a request, by which a repeated one is told from another one of the same name."""
    digest = hashlib.sha256(encode(order)[0])
    digest.update(payload)
    return digest.digest()


def fitting(legs: tuple[Leg, ...]) -> tuple[Leg, ...]:
    """Return the latest legs, as many as fit a message."""
    room = MAX_LEG_BYTES
    for number, leg in enumerate(reversed(legs)):
        texts = (leg.words, leg.cause, *leg.stages)
        room -= 64 + sum(len(text.encode()) + 4 for text in texts)
        if room < 0:
            return legs[len(legs) - number :]
    return legs

"""Makes join links and enrols who comes with one; keeps one standing link at hand.

Knows nothing of sockets. Writes to the journal before anything becomes effective.
"""

from __future__ import annotations

from coordinator.admission import AccessBook, Pin, Token
from coordinator.journal import Journal
from protocol.messages import Enroll
from protocol.security import KeyPair, Link

KEEP_SPENT_S = 7 * 24 * 3600.0  # how long a spent or expired invitation is still told why it is refused


class Invitations:
    """The invitations of a running coordinator. Times are unix time in seconds."""

    def __init__(
        self, journal: Journal, book: AccessBook, *, server_key: bytes, addresses: tuple[str, ...], good_for_s: float
    ) -> None:
        self._journal = journal
        self._book = book
        self._server_key = server_key
        self._addresses = addresses
        self._good_for_s = good_for_s
        self._standing: Token | None = None

    def make(self, *, trusted: bool, now: float) -> str:
        """Return a fresh join link; its worker may be the head when `trusted`."""
        return self._invite(trusted, now)[1]

    def renew_standing(self, now: float) -> str | None:
        """Return a new standing link when there is none yet, or the last one has been spent or has expired."""
        if self._standing is not None and now < self._standing.expires_at_s:
            return None
        self._standing, link = self._invite(False, now)
        return link

    def enroll(self, invitation: bytes, asked: Enroll, now: float) -> Pin:
        """Pin a guest's key and spend its invitation; raises AccessRefused."""
        enrolment = self._book.enroll(invitation, asked, now=now)
        if not enrolment.is_repeat:
            self._journal.record(enrolment)
            self._book.record(enrolment)
        if self._standing is not None and self._standing.public_key == invitation:
            self._standing = None
        return enrolment.pin

    def _invite(self, trusted: bool, now: float) -> tuple[Token, str]:
        keys = KeyPair.generate()
        token = Token(public_key=keys.public, trusted=trusted, expires_at_s=now + self._good_for_s)
        self._journal.add_token(token)
        self._book.add_token(token)
        link = Link(role="join", addresses=self._addresses, server_key=self._server_key, secret=keys.secret)
        return token, link.format()

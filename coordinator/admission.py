"""Who may say what: the keys the coordinator knows, their roles, and the decision to admit, enrol or refuse.

Knows nothing of sockets, files or clocks: keys and the time come in, a `Party`, an `Enrolment` or a typed error
goes out.

    key of a client      -> client
    key of an invitation -> invited guest: may enrol one key of its own, once
    pinned key           -> worker, or head when its invitation was a trusted one
    any other            -> not known; the gate does not finish the handshake

A spent or expired invitation and a revoked worker stay known, so that they are told why instead of hearing nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from protocol.errors import AccessRefused
from protocol.frames import negotiate
from protocol.ids import WorkerId, worker_id
from protocol.messages import ROW_OF, ClientHello, Enroll, Hello, Role
from protocol.security import is_key

MAX_NAME_CHARS = 63
WORKER_ROLES = frozenset({Role.WORKER, Role.HEAD})


class Party(NamedTuple):
    """Who stands behind a key: the role and, for a worker, its name."""

    role: Role
    name: str


class Channel(StrEnum):
    """The three connections of a worker."""

    CONTROL = "control"
    BULK = "bulk"
    DATA = "data"


CHANNELS = frozenset(Channel)


class Route(NamedTuple):
    """One of a worker's connections, as its routing id says: `<worker>/<channel>` or `<worker>/<channel>/<nonce>`.

    A nonce that only the worker and the coordinator know keeps other workers from taking the name of a connection
    before its owner dials; a fresh one at every start keeps a restarted worker apart from its own dead connection.
    """

    worker: WorkerId
    channel: Channel
    nonce: str = ""

    def routing_id(self) -> bytes:
        """Return the routing id that is written like this."""
        return "/".join(part for part in (self.worker, self.channel.value, self.nonce) if part).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """A worker's key, pinned to its name and role."""

    worker: WorkerId
    public_key: bytes
    role: Role
    pinned_at_s: float  # unix time
    revoked: bool = False

    def __post_init__(self) -> None:
        if self.role not in WORKER_ROLES:
            raise ValueError(f"a pinned key is of a worker or of the head, not of {self.role}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """An invitation: its public key, whether its worker may be the head, until when, and who has spent it."""

    public_key: bytes
    trusted: bool
    expires_at_s: float  # unix time
    spent_by: bytes = b""  # the key that was pinned with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """What to write down when a guest is enrolled; `is_repeat`: it was before, and only asks again."""

    pin: Pin
    token: Token
    is_repeat: bool


class AccessBook:
    """The keys in memory. `knows` may be called from the gate's thread: it only looks into dicts."""

    def __init__(self, *, pins: Iterable[Pin], tokens: Iterable[Token], clients: Iterable[bytes]) -> None:
        self._pins = {pin.public_key: pin for pin in pins}
        self._tokens = {token.public_key: token for token in tokens}
        self._clients = frozenset(clients)

    def knows(self, public_key: bytes) -> bool:
        """Say whether the handshake of this key may finish."""
        return public_key in self._pins or public_key in self._tokens or public_key in self._clients

    def party_of(self, public_key: bytes) -> Party:
        """Return who stands behind a key; raises AccessRefused for a key that is unknown or revoked."""
        if public_key in self._clients:
            return Party(Role.CLIENT, "")
        if public_key in self._tokens:
            return Party(Role.INVITED, "")
        pin = self._pins.get(public_key)
        if pin is None:
            raise AccessRefused("this key is not known here", phase="admission")
        if pin.revoked:
            raise AccessRefused(f"the key of worker {pin.worker} has been revoked", node=pin.worker, phase="admission")
        return Party(pin.role, pin.worker)

    def pin_of(self, worker: str) -> Pin | None:
        """Return the key that holds a worker's name, or None."""
        return next((pin for pin in self._pins.values() if pin.worker == worker), None)

    def enroll(self, invitation: bytes, asked: Enroll, *, now: float) -> Enrolment:
        """Decide whether a guest's own key is pinned, and under which name; `record` makes it so.

        Asking again with the same key is answered alike (the first answer may have been lost). Raises AccessRefused
        when the invitation is unknown, spent by another key or expired, or the key can't be a worker's.
        """
        token = self._tokens.get(invitation)
        if token is None:
            raise AccessRefused("this key is no invitation", phase="enrolment")
        self._require_worker_key(asked.public_key)
        pin = self._pins.get(asked.public_key)
        if token.spent_by and token.spent_by != asked.public_key:
            raise AccessRefused("this invitation has been spent by another worker", phase="enrolment")
        if pin is not None and pin.revoked:
            raise AccessRefused(f"the key of worker {pin.worker} has been revoked", node=pin.worker, phase="enrolment")
        if token.spent_by and pin is not None:
            return Enrolment(pin=pin, token=token, is_repeat=True)
        if now >= token.expires_at_s:
            raise AccessRefused("this invitation has expired", phase="enrolment")
        role = Role.HEAD if token.trusted else Role.WORKER
        if pin is None:
            name = self._free_name(asked.name)
            pin = Pin(worker=name, public_key=asked.public_key, role=role, pinned_at_s=now)
        elif token.trusted:  # a known worker that is trusted from now on; an ordinary invitation takes no trust away
            pin = replace(pin, role=role)
        return Enrolment(pin=pin, token=replace(token, spent_by=asked.public_key), is_repeat=False)

    def record(self, enrolment: Enrolment) -> None:
        """Make an enrolment effective; write it to the journal first."""
        self._pins[enrolment.pin.public_key] = enrolment.pin
        self._tokens[enrolment.token.public_key] = enrolment.token

    def add_token(self, token: Token) -> None:
        """Make a new invitation known."""
        self._tokens[token.public_key] = token

    def revoke(self, worker: str) -> Pin:
        """Refuse a worker's key from now on; raises AccessRefused for a name that nobody holds."""
        pin = self.pin_of(worker)
        if pin is None:
            raise AccessRefused(f"there is no worker {worker!r}", remedy="`manyhands status` lists the workers")
        self._pins[pin.public_key] = revoked = replace(pin, revoked=True)
        return revoked

    def _require_worker_key(self, public_key: bytes) -> None:
        if not is_key(public_key):
            raise AccessRefused("the key to pin is no CURVE public key", phase="enrolment")
        if public_key in self._tokens or public_key in self._clients:
            raise AccessRefused("the key to pin is already used in another role", phase="enrolment")

    def _free_name(self, asked: str) -> WorkerId:
        taken = {pin.worker for pin in self._pins.values()}
        try:
            base = worker_id(asked)
        except ValueError as error:
            raise AccessRefused(str(error), remedy="choose another --name", phase="enrolment") from error
        if base not in taken:
            return base
        numbers = range(2, len(taken) + 3)  # one of them is free
        names = (f"{base[: MAX_NAME_CHARS - len(str(n)) - 1]}-{n}" for n in numbers)
        return WorkerId(next(name for name in names if name not in taken))


def require_may_send(party: Party, message: object) -> None:
    """Raise AccessRefused unless the message table lets this role send this message to the coordinator."""
    row = ROW_OF[type(message)]
    if party.role not in row.senders or Role.COORDINATOR not in row.receivers:
        raise AccessRefused(
            f"a key of role {party.role} may not send {row.message.__name__} to the coordinator",
            node=party.name,
            phase="admission",
            remedy="use the link that was made for this purpose",
        )


def route_of(party: Party, routing_id: bytes) -> Route:
    """Return which of a worker's connections this is; raises AccessRefused when it is named after somebody else."""
    worker, _, rest = routing_id.decode("ascii", "replace").partition("/")
    channel, _, nonce = rest.partition("/")
    if worker != party.name or channel not in CHANNELS:
        raise AccessRefused(
            f"the key of worker {party.name} can't use the routing id {routing_id[:80]!r}",
            node=party.name,
            phase="admission",
            remedy=f"name the connections {party.name}/control, {party.name}/bulk and {party.name}/data",
        )
    return Route(WorkerId(party.name), Channel(channel), nonce)


def agree_version(hello: Hello | ClientHello | Enroll, *, node: str, own_software: str) -> int:
    """Return the protocol version to speak; raises VersionMismatch naming both ranges and releases."""
    return negotiate(hello.oldest_version, hello.version, node=node, software=hello.software, own_software=own_software)


def require_own_name(party: Party, claimed: str) -> None:
    """Raise AccessRefused when a worker says Hello under a name that its key is not pinned to."""
    if claimed != party.name:
        raise AccessRefused(
            f"this key is pinned to worker {party.name}, not to {claimed!r:.80}",
            node=party.name,
            phase="admission",
            remedy="remove the worker's state folder and join again with a fresh link",
        )


def is_worker(party: Party) -> bool:
    """Say whether a party computes."""
    return party.role in WORKER_ROLES

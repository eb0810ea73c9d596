"""Who is admitted, by table: roles, enrolment, routing ids, versions."""

from __future__ import annotations

import pytest
import zmq

from coordinator.admission import (
    AccessBook,
    Channel,
    Party,
    Pin,
    Route,
    Token,
    agree_version,
    require_may_send,
    require_own_name,
    route_of,
)
from protocol.errors import AccessRefused, VersionMismatch
from protocol.ids import RequestId, SessionId, WorkerId
from protocol.messages import (
    OLDEST_VERSION,
    VERSION,
    Accepted,
    Activation,
    Cancel,
    ClientHello,
    Enroll,
    Heartbeat,
    InviteRequest,
    Role,
    StatusRequest,
    StepDone,
    TileRequest,
    WorkerPhase,
)
from protocol.specs import ActivationFormat


def key() -> bytes:
    return zmq.curve_keypair()[0]


PI, HEAD, REVOKED, CLIENT, PLAIN, TRUSTED, SPENT, EXPIRED = (key() for _ in range(8))
NOW = 1000.0


def book() -> AccessBook:
    return AccessBook(
        pins=[
            Pin(worker=WorkerId("pi"), public_key=PI, role=Role.WORKER, pinned_at_s=1.0),
            Pin(worker=WorkerId("desk"), public_key=HEAD, role=Role.HEAD, pinned_at_s=1.0),
            Pin(worker=WorkerId("old"), public_key=REVOKED, role=Role.WORKER, pinned_at_s=1.0, revoked=True),
        ],
        tokens=[
            Token(public_key=PLAIN, trusted=False, expires_at_s=NOW + 1),
            Token(public_key=TRUSTED, trusted=True, expires_at_s=NOW + 1),
            Token(public_key=SPENT, trusted=False, expires_at_s=NOW + 1, spent_by=PI),
            Token(public_key=EXPIRED, trusted=False, expires_at_s=NOW),
        ],
        clients=[CLIENT],
    )


def ask(public_key: bytes, name: str = "pi", oldest: int = VERSION, version: int = VERSION) -> Enroll:
    return Enroll(oldest_version=oldest, version=version, software="test 9", name=name, public_key=public_key)


@pytest.mark.parametrize(
    ("public_key", "party"),
    [
        (PI, Party(Role.WORKER, "pi")),
        (HEAD, Party(Role.HEAD, "desk")),
        (CLIENT, Party(Role.CLIENT, "")),
        (PLAIN, Party(Role.INVITED, "")),
        (SPENT, Party(Role.INVITED, "")),
        (EXPIRED, Party(Role.INVITED, "")),
    ],
)
def test_a_known_key_has_one_role(public_key: bytes, party: Party) -> None:
    assert book().knows(public_key)
    assert book().party_of(public_key) == party


def test_a_stranger_is_not_known_and_a_revoked_worker_is_told() -> None:
    stranger = key()
    assert not book().knows(stranger)
    with pytest.raises(AccessRefused, match="not known"):
        book().party_of(stranger)
    assert book().knows(REVOKED)
    with pytest.raises(AccessRefused, match="worker old has been revoked"):
        book().party_of(REVOKED)


@pytest.mark.parametrize(
    ("invitation", "name", "expected_name", "role"),
    [
        (PLAIN, "fresh", "fresh", Role.WORKER),
        (TRUSTED, "fresh", "fresh", Role.HEAD),
        (PLAIN, "pi", "pi-2", Role.WORKER),
        (PLAIN, "old", "old-2", Role.WORKER),  # a revoked key keeps its name taken
        (PLAIN, "x" * 63, "x" * 63, Role.WORKER),
    ],
)
def test_a_fresh_key_is_pinned_under_a_free_name(invitation: bytes, name: str, expected_name: str, role: Role) -> None:
    own, access = key(), book()
    enrolment = access.enroll(invitation, ask(own, name), now=NOW)
    assert (enrolment.pin.worker, enrolment.pin.role, enrolment.is_repeat) == (expected_name, role, False)
    assert enrolment.token.spent_by == own
    assert not access.knows(own)  # deciding changes nothing
    access.record(enrolment)
    assert access.party_of(own) == Party(role, expected_name)


def test_names_stay_unique_and_in_bounds() -> None:
    access = AccessBook(pins=[], tokens=[Token(public_key=key(), trusted=False, expires_at_s=9.0)] * 0, clients=[])
    names = []
    for _ in range(12):
        token = Token(public_key=key(), trusted=False, expires_at_s=NOW + 1)
        access.add_token(token)
        enrolment = access.enroll(token.public_key, ask(key(), "n" * 63), now=NOW)
        access.record(enrolment)
        names.append(enrolment.pin.worker)
    assert len(set(names)) == 12
    assert all(len(name) <= 63 for name in names)
    assert names[1].endswith("-2") and names[11].endswith("-12")


def test_asking_again_is_answered_alike_and_spends_nothing_more() -> None:
    own, access = key(), book()
    first = access.enroll(PLAIN, ask(own), now=NOW)
    access.record(first)
    again = access.enroll(PLAIN, ask(own), now=NOW + 100)  # even after the invitation has expired
    assert again.is_repeat
    assert again.pin == first.pin


def test_a_known_worker_rises_by_a_trusted_invitation_and_never_falls() -> None:
    access = book()
    assert access.enroll(TRUSTED, ask(PI), now=NOW).pin.role is Role.HEAD
    assert access.enroll(PLAIN, ask(HEAD), now=NOW).pin.role is Role.HEAD
    assert access.enroll(PLAIN, ask(HEAD), now=NOW).pin.worker == "desk"


@pytest.mark.parametrize(
    ("invitation", "asked", "told"),
    [
        (PI, ask(key()), "no invitation"),
        (SPENT, ask(key()), "spent"),
        (EXPIRED, ask(key()), "expired"),
        (PLAIN, ask(REVOKED), "revoked"),
        (PLAIN, ask(CLIENT), "another role"),
        (PLAIN, ask(PLAIN), "another role"),
        (PLAIN, ask(b"\xff" * 40), "no CURVE public key"),
        (PLAIN, ask(key(), "no spaces"), "letters, digits"),
        (PLAIN, ask(key(), "a/b"), "letters, digits"),
    ],
)
def test_enrolment_is_refused_with_its_reason(invitation: bytes, asked: Enroll, told: str) -> None:
    with pytest.raises(AccessRefused, match=told) as caught:
        book().enroll(invitation, asked, now=NOW)
    assert caught.value.remedy


def test_revoking() -> None:
    access = book()
    assert access.revoke("pi").revoked
    with pytest.raises(AccessRefused, match="revoked"):
        access.party_of(PI)
    with pytest.raises(AccessRefused, match="no worker 'nobody'"):
        access.revoke("nobody")


HEARTBEAT = Heartbeat(
    sequence=1, epoch=0, phase=WorkerPhase.IDLE, progress=0, resident_bytes=0, weight_bytes=0, kv_bytes=0
)
STEP_DONE = StepDone(epoch=1, step=1, tokens=(), step_s=0.1)
TILE = TileRequest(digest=b"d" * 32, offset=0, length=1)
ACCEPTED = Accepted(request=RequestId("r"), session=SessionId(1), prompt_tokens=1)
ACTIVATION = Activation(epoch=1, step=1, stage=0, format=ActivationFormat.FLOAT32, rows=())
HELLO = ClientHello(oldest_version=VERSION, version=VERSION, software="")


@pytest.mark.parametrize(
    ("message", "allowed"),
    [
        (HEARTBEAT, {Role.WORKER, Role.HEAD}),
        (TILE, {Role.WORKER, Role.HEAD}),
        (STEP_DONE, {Role.HEAD}),
        (Cancel(request=RequestId("r")), {Role.CLIENT}),
        (StatusRequest(), {Role.CLIENT}),
        (InviteRequest(), {Role.CLIENT}),
        (HELLO, {Role.CLIENT}),
        (ask(PI), {Role.INVITED}),
        (ACCEPTED, set()),
        (ACTIVATION, set()),  # workers speak it to each other, never to the coordinator
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_table_decides_who_may_send(message: object, allowed: set[Role]) -> None:
    for role in (Role.INVITED, Role.WORKER, Role.HEAD, Role.CLIENT):
        if role in allowed:
            require_may_send(Party(role, "x"), message)
        else:
            with pytest.raises(AccessRefused, match=f"role {role} may not send {type(message).__name__}"):
                require_may_send(Party(role, "x"), message)


@pytest.mark.parametrize(
    ("routing_id", "channel", "nonce"),
    [
        (b"pi/control", "control", ""),
        (b"pi/bulk", "bulk", ""),
        (b"pi/data", "data", ""),
        (b"pi/data/7f3a", "data", "7f3a"),
    ],
)
def test_routing_ids_of_the_own_name_pass(routing_id: bytes, channel: str, nonce: str) -> None:
    route = route_of(Party(Role.WORKER, "pi"), routing_id)
    assert route == Route(WorkerId("pi"), Channel(channel), nonce)
    assert route.routing_id() == routing_id


@pytest.mark.parametrize(
    "routing_id", [b"desk/data", b"pi", b"pi/", b"pi/else", b"pi2/data", b"", b"\x00\xff\xfe/data"]
)
def test_routing_ids_of_another_name_are_refused(routing_id: bytes) -> None:
    with pytest.raises(AccessRefused, match="worker pi can't use the routing id"):
        route_of(Party(Role.WORKER, "pi"), routing_id)


def test_the_name_in_hello_must_be_the_pinned_one() -> None:
    require_own_name(Party(Role.WORKER, "pi"), "pi")
    with pytest.raises(AccessRefused, match="pinned to worker pi, not to 'desk'"):
        require_own_name(Party(Role.WORKER, "pi"), "desk")


def test_versions() -> None:
    assert agree_version(ask(PI), node="pi", own_software="manyhands 1") == VERSION
    ours = f"manyhands 1.*speaks {OLDEST_VERSION} to {VERSION}"
    with pytest.raises(VersionMismatch, match=rf"pi \(test 9\) speaks protocol 7 to 9.*{ours}"):
        agree_version(ask(PI, oldest=7, version=9), node="pi", own_software="manyhands 1")

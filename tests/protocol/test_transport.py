"""Sockets on loopback: who the gate lets in, what a ROUTER tells of its peers, and how dialling ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket as plain
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import zmq
import zmq.asyncio
from zmq.utils import z85

from protocol.errors import AccessRefused, ConfigInvalid, CoordinatorLost, InvariantBroken, LinkInvalid
from protocol.gate import ZAP_ENDPOINT, Gate
from protocol.security import KeyPair
from protocol.transport import bind_router, dial, dial_first, envelope_of, receive, receive_dealer

SERVER, KNOWN, STRANGER = KeyPair.generate(), KeyPair.generate(), KeyPair.generate()
DEADLINE_S = 10.0
DEADLINE_MS = 10_000
MIB = 2**20
REFUSALS = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class Host:
    """One listening side: context, gate and ROUTER, with the set of keys that it admits."""

    def __init__(self, admits: Callable[[bytes], bool] | None = None, with_gate: bool = True) -> None:
        self.known = {KNOWN.public}
        self.context = zmq.Context()
        self.gate = Gate(self.context, admits or (lambda key: key in self.known))
        if with_gate:
            self.gate.start()
        self.router, self.address = bind_router(self.context, SERVER, "tcp://127.0.0.1:0", MIB)
        self.monitor = self.router.get_monitor_socket(REFUSALS)

    def next_refusal(self) -> int:
        """Wait until somebody was turned away; return the event."""
        assert self.monitor.poll(DEADLINE_MS), "nobody was refused"
        return int.from_bytes(self.monitor.recv_multipart()[0][:2], "little")

    def has_message(self) -> bool:
        """Whether anything was let through, now."""
        return bool(self.router.poll(0))

    def close(self) -> None:
        """Close everything, the gate first."""
        self.router.disable_monitor()
        self.monitor.close()
        self.router.close()
        self.gate.close()
        self.context.term()


@contextlib.contextmanager
def hosted(**kwargs: Any) -> Iterator[Host]:
    """A host that is closed at the end, leaving no thread."""
    host = Host(**kwargs)
    try:
        yield host
    finally:
        host.close()
    assert "gate" not in [thread.name for thread in threading.enumerate()]


@pytest.fixture
def host() -> Iterator[Host]:
    with hosted() as one:
        yield one


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """The dialling side, so that no test talks to itself."""
    with zmq.Context() as one:
        yield one


def dial_as(
    context: zmq.Context[zmq.Socket[bytes]], host: Host, keys: KeyPair, server_key: bytes = SERVER.public
) -> zmq.Socket[bytes]:
    """Dial the host; a send raises `zmq.Again` when it can't be made in time."""
    socket = dial(context, host.address, keys, server_key, b"beta/data", MIB)
    socket.sndtimeo = socket.rcvtimeo = DEADLINE_MS
    return socket


# ---------------------------------------------------------------- the gate


def test_a_known_key_passes_and_is_told_to_the_router(host: Host, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with dial_as(context, host, KNOWN) as socket:
        socket.send_multipart([b"header", b"payload"])
        assert host.router.poll(DEADLINE_MS)
        envelope = envelope_of(host.router.recv_multipart(copy=False))
        assert envelope.routing_id == b"beta/data"
        assert envelope.public_key == KNOWN.public
        assert [bytes(frame) for frame in envelope.frames] == [b"header", b"payload"]
        host.router.send_multipart([envelope.routing_id, b"answer"])
        assert socket.recv_multipart() == [b"answer"]


def test_an_unknown_key_is_refused(host: Host, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with dial_as(context, host, STRANGER) as socket:
        assert host.next_refusal() == zmq.EVENT_HANDSHAKE_FAILED_AUTH
        with pytest.raises(zmq.Again):
            socket.send(b"x", zmq.NOBLOCK)
        assert not host.has_message()


def test_keys_come_and_go_while_the_gate_is_open(host: Host, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with dial_as(context, host, STRANGER):
        host.next_refusal()
    host.known.add(STRANGER.public)
    with dial_as(context, host, STRANGER) as socket:
        socket.send(b"let me in")
        assert host.router.poll(DEADLINE_MS)
    host.known.clear()
    with dial_as(context, host, KNOWN):
        assert host.next_refusal() == zmq.EVENT_HANDSHAKE_FAILED_AUTH


@pytest.mark.parametrize("is_plain", [False, True])
def test_peers_without_curve_are_refused(host: Host, context: zmq.Context[zmq.Socket[bytes]], is_plain: bool) -> None:
    with context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        if is_plain:
            socket.plain_username, socket.plain_password = b"user", b"password"
        socket.connect(host.address)
        socket.send(b"x")
        host.next_refusal()  # as a broken protocol or without detail: whose end sees it first
        assert not host.has_message()


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n" * 8, b"\xff" + bytes(8) + b"\x7f\x03" + b"\xff" * 200])
def test_bytes_that_are_no_zeromq_close_the_connection(host: Host, noise: bytes) -> None:
    where, _, port = host.address.removeprefix("tcp://").rpartition(":")
    with plain.create_connection((where, int(port)), timeout=DEADLINE_S) as connection:
        connection.sendall(noise)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(4096):
                pass
    assert not host.has_message()


def test_a_rule_that_raises_refuses_and_the_gate_lives_on(
    context: zmq.Context[zmq.Socket[bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    def admits(key: bytes) -> bool:
        if key == STRANGER.public:
            raise RuntimeError("journal is locked")
        return True

    with hosted(admits=admits) as host, dial_as(context, host, STRANGER):
        host.next_refusal()
        with dial_as(context, host, KNOWN) as socket:
            socket.send(b"x")
            assert host.router.poll(DEADLINE_MS)
    assert "journal is locked" in caplog.text
    assert caplog.records[0].levelno == logging.ERROR


def test_a_rule_that_does_not_say_true_refuses(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with hosted(admits=lambda key: "yes") as host, dial_as(context, host, KNOWN):
        assert host.next_refusal() == zmq.EVENT_HANDSHAKE_FAILED_AUTH


def test_without_a_gate_nobody_passes(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with hosted(with_gate=False) as host, dial_as(context, host, KNOWN):
        host.next_refusal()
        assert not host.has_message()


RAW_KEY = z85.decode(KNOWN.public)


@pytest.mark.parametrize(
    ("question", "status", "user"),
    [
        ([b"1.0", b"7", b"d", b"1.2.3.4", b"", b"CURVE", RAW_KEY], b"200", KNOWN.public),
        ([b"1.0", b"7", b"d", b"1.2.3.4", b"", b"CURVE", z85.decode(STRANGER.public)], b"400", b""),
        ([b"1.0", b"7", b"d", b"1.2.3.4", b"", b"CURVE", RAW_KEY, RAW_KEY], b"400", b""),
        ([b"1.0", b"7", b"d", b"1.2.3.4", b"", b"CURVE"], b"400", b""),
        ([b"1.0", b"7", b"d", b"1.2.3.4", b"", b"NULL"], b"400", b""),
        ([b"1.0", b"7", b"d", b"1.2.3.4", b"", b"PLAIN", b"user", b"password"], b"400", b""),
        ([b"1.0", b"7", b"d", b"\xff\xfe", b"", b"GSSAPI", b"me"], b"400", b""),
        ([b"2.0", b"7", b"d", b"1.2.3.4", b"", b"CURVE", RAW_KEY], b"500", b""),
        ([b"1.0", b"7"], b"500", b""),
    ],
)
def test_each_question_has_its_answer(host: Host, question: list[bytes], status: bytes, user: bytes) -> None:
    with host.context.socket(zmq.REQ) as asker:
        asker.linger, asker.rcvtimeo = 0, DEADLINE_MS
        asker.connect(ZAP_ENDPOINT)
        asker.send_multipart(question)
        version, request, code, _, who, metadata = asker.recv_multipart()
    assert (version, request, code, who, metadata) == (b"1.0", b"7", status, user, b"")


def test_a_gate_closes_twice_and_opens_again(host: Host) -> None:
    host.gate.close()
    host.gate.close()
    host.gate.start()
    with pytest.raises(InvariantBroken, match="open already"):
        host.gate.start()
    with pytest.raises(InvariantBroken, match="has a gate already"):
        Gate(host.context, lambda key: True).start()


def test_a_context_that_ends_takes_its_gate_along() -> None:
    context = zmq.Context()
    gate = Gate(context, lambda key: True)
    gate.start()
    context.term()  # would hang if the gate kept a socket
    gate.close()
    assert "gate" not in [thread.name for thread in threading.enumerate()]


def test_a_gate_that_breaks_says_so_and_refuses_everybody(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(question: list[bytes]) -> list[bytes]:
        raise zmq.ZMQError(zmq.EFSM)

    with hosted() as host:
        monkeypatch.setattr(host.gate, "_answer", broken)
        gate_thread = next(thread for thread in threading.enumerate() if thread.name == "gate")
        with host.context.socket(zmq.REQ) as asker:
            asker.linger = 0
            asker.connect(ZAP_ENDPOINT)
            asker.send(b"question")
            gate_thread.join(DEADLINE_S)
        assert "everybody is refused" in caplog.text
        with dial_as(context, host, KNOWN):
            host.next_refusal()
            assert not host.has_message()


# ---------------------------------------------------------------- routers and dealers


def test_a_router_tells_when_a_peer_is_gone(host: Host) -> None:
    with pytest.raises(zmq.ZMQError) as caught:
        host.router.send_multipart([b"nobody", b"x"], zmq.NOBLOCK)
    assert caught.value.errno == zmq.EHOSTUNREACH


def test_a_frame_above_the_bound_costs_the_connection(host: Host, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with dial_as(context, host, KNOWN) as socket:
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.send(bytes(MIB + 1))
        assert monitor.poll(DEADLINE_MS)
        assert not host.has_message()
        socket.disable_monitor()
        monitor.close()


def test_an_address_that_is_taken_or_none_is_refused_by_name(host: Host) -> None:
    for address, words in ((host.address, "Address already in use"), ("tcp://nowhere.invalid:1", "No such device")):
        with pytest.raises(ConfigInvalid, match=f"can't listen on {address}: {words}"):
            bind_router(host.context, SERVER, address, MIB)


def test_what_is_no_address_is_not_dialled(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    for address in ("host", "host:port", "xyz://host:1"):
        with pytest.raises(LinkInvalid, match="can't dial"):
            dial(context, address, KNOWN, SERVER.public, b"x", MIB)


def test_a_message_without_a_proven_key_has_no_envelope() -> None:
    with pytest.raises(AccessRefused, match="without a proven key"):
        envelope_of([zmq.Frame(b"id"), zmq.Frame(b"x")])


# ---------------------------------------------------------------- dialling the first that answers


class Greeter:
    """A coordinator that answers every greeting, and counts them."""

    def __init__(self, context: zmq.asyncio.Context, *, is_mute: bool = False) -> None:
        self.greetings: list[bytes] = []
        self.was_greeted = asyncio.Event()
        self.is_mute = is_mute
        self.router, address = bind_router(context, SERVER, "127.0.0.1:0", MIB)
        self.port = address.rpartition(":")[2]
        self.address = f"127.0.0.1:{self.port}"

    async def serve(self) -> None:
        """Answer for ever."""
        while True:
            envelope = await receive(self.router)
            assert envelope.public_key == KNOWN.public
            self.greetings.append(bytes(envelope.frames[0]))
            self.was_greeted.set()
            if not self.is_mute:
                await self.router.send_multipart([envelope.routing_id, b"welcome", envelope.frames[0]])


def greet(test: Callable[[Greeter, zmq.asyncio.Context], Awaitable[None]], *, is_mute: bool = False) -> None:
    """Run a test beside a greeter, under a deadline, and close everything."""

    async def run() -> None:
        context, own_context = zmq.asyncio.Context(), zmq.asyncio.Context()
        with Gate(own_context, lambda key: key == KNOWN.public):
            greeter = Greeter(own_context, is_mute=is_mute)
            serving = asyncio.create_task(greeter.serve())
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await test(greeter, context)
            finally:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
                greeter.router.close()
        context.term()
        own_context.term()

    asyncio.run(run())


def closed_port() -> str:
    """An address on which nobody listens."""
    with plain.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_the_first_that_answers_is_kept_and_greeted_once() -> None:
    async def test(greeter: Greeter, context: zmq.asyncio.Context) -> None:
        addresses = [closed_port(), greeter.address, f"localhost:{greeter.port}", greeter.address]
        socket, answer = await dial_first(context, addresses, KNOWN, SERVER.public, b"b/control", [b"hi"], 9.0, MIB)
        assert [bytes(frame) for frame in answer] == [b"welcome", b"hi"]
        assert greeter.greetings == [b"hi"]
        await socket.send_multipart([b"more"])
        assert [bytes(frame) for frame in await receive_dealer(socket)] == [b"welcome", b"more"]
        socket.close()

    greet(test)


@pytest.mark.parametrize(
    ("keys", "server_key", "is_mute", "kind", "words"),
    [
        (STRANGER, SERVER.public, False, AccessRefused, "reached, and our key was refused"),
        (KNOWN, STRANGER.public, False, CoordinatorLost, "never proved the link's server key"),
        (KNOWN, SERVER.public, True, CoordinatorLost, "reached and proven, but it did not answer"),
    ],
    ids=["refused", "wrong server key", "mute"],
)
def test_who_does_not_answer_is_told_with_the_reason(
    keys: KeyPair, server_key: bytes, is_mute: bool, kind: type[Exception], words: str
) -> None:
    async def test(greeter: Greeter, context: zmq.asyncio.Context) -> None:
        with pytest.raises(kind) as caught:
            await dial_first(context, [greeter.address], keys, server_key, b"x", [b"hi"], 0.5, MIB)
        assert f"{greeter.address}: " in str(caught.value)
        assert words in str(caught.value)

    greet(test, is_mute=is_mute)


def test_every_address_is_named_when_nobody_listens() -> None:
    first, second = closed_port(), closed_port()

    async def test(_: Greeter, context: zmq.asyncio.Context) -> None:
        with pytest.raises(CoordinatorLost, match=f"no answer within 0.4 s .{first}: not reached.*; {second}: not"):
            await dial_first(context, [first, second], KNOWN, SERVER.public, b"x", [b"hi"], 0.4, MIB)
        with pytest.raises(CoordinatorLost, match="no address"):
            await dial_first(context, [], KNOWN, SERVER.public, b"x", [b"hi"], 0.4, MIB)
        with pytest.raises(LinkInvalid, match="can't dial 'nonsense'"):
            await dial_first(context, ["nonsense"], KNOWN, SERVER.public, b"x", [b"hi"], 0.4, MIB)

    greet(test)


def test_a_cancelled_dial_leaves_no_socket_open() -> None:
    async def test(greeter: Greeter, context: zmq.asyncio.Context) -> None:
        task = asyncio.create_task(
            dial_first(context, [greeter.address], KNOWN, SERVER.public, b"x", [b"hi"], DEADLINE_S, MIB)
        )
        await greeter.was_greeted.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    greet(test, is_mute=True)  # whose context.term() would hang on an open socket

"""A coordinator for the client's tests: real CURVE sockets, and answers that a test scripts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import zmq
import zmq.asyncio

from protocol import messages
from protocol.errors import RequestUnknown
from protocol.frames import Buffer, decode, encode
from protocol.ids import SessionId
from protocol.messages import (
    Accepted,
    Cancel,
    ClientHello,
    Drain,
    Draining,
    Finished,
    FinishReason,
    Generate,
    Invitation,
    InviteRequest,
    Resume,
    StatusReport,
    StatusRequest,
    Timings,
    Usage,
    Waiting,
    Welcome,
)
from protocol.security import Gate, KeyPair, Link
from protocol.transport import bind_router, receive

Answer = Callable[["FakeCoordinator", bytes, Any, bytes], None]
TIMINGS = Timings(queued_s=0.0, first_token_s=0.1, total_s=0.2)
MAX_BYTES = 16 * 2**20


class FakeCoordinator:
    """Answers greetings, status and invitations itself; `on_message` may take over any message."""

    def __init__(self) -> None:
        self.keys = KeyPair.generate()
        self.client_keys = KeyPair.generate()
        self.seen: list[Any] = []
        self.payloads: list[bytes] = []
        self.peers: list[bytes] = []
        self.on_generate: Answer = speak("hello")
        self.on_resume: Answer = refuse(RequestUnknown("never heard of it"))
        self.on_drain: Callable[[str], None] = self.lose
        self.answers_status = True
        self.status: dict[str, Any] = {"phase": "ready"}
        self.greets = True
        self.arrived = asyncio.Event()
        self.address = "tcp://127.0.0.1:0"
        self.start()

    def start(self) -> None:
        """Listen, after `close` at the same address again."""
        self._context = zmq.asyncio.Context()
        self._gate = Gate(self._context, lambda key: key == self.client_keys.public)
        self._gate.start()
        self._router, self.address = bind_router(self._context, self.keys, self.address, MAX_BYTES)
        self._task = asyncio.create_task(self._serve())

    @property
    def link(self) -> Link:
        return Link(
            role="ask",
            addresses=(self.address.removeprefix("tcp://"),),
            server_key=self.keys.public,
            secret=self.client_keys.secret,
        )

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.seen if isinstance(message, kind)]

    def lose(self, worker: str) -> None:
        """Report this worker no more."""
        rest = [one for one in self.status["workers"] if one["name"] != worker]
        self.status = {**self.status, "workers": rest}

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something that was received makes the condition true."""
        async with asyncio.timeout(10):
            while not holds():
                self.arrived.clear()
                await self.arrived.wait()

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """As `until`, for another thread than the one that serves."""
        asyncio.run_coroutine_threadsafe(self.until(holds), self._task.get_loop()).result()

    def say(self, to: bytes, message: object, payload: Buffer | None = None) -> None:
        self.say_raw(to, *encode(message, payload))

    def say_raw(self, to: bytes, *frames: Buffer) -> None:
        sent = self._router.send_multipart([to, *frames])
        sent.add_done_callback(asyncio.Future.exception)  # a client that has hung up is no failure of the test

    async def _serve(self) -> None:
        while True:
            envelope = await receive(self._router)
            message, payload = decode(envelope.frames)
            self.seen.append(message)
            self.peers.append(envelope.routing_id)
            self.payloads.append(bytes(payload))
            self._answer(envelope.routing_id, message, bytes(payload))
            self.arrived.set()

    def _answer(self, to: bytes, message: Any, payload: bytes) -> None:
        match message:
            case ClientHello() if self.greets:
                self.say(to, WELCOME)
            case StatusRequest() if self.answers_status:
                self.say(to, StatusReport(), json.dumps(self.status).encode())
            case Drain():
                self.on_drain(message.worker)
                self.say(to, Draining(worker=message.worker))
            case InviteRequest():
                self.say(to, Invitation(link=f"a link, trusted {message.trusted}"))
            case Cancel():
                self.say(to, finished(message.request, FinishReason.CANCELLED, 0))
            case Resume():
                self.on_resume(self, to, message, payload)
            case Generate():
                self.on_generate(self, to, message, payload)

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._gate.close()
        self._context.destroy(linger=0)


WELCOME = Welcome(version=1, software="fake", cluster="test", term=1, heartbeat_s=0.5, lease_s=3.0)


@contextlib.asynccontextmanager
async def fake_coordinator() -> AsyncIterator[FakeCoordinator]:
    fake = FakeCoordinator()
    try:
        yield fake
    finally:
        await fake.close()


def accepted(request: Any) -> Accepted:
    return Accepted(request=request, session=SessionId(1), prompt_tokens=3)


def piece(request: Any, index: int, text: str, *tokens: int) -> messages.Piece:
    return messages.Piece(request=request, index=index, text=text, tokens=tokens)


def finished(request: Any, reason: FinishReason, num_tokens: int) -> Finished:
    usage = Usage(prompt_tokens=3, completion_tokens=num_tokens)
    return Finished(request=request, reason=reason, usage=usage, timings=TIMINGS)


def speak(text: str) -> Answer:
    """Answer with one token a letter, and end."""

    def answer(fake: FakeCoordinator, to: bytes, message: Any, payload: bytes) -> None:
        fake.say(to, accepted(message.request))
        for index, letter in enumerate(text):
            fake.say(to, piece(message.request, index, letter, ord(letter)))
        fake.say(to, finished(message.request, FinishReason.LENGTH, len(text)))

    return answer


def begin(text: str) -> Answer:
    """Answer with one token a letter, and then say no more."""

    def answer(fake: FakeCoordinator, to: bytes, message: Any, payload: bytes) -> None:
        fake.say(to, accepted(message.request))
        for index, letter in enumerate(text):
            fake.say(to, piece(message.request, index, letter, ord(letter)))
        fake.say(to, Waiting(request=message.request, phase="thinking"))

    return answer


def go_on(text: str) -> Answer:
    """Answer a `Resume` with the rest of a text, one token a letter, and end."""

    def answer(fake: FakeCoordinator, to: bytes, message: Any, payload: bytes) -> None:
        fake.say(to, accepted(message.request))
        for index, letter in enumerate(text[message.tokens :], message.tokens):
            fake.say(to, piece(message.request, index, letter, ord(letter)))
        fake.say(to, finished(message.request, FinishReason.LENGTH, len(text)))

    return answer


def refuse(error: Exception) -> Answer:
    """Answer with a typed error."""

    def answer(fake: FakeCoordinator, to: bytes, message: Any, payload: bytes) -> None:
        fake.say(to, messages.ErrorReport.of(error, request=message.request))  # type: ignore[arg-type]

    return answer


@contextlib.contextmanager
def fake_in_thread() -> Iterator[FakeCoordinator]:
    """A fake coordinator that serves in a thread, for code that blocks."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fake coordinator")
    thread.start()

    async def start() -> FakeCoordinator:
        return FakeCoordinator()

    fake = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield fake
    finally:
        asyncio.run_coroutine_threadsafe(fake.close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()

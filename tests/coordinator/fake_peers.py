"""A coordinator in this process, and peers that speak the protocol to it over real CURVE sockets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from coordinator.config import CoordinatorConfig
from coordinator.daemon import Callbacks, Ready, serve
from protocol.batches import Sampling
from protocol.frames import Received, decode, encode, unpack_manifest
from protocol.ids import RequestId, WorkerId
from protocol.messages import (
    MAX_TENSOR_BYTES,
    VERSION,
    ClientHello,
    DeviceProfile,
    Enroll,
    Enrolled,
    Generate,
    Heartbeat,
    Hello,
    Invitation,
    InviteRequest,
    Load,
    Loaded,
    Probe,
    PromptKind,
    Reached,
    SampledToken,
    Step,
    StepDone,
    Unload,
    Welcome,
    WorkerPhase,
)
from protocol.security import KeyPair, Link
from protocol.tiles import TileEntry
from protocol.transport import dial, receive_dealer

DEADLINE_S = 20.0
M = TypeVar("M")
PROFILE = DeviceProfile(
    system="test", machine="test", cores=1, memory_bytes=2**30, available_bytes=2**30, budget_bytes=2**30,
    device="cpu", torch="",
)  # fmt: skip


class Dealer:
    """One connection to the coordinator."""

    def __init__(self, context: zmq.asyncio.Context, link: Link, keys: KeyPair, routing_id: bytes) -> None:
        self.socket = dial(context, link.addresses[0], keys, link.server_key, routing_id, MAX_TENSOR_BYTES)

    async def send(self, message: object, payload: bytes | None = None) -> None:
        await self.send_raw(*encode(message, payload))

    async def send_raw(self, *frames: Any) -> None:
        async with asyncio.timeout(DEADLINE_S):  # `wait_for` of Python 3.11 may swallow that its task is cancelled
            await self.socket.send_multipart(frames)

    async def receive(self) -> Received:
        return decode(await asyncio.wait_for(receive_dealer(self.socket), DEADLINE_S))

    async def receive_frames(self) -> list[bytes]:
        return [bytes(frame) for frame in await asyncio.wait_for(receive_dealer(self.socket), DEADLINE_S)]

    async def expect(self, kind: type[M]) -> M:
        """Return the next message of this kind; others before it are passed over."""
        return (await self.expect_with_payload(kind))[0]

    async def expect_with_payload(self, kind: type[M]) -> tuple[M, bytes]:
        while True:
            message, payload = await self.receive()
            if isinstance(message, kind):
                return message, bytes(payload)


class FakeClient(Dealer):
    """A client."""

    async def hello(self) -> Welcome:
        await self.send(ClientHello(oldest_version=VERSION, version=VERSION, software="test"))
        return await self.expect(Welcome)

    async def invite(self, trusted: bool = False) -> Link:
        await self.send(InviteRequest(trusted=trusted))
        return Link.parse((await self.expect(Invitation)).link)

    async def ask(self, text: str, name: str = "", max_tokens: int = 8, **more: Any) -> RequestId:
        """Ask, under a fresh name when none is given; returns the name."""
        name = name or secrets.token_hex(8)
        order = Generate(
            request=RequestId(name), prompt_kind=PromptKind.TEXT, max_tokens=max_tokens, sampling=Sampling(), **more
        )
        await self.send(order, text.encode())
        return order.request


@dataclass(eq=False)
class FakeWorker:
    """A worker that loads at once and answers every step with the next byte of `script`.

    `by_position`: with the one of the position, so that the answer depends on nothing else, as that of a model.
    """

    name: str
    keys: KeyPair
    control: Dealer
    data: Dealer
    bulk: Dealer
    script: bytes
    gate: asyncio.Event  # steps are answered while it is set
    can_reach: Callable[[str], bool]
    by_position: bool = False
    epoch: int = 0
    phase: WorkerPhase = WorkerPhase.IDLE
    manifest: tuple[TileEntry, ...] = ()
    plan: Load | None = None
    unloaded: asyncio.Event = field(default_factory=asyncio.Event)
    step_seen: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    async def start(self, heartbeat_s: float) -> None:
        hello = Hello(
            oldest_version=VERSION, version=VERSION, software="test", worker=WorkerId(self.name), profile=PROFILE,
            data_addresses=(), epoch=0, phase=WorkerPhase.IDLE,
        )  # fmt: skip
        await self.control.send(hello)
        await self.control.expect(Welcome)
        self.tasks = [asyncio.create_task(work) for work in (self._beat(heartbeat_s), self._obey(), self._compute())]

    async def fall_silent(self) -> None:
        await self._end(*self.tasks)

    async def leave_data(self) -> None:
        """Stop reading the data connection: the test reads it from now on."""
        await self._end(self.tasks[2])

    async def leave_control(self) -> None:
        """Stop reading the control connection; heartbeats go on."""
        await self._end(self.tasks[1])

    async def _end(self, *tasks: asyncio.Task[None]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _beat(self, heartbeat_s: float) -> None:
        sequence = 0
        while True:
            sequence += 1
            beat = Heartbeat(
                sequence=sequence, epoch=self.epoch, phase=self.phase, progress=sequence, resident_bytes=3,
                weight_bytes=2, kv_bytes=1,
            )  # fmt: skip
            await self.control.send(beat)
            await asyncio.sleep(heartbeat_s)

    async def _obey(self) -> None:
        while True:
            message, payload = decode(await receive_dealer(self.control.socket))
            match message:
                case Probe():
                    reached = tuple(peer.worker for peer in message.peers if self.can_reach(peer.worker))
                    await self.control.send(Reached(probe=message.probe, workers=reached))
                case Load():
                    self.plan, self.epoch, self.phase = message, message.plan.epoch, WorkerPhase.READY
                    self.manifest = unpack_manifest(payload)
                    loaded = Loaded(epoch=self.epoch, weight_bytes=1, fetched_bytes=0, resident_bytes=1, load_s=0.0)
                    await self.control.send(loaded)
                case Unload():
                    self.epoch, self.phase = 0, WorkerPhase.IDLE
                    self.unloaded.set()

    async def _compute(self) -> None:
        said: dict[int, int] = {}
        while True:
            message, _ = decode(await receive_dealer(self.data.socket))
            if not isinstance(message, Step):
                continue
            self.steps.append(message)
            self.step_seen.set()
            await self.gate.wait()
            tokens = []
            for rows in message.rows:
                if rows.sample:
                    at = rows.start + rows.count if self.by_position else said.get(rows.session, 0)
                    said[rows.session] = at + 1
                    token = self.script[at % len(self.script)]
                    tokens.append(SampledToken(session=rows.session, token=token, logprob=-1.0))
            await self.data.send(StepDone(epoch=message.epoch, step=message.step, tokens=tuple(tokens), step_s=0.001))


@dataclass(eq=False)
class Cluster:
    """A running coordinator and what it told."""

    config: CoordinatorConfig
    context: zmq.asyncio.Context
    stop: asyncio.Event
    task: asyncio.Task[None]
    ready: Ready
    join_links: list[str]
    workers: list[FakeWorker] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def client_link(self) -> Link:
        return Link.parse(self.ready.client_link)

    @property
    def port(self) -> int:
        return int(self.client_link.addresses[0].rpartition(":")[2])

    async def client(self) -> FakeClient:
        name = b"client-%d" % next(self.numbers)  # a ROUTER is deaf to a second peer of the same routing id
        client = FakeClient(self.context, self.client_link, self.client_link.keys, name)
        await client.hello()
        return client

    def dealer(self, link: Link, keys: KeyPair | None = None, routing_id: bytes = b"guest") -> Dealer:
        return Dealer(self.context, link, keys or link.keys, routing_id)

    async def enroll(self, link: Link, name: str, keys: KeyPair | None = None) -> tuple[str, KeyPair]:
        """Enrol a fresh key and return its name; the guest's connection is closed."""
        keys = keys or KeyPair.generate()
        guest = self.dealer(link, routing_id=b"guest-%d" % next(self.numbers))
        asked = Enroll(oldest_version=VERSION, version=VERSION, software="test", name=name, public_key=keys.public)
        await guest.send(asked)
        worker = (await guest.expect(Enrolled)).worker
        guest.socket.close()
        return worker, keys

    async def worker(
        self,
        name: str,
        *,
        trusted: bool = False,
        script: bytes = b"hello",
        can_reach: bool = True,
        nonce: str = "",
        by_position: bool = False,
    ) -> FakeWorker:
        """Invite, enrol and start a worker."""
        client = FakeClient(self.context, self.client_link, self.client_link.keys, b"inviter-" + name.encode())
        link = await client.invite(trusted)
        client.socket.close()
        worker, keys = await self.enroll(link, name)
        control, data, bulk = (
            self.dealer(link, keys, f"{worker}/{channel}{nonce}".encode()) for channel in ("control", "data", "bulk")
        )
        gate = asyncio.Event()
        gate.set()
        fake = FakeWorker(worker, keys, control, data, bulk, script, gate, lambda peer: can_reach, by_position)
        self.workers.append(fake)
        await fake.start(self.config.heartbeat_s)
        return fake

    async def end(self) -> None:
        self.stop.set()
        await asyncio.wait_for(self.task, DEADLINE_S)

    async def crash(self) -> None:
        """End without any of what stopping does: nobody is told, nothing is ended in the token log."""
        self.task.cancel()
        await asyncio.wait({self.task}, timeout=DEADLINE_S)


@contextlib.asynccontextmanager
async def running(model: Path, state: Path, **settings: Any) -> AsyncIterator[Cluster]:
    """Run a coordinator on a free loopback port; at the end it has stopped and every socket is closed."""
    values = {"model": str(model), "port": 0, "state_dir": state, "cache_dir": state / "cache", **settings}
    config = CoordinatorConfig(**values)
    stop, links = asyncio.Event(), []
    told: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
    callbacks = Callbacks(on_ready=told.set_result, on_join_link=links.append)
    task = asyncio.create_task(serve(config, stop, callbacks))
    done, _ = await asyncio.wait({task, told}, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
    if task in done:
        told.cancel()
        await task
    context = zmq.asyncio.Context()
    cluster = Cluster(config, context, stop, task, await told, links)
    try:
        yield cluster
    finally:
        for worker in cluster.workers:
            await worker.fall_silent()
        stop.set()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), DEADLINE_S)
        context.destroy(linger=0)

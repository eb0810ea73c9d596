"""The exchange over real sockets: what comes, in which order, and whose connection broke."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import zmq.asyncio

from coordinator.exchange import Broken, Exchange
from protocol.messages import MAX_TENSOR_BYTES
from protocol.security import KeyPair
from protocol.transport import Envelope, dial
from tests.coordinator.fake_peers import Cluster, FakeClient, running
from tests.coordinator.test_daemon import model as model  # noqa: PLC0414  a fixture
from tests.coordinator.test_daemon import status, until_phase

pytestmark = pytest.mark.asyncio
DEADLINE_S = 20.0
HOUR_S = 3600.0  # nobody in these tests is missed for being silent


class Bench:
    """An exchange, and connections to it."""

    def __init__(self) -> None:
        self.server, self.keys = KeyPair.generate(), KeyPair.generate()
        self.exchange = Exchange("127.0.0.1:0", self.server, lambda key: key == self.keys.public)
        self.context = zmq.asyncio.Context()
        self.sockets: list[zmq.asyncio.Socket] = []

    def dial(self, name: str) -> zmq.asyncio.Socket:
        address = f"127.0.0.1:{self.exchange.port}"
        made = dial(self.context, address, self.keys, self.server.public, name.encode(), MAX_TENSOR_BYTES)
        self.sockets.append(made)
        return made

    def hang_up(self) -> None:
        for socket in self.sockets:
            socket.close(linger=0)
        self.context.term()

    async def next(self) -> Envelope | Broken:
        return await asyncio.wait_for(self.exchange.receive(), DEADLINE_S)

    async def hear(self, name: str, text: str) -> None:
        came = await self.next()
        assert isinstance(came, Envelope), f"{name} broke"
        assert (came.routing_id, bytes(came.frames[0])) == (name.encode(), text.encode())

    async def greet(self, name: str) -> zmq.asyncio.Socket:
        """Dial, say hello, and have it followed."""
        socket = self.dial(name)
        await asyncio.wait_for(socket.send(b"hello"), DEADLINE_S)
        await self.hear(name, "hello")
        self.exchange.follow(name.encode())
        return socket


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    one = Bench()
    yield one
    one.hang_up()
    one.exchange.close()


async def test_a_break_is_told_once_and_after_the_last_words(bench: Bench) -> None:
    pi = await bench.greet("pi")
    pad = await bench.greet("pad")
    for word in ("one", "two", "three"):
        await pi.send(word.encode())
    pi.close(linger=1000)
    for word in ("one", "two", "three"):
        await bench.hear("pi", word)
    assert await bench.next() == Broken(b"pi")
    await pad.send(b"still here")
    await bench.hear("pad", "still here")


async def test_what_nobody_follows_breaks_in_silence(bench: Bench) -> None:
    pi = await bench.greet("pi")
    guest = bench.dial("guest")
    await asyncio.wait_for(guest.send(b"hello"), DEADLINE_S)
    await bench.hear("guest", "hello")
    guest.close()
    await bench.greet("pad")
    await pi.send(b"on")
    await bench.hear("pi", "on")


async def test_one_that_was_gone_before_it_was_followed_is_told_at_once(bench: Bench) -> None:
    pi = bench.dial("pi")
    await asyncio.wait_for(pi.send(b"hello"), DEADLINE_S)
    await bench.hear("pi", "hello")
    pi.close(linger=0)
    while not bench.exchange._closed:
        bench.exchange._see_breaks()
        os.sched_yield()
    bench.exchange.follow(b"pi")
    assert await bench.next() == Broken(b"pi")


@pytest.mark.parametrize("seed", range(8))
async def test_descriptors_that_come_again_confuse_nobody(bench: Bench, seed: int) -> None:
    """Connections come and go as fast as they can; exactly those are told that were followed and are gone."""
    dice = random.Random(seed)
    live: dict[str, Any] = {}
    for number in range(40):
        name = f"w{number}"
        live[name] = await bench.greet(name)
        if dice.random() < 0.7:
            gone = dice.choice(sorted(live))
            live.pop(gone).close(linger=0)
            if dice.random() < 0.5:  # somebody else may take its descriptor before its end is read
                bench.dial(f"stranger{number}")
            assert await bench.next() == Broken(gone.encode())
    for name, socket in live.items():
        await socket.send(b"here")
        await bench.hear(name, "here")


async def test_a_new_connection_of_the_same_peer_outlives_its_old_one(bench: Bench) -> None:
    old = await bench.greet("pi/1")
    new = await bench.greet("pi/2")
    old.close(linger=0)
    assert await bench.next() == Broken(b"pi/1")
    await new.send(b"on")
    await bench.hear("pi/2", "on")


async def test_closing_never_hangs() -> None:
    """With a message on its way to a peer that does not read, and a peer in the middle of its handshake."""
    bench = Bench()
    await bench.greet("pi")
    _, writer = await asyncio.open_connection("127.0.0.1", bench.exchange.port)
    while bench.exchange.send(b"pi", [b"x" * 2**20]):
        pass
    await asyncio.wait_for(asyncio.to_thread(bench.exchange.close), DEADLINE_S)
    bench.hang_up()
    writer.close()


# ---------------------------------------------------------------- what the coordinator makes of it


async def names(client: FakeClient) -> set[str]:
    workers: Any = (await status(client))["workers"]
    return {worker["name"] for worker in workers}


async def start(cluster: Cluster, name: str) -> Any:
    return await cluster.worker(name, trusted=name == "desk", nonce="/1")


async def test_a_worker_whose_process_dies_is_lost_however_long_its_lease(model: Any, tmp_path: Any) -> None:
    async with running(model, tmp_path, lease_s=HOUR_S, heartbeat_s=0.05) as cluster:
        await start(cluster, "desk")
        pi = await start(cluster, "pi")
        client = await cluster.client()
        await until_phase(client, "ready")
        await pi.fall_silent()
        for dealer in (pi.bulk, pi.data):
            dealer.socket.close(linger=0)
        assert await names(client) == {"desk", "pi"}  # these alone prove nothing
        pi.control.socket.close(linger=0)
        while await names(client) != {"desk"}:
            pass


async def test_a_worker_that_dialled_again_outlives_its_old_connection(model: Any, tmp_path: Any) -> None:
    async with running(model, tmp_path, lease_s=HOUR_S, heartbeat_s=0.05) as cluster:
        await start(cluster, "desk")
        pi = await start(cluster, "pi")
        client = await cluster.client()
        await pi.fall_silent()
        old, pi.control = pi.control, cluster.dealer(cluster.client_link, pi.keys, b"pi/control/2")
        await pi.start(0.05)
        old.socket.close(linger=0)
        pad = await start(cluster, "pad")
        await pad.fall_silent()
        pad.control.socket.close(linger=0)  # seen later than the other one's end, which was first
        while "pad" in await names(client):
            pass
        assert await names(client) == {"desk", "pi"}

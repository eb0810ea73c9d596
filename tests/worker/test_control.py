"""The control side against a coordinator of the test's making: enrol, hello, silence, re-dial, refusal, goodbye."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq.asyncio
from tiny_cluster import SPEC, plan_of

from protocol.errors import AccessRefused, ConfigInvalid, CoordinatorLost, LinkInvalid
from protocol.frames import decode, encode, pack_manifest
from protocol.ids import WorkerId
from protocol.messages import (
    Enroll,
    Enrolled,
    ErrorReport,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Leave,
    LeaveAsk,
    Load,
    Peer,
    Probe,
    Reached,
    Welcome,
)
from protocol.security import Gate, KeyPair, Link
from protocol.specs import Span
from protocol.tiles import TileEntry, TileId, TileKind
from protocol.transport import bind_router, receive
from worker.addresses import data_addresses
from worker.commands import LineBroke
from worker.config import WorkerConfig
from worker.control import Control
from worker.identity import Home, Identity

DEADLINE_S = 20.0
ROOT = Path(__file__).parent.parent.parent


class FakeCoordinator:
    """Answers as long as it is told to, and keeps what it heard by type."""

    def __init__(self) -> None:
        self.context = zmq.asyncio.Context()
        self.keys, self.token = KeyPair.generate(), KeyPair.generate()
        self.gate = Gate(self.context, lambda key: True)
        self.gate.start()
        self.router, address = bind_router(self.context, self.keys, "tcp://127.0.0.1:*", 2**20)
        self.address = address.removeprefix("tcp://")
        self.heard: list[Any] = []
        self.routes: list[bytes] = []
        self.is_silent = False
        self.lease_s = 0.4
        self.refusal: ErrorReport | None = None
        self.control = b""
        self.term = 1

    @property
    def link(self) -> str:
        return Link(
            role="join", addresses=(self.address,), server_key=self.keys.public, secret=self.token.secret
        ).format()

    async def answer(self) -> None:
        while True:
            envelope = await receive(self.router)
            message = decode(envelope.frames).message
            self.heard.append(message)
            reply: Any = None
            match message:
                case Enroll():
                    assert envelope.public_key == self.token.public
                    reply = Enrolled(worker=WorkerId("pinned"), cluster="c")
                case Hello():
                    self.control = envelope.routing_id
                    self.routes.append(envelope.routing_id)
                    reply = self.refusal or Welcome(
                        version=1, software="t", cluster="c", term=self.term, heartbeat_s=0.02, lease_s=self.lease_s
                    )
                case Heartbeat(sequence=sequence):
                    reply = HeartbeatReply(sequence=sequence)
            if reply is not None and not self.is_silent:
                await self.say(reply, envelope.routing_id)

    async def restart(self) -> None:
        """End every connection, and listen again."""
        self.router.close(linger=0)
        self.task.cancel()
        await asyncio.wait([self.task])
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    self.router, _ = bind_router(self.context, self.keys, f"tcp://{self.address}", 2**20)
                except ConfigInvalid:  # its thread has not let go of the port yet
                    await asyncio.sleep(0.01)
                else:
                    break
        self.serve()

    def serve(self) -> None:
        """Begin to answer."""
        self.task = asyncio.create_task(self.answer())

    async def say(self, message: object, route: bytes = b"", payload: bytes | None = None) -> None:
        await self.router.send_multipart([route or self.control, *encode(message, payload)])

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110  the condition is about what other tasks have heard
                await asyncio.sleep(0.01)

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]


@asynccontextmanager
async def coordinator() -> AsyncIterator[FakeCoordinator]:
    one = FakeCoordinator()
    one.serve()
    try:
        yield one
    finally:
        one.task.cancel()
        await asyncio.gather(one.task, return_exceptions=True)
        one.router.close(linger=0)
        one.gate.close()
        one.context.term()


def config_of(folder: Path, link: str, **settings: Any) -> WorkerConfig:
    return WorkerConfig(
        link=link, name="asked", state_dir=folder / "state", cache_dir=folder / "cache", listen="tcp://127.0.0.1:*",
        threads=1, redial_first_s=0.01, redial_most_s=0.05, device="cpu",
        **{"connect_timeout_s": 5.0, **settings},
    )  # fmt: skip


@asynccontextmanager
async def working(config: WorkerConfig) -> AsyncIterator[Control]:
    control = Control(config)
    task = asyncio.create_task(control.serve())
    try:
        yield control
    finally:
        control.stop("the test is over")
        await asyncio.wait_for(task, DEADLINE_S)


@pytest.mark.asyncio
async def test_a_worker_enrols_once_beats_and_says_goodbye(tmp_path: Path) -> None:
    async with coordinator() as one:
        async with working(config_of(tmp_path, one.link)):
            await one.until(lambda: len(one.of(Heartbeat)) > 3)
        await one.until(lambda: bool(one.of(Leave)))
        assert one.of(Enroll)[0].name == "asked"
        hello = one.of(Hello)[0]
        assert hello.worker == "pinned"
        assert hello.data_addresses[0].startswith("127.0.0.1:")
        assert hello.tile_addresses[0].startswith("127.0.0.1:")
        assert hello.tile_addresses != hello.data_addresses
        async with working(config_of(tmp_path, "")):  # it knows the way, and needs no token
            await one.until(lambda: len(one.of(Hello)) == 2)
        assert len(one.of(Enroll)) == 1


@pytest.mark.asyncio
async def test_silence_makes_it_dial_again_under_a_new_route(tmp_path: Path) -> None:
    async with coordinator() as one, working(config_of(tmp_path, one.link, connect_timeout_s=1.0)):
        await one.until(lambda: len(one.of(Heartbeat)) > 1)
        one.is_silent = True
        await one.until(lambda: len(one.of(Hello)) > 1)
        one.is_silent = False
        beats = len(one.of(Heartbeat))
        await one.until(lambda: len(one.of(Heartbeat)) > beats + 2)
        assert len(set(one.routes)) == len(one.routes)


@pytest.mark.asyncio
async def test_a_broken_connection_is_seen_before_any_lease_is_over(tmp_path: Path) -> None:
    async with coordinator() as one:
        one.lease_s = 3600.0
        async with working(config_of(tmp_path, one.link)):
            await one.until(lambda: len(one.of(Heartbeat)) > 1)
            await one.restart()
            await one.until(lambda: len(one.of(Hello)) > 1)
        assert len(set(one.routes)) == len(one.routes)


@pytest.mark.asyncio
async def test_a_broken_data_connection_renews_the_whole(tmp_path: Path) -> None:
    async with coordinator() as one, working(config_of(tmp_path, one.link)) as control:
        one.lease_s = 3600.0
        await one.until(lambda: bool(one.of(Heartbeat)))
        for nonce, hellos in ((b"of another connection", 1), (one.control.rpartition(b"/")[2], 2)):
            broke = CoordinatorLost("the data connection broke")
            control._take_report(LineBroke(nonce=nonce.decode(), error=broke))
            enough = len(one.of(Heartbeat)) + 2
            await one.until(lambda enough=enough: len(one.of(Heartbeat)) > enough)
            assert len(one.of(Hello)) == hellos


@pytest.mark.asyncio
async def test_a_refusal_ends_the_worker(tmp_path: Path) -> None:
    async with coordinator() as one:
        one.refusal = ErrorReport.of(AccessRefused("revoked"))
        with pytest.raises(AccessRefused, match="revoked"):
            await Control(config_of(tmp_path, one.link)).serve()
        one.refusal = None
        control = Control(config_of(tmp_path, ""))
        task = asyncio.create_task(control.serve())
        await one.until(lambda: bool(one.of(Heartbeat)))
        await one.say(ErrorReport.of(AccessRefused("revoked now")))
        with pytest.raises(AccessRefused, match="revoked now"):
            await asyncio.wait_for(task, DEADLINE_S)


@pytest.mark.asyncio
async def test_a_coordinator_that_lets_go_is_greeted_again(tmp_path: Path) -> None:
    async with coordinator() as one, working(config_of(tmp_path, one.link)):
        await one.until(lambda: bool(one.of(Heartbeat)))
        await one.say(ErrorReport.of(CoordinatorLost("forgotten")))
        await one.until(lambda: len(one.of(Hello)) == 2)


PLAN = plan_of(
    [(Span(0, SPEC.layers), [("pinned", Span(0, SPEC.kv_heads), Span(0, SPEC.ffn_tiles))], 0)], head="pinned"
)
LOAD = Load(plan=PLAN, links=())
AWAITED = pack_manifest([TileEntry(TileId(0, TileKind.ATTENTION, 0), 10, bytes(32))])  # nobody serves it


@pytest.mark.asyncio
async def test_a_coordinator_of_a_lower_term_is_not_obeyed_and_dialled_again(tmp_path: Path) -> None:
    async with coordinator() as one:
        one.term = 5
        async with working(config_of(tmp_path, one.link)):
            await one.until(lambda: bool(one.of(Heartbeat)))
        one.term, one.heard = 4, []
        async with working(config_of(tmp_path, "")):  # what it has obeyed outlives the process
            await one.until(lambda: len(one.of(Hello)) > 2)
            assert not one.of(Heartbeat)
            one.term = 6
            await one.until(lambda: bool(one.of(Heartbeat)))


@pytest.mark.asyncio
async def test_a_goodbye_ends_the_worker_well(tmp_path: Path) -> None:
    async with coordinator() as one:
        one.lease_s = DEADLINE_S
        task = asyncio.create_task(Control(config_of(tmp_path, one.link)).serve())
        await one.until(lambda: bool(one.of(Heartbeat)))
        await one.say(Goodbye(reason="drained"))
        await asyncio.wait_for(task, DEADLINE_S)
        await one.until(lambda: bool(one.of(Leave)))
        assert one.of(Leave)[0].reason == "drained"


@pytest.mark.asyncio
@pytest.mark.parametrize("end", ["goodbye", "asked again", "standard input"])
async def test_who_has_a_part_in_a_plan_asks_before_it_leaves(tmp_path: Path, end: str) -> None:
    async with coordinator() as one:
        one.lease_s = DEADLINE_S
        control = Control(config_of(tmp_path, one.link))
        task = asyncio.create_task(control.serve())
        await one.until(lambda: bool(one.of(Heartbeat)))
        await one.say(LOAD, payload=AWAITED)
        await one.until(lambda: one.of(Heartbeat)[-1].epoch == PLAN.epoch)
        control.leave("SIGTERM")
        await one.until(lambda: bool(one.of(LeaveAsk)))
        assert not task.done() and not one.of(Leave)
        if end == "goodbye":
            await one.say(Goodbye(reason="handed over"))
        elif end == "asked again":
            control.leave("SIGTERM")
        else:
            control.stop("standard input was closed")
        await asyncio.wait_for(task, DEADLINE_S)
        await one.until(lambda: bool(one.of(Leave)))


@pytest.mark.asyncio
async def test_nobody_takes_over_in_time(tmp_path: Path) -> None:
    async with coordinator() as one:
        one.lease_s = DEADLINE_S
        control = Control(config_of(tmp_path, one.link, leave_timeout_s=0.01))
        task = asyncio.create_task(control.serve())
        await one.until(lambda: bool(one.of(Heartbeat)))
        await one.say(LOAD, payload=AWAITED)
        await one.until(lambda: one.of(Heartbeat)[-1].epoch == PLAN.epoch)
        control.leave("SIGTERM")
        await asyncio.wait_for(task, DEADLINE_S)
        await one.until(lambda: bool(one.of(Leave)))
        assert "nobody took over within 0.01 s" in one.of(Leave)[0].reason


def test_a_signal_in_the_first_seconds_ends_a_worker_well(tmp_path: Path) -> None:
    """Before torch is there: the import of the daemon is held at a gate."""
    (tmp_path / "torch.py").write_text("import sys; print('here', flush=True); sys.stdin.read()")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    process = subprocess.Popen(
        [sys.executable, "-m", "worker", "--link", "x"],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == b"here\n"
        process.terminate()
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.asyncio
async def test_a_probe_names_those_who_answered(tmp_path: Path) -> None:
    async with coordinator() as one, working(config_of(tmp_path / "a", one.link)) as control:
        await one.until(lambda: bool(one.of(Hello)))
        me = one.of(Hello)[0]
        other = Peer(worker=WorkerId("other"), public_key=KeyPair.generate().public, addresses=("127.0.0.1:9",))
        key = control._identity.keys.public
        myself = Peer(worker=WorkerId("pinned"), public_key=key, addresses=me.data_addresses)
        await one.say(Probe(probe=3, peers=(other, myself)))
        await one.until(lambda: bool(one.of(Reached)))
        assert one.of(Reached) == [Reached(probe=3, workers=(WorkerId("pinned"),))]


@pytest.mark.asyncio
async def test_nobody_there_is_told_with_the_address(tmp_path: Path) -> None:
    link = Link(
        role="join",
        addresses=("127.0.0.1:9",),
        server_key=KeyPair.generate().public,
        secret=KeyPair.generate().secret,
    )
    with pytest.raises(CoordinatorLost, match=r"127\.0\.0\.1:9"):
        await Control(config_of(tmp_path, link.format(), connect_timeout_s=0.3)).serve()


def test_one_state_folder_serves_one_worker_and_remembers_its_homes(tmp_path: Path) -> None:
    identity = Identity(tmp_path)
    with pytest.raises(ConfigInvalid, match="another worker"):
        Identity(tmp_path)
    with pytest.raises(LinkInvalid, match="no coordinator"):
        identity.home_of(None)
    home = Home(server_key=KeyPair.generate().public, addresses=("h:1",), worker=WorkerId("w"), cluster="c")
    identity.remember(home)
    identity.close()
    again = Identity(tmp_path)
    assert again.home_of(None) == home
    assert again.keys == identity.keys
    link = Link(role="join", addresses=("new:2",), server_key=home.server_key, secret=KeyPair.generate().secret)
    found = again.home_of(link)
    assert found is not None
    assert found.addresses == ("new:2", "h:1")
    again.close()
    (tmp_path / "homes.json").write_text("[{}]")
    with pytest.raises(ConfigInvalid, match="damaged"):
        Identity(tmp_path)


@pytest.mark.parametrize(
    ("listening", "advertised", "expected"),
    [
        ("tcp://127.0.0.1:5", (), ("127.0.0.1:5",)),
        ("tcp://0.0.0.0:5", ("my.host", "other:7"), ("my.host:5", "other:7")),
        ("tcp://0.0.0.0:5", ("[::1]", "[::1]:8"), ("[::1]:5", "[::1]:8")),
    ],
)
def test_addresses(listening: str, advertised: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert data_addresses(listening, advertised, ()) == expected


def test_the_way_to_the_coordinator_comes_first_and_nonsense_is_refused() -> None:
    assert data_addresses("tcp://0.0.0.0:5", (), ("127.0.0.1:9",))[0] == "127.0.0.1:5"
    with pytest.raises(ConfigInvalid, match="advertise"):
        data_addresses("tcp://0.0.0.0:5", ("not an address",), ())

"""A real coordinator on loopback, with clients and workers that only pretend to compute."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import os
import stat
import threading
from pathlib import Path
from sqlite3 import Connection

import msgpack
import psutil
import pytest

from coordinator.config import CoordinatorConfig, Dtype
from coordinator.daemon import serve
from coordinator.startup import CLIENT_LINK_FILE, READY_FILE
from coordinator.token_log import Begun, Grown, Record, TokenLog
from protocol.errors import Cancelled, ConfigInvalid, StorageFull
from protocol.frames import encode
from protocol.ids import RequestId, WorkerId
from protocol.messages import (
    OLDEST_VERSION,
    VERSION,
    Accepted,
    Cancel,
    ClientHello,
    Drain,
    Draining,
    Enroll,
    ErrorReport,
    Finished,
    FinishReason,
    Goodbye,
    Hello,
    LinkHello,
    Load,
    Loaded,
    Piece,
    Relay,
    Release,
    Resume,
    StatusReport,
    StatusRequest,
    StepDone,
    Stock,
    Stocked,
    TileChunk,
    TileRequest,
    Waiting,
    Welcome,
    WorkerPhase,
)
from protocol.security import KeyPair, Link
from protocol.tiles import HEAD_KINDS, TileKind
from tests.coordinator.byte_model import write_model
from tests.coordinator.fake_peers import PROFILE, Cluster, FakeClient, running

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("byte-model"))


async def status(client: FakeClient) -> dict[str, object]:
    await client.send(StatusRequest())
    _, payload = await client.expect_with_payload(StatusReport)
    report = json.loads(payload)
    assert isinstance(report, dict)
    return report


async def until_phase(client: FakeClient, phase: str) -> dict[str, object]:
    while (report := await status(client))["phase"] != phase:
        pass
    return report


async def answer(client: FakeClient) -> tuple[str, Finished]:
    text = ""
    while True:
        message, _ = await client.receive()
        match message:
            case Piece():
                text += message.text
            case Finished():
                return text, message
            case ErrorReport():
                raise message.error()


# ---------------------------------------------------------------- admission


async def test_a_token_enrols_one_worker_and_a_new_link_is_told(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path) as cluster:
        link = Link.parse(cluster.join_links[0])
        name, keys = await cluster.enroll(link, "pi")
        assert name == "pi"
        assert (await cluster.enroll(link, "pi", keys))[0] == "pi"  # the answer was lost: asked again, told again
        second = cluster.dealer(link)
        await second.send(
            Enroll(
                oldest_version=OLDEST_VERSION,
                version=VERSION,
                software="t",
                name="pi",
                public_key=KeyPair.generate().public,
            )
        )
        error = await second.expect(ErrorReport)
        assert (error.code, error.remedy) == ("access-refused", "get a fresh link with `manyhands invite`")
        assert "spent" in error.text
        client = await cluster.client()
        while len(cluster.join_links) < 2:
            await status(client)
        assert cluster.join_links[1] != cluster.join_links[0]


async def test_workers_of_the_same_name_get_numbers(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path) as cluster:
        client = await cluster.client()
        names = [(await cluster.enroll(await client.invite(), "pi"))[0] for _ in range(3)]
        assert names == ["pi", "pi-2", "pi-3"]


async def test_an_unknown_key_never_gets_through_the_gate(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path) as cluster:
        stranger = cluster.dealer(cluster.client_link, KeyPair.generate())
        with pytest.raises(TimeoutError):  # not even connected, so nothing can be sent
            await asyncio.wait_for(stranger.socket.send_multipart(encode(StatusRequest())), 0.3)
        await cluster.client()


async def test_a_wrong_version_is_refused_with_both(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path) as cluster:
        client = FakeClient(cluster.context, cluster.client_link, cluster.client_link.keys, b"new")
        await client.send(ClientHello(oldest_version=7, version=9, software="manyhands 99"))
        error = await client.expect(ErrorReport)
        assert error.code == "version-mismatch"
        assert (
            "manyhands 99) speaks protocol 7 to 9" in error.text
            and f"speaks {OLDEST_VERSION} to {VERSION}" in error.text
        )
        name, keys = await cluster.enroll(await client.invite(), "pi")
        worker = cluster.dealer(cluster.client_link, keys, b"pi/control")
        hello = Hello(
            oldest_version=7, version=9, software="manyhands 99", worker=WorkerId(name), profile=PROFILE,
            data_addresses=(), epoch=0, phase=WorkerPhase.IDLE,
        )  # fmt: skip
        await worker.send(hello)
        assert (await worker.expect(ErrorReport)).code == "version-mismatch"
        assert (await status(client))["workers"] == []


async def test_a_key_acts_under_its_own_name_and_role_only(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path) as cluster:
        client = await cluster.client()
        _, keys = await cluster.enroll(await client.invite(), "pi")
        hello = Hello(
            oldest_version=VERSION, version=VERSION, software="t", worker=WorkerId("desk"), profile=PROFILE,
            data_addresses=(),
            epoch=0, phase=WorkerPhase.IDLE,
        )  # fmt: skip
        own = cluster.dealer(cluster.client_link, keys, b"pi/control")
        await own.send(hello)
        assert "pinned to worker pi" in (await own.expect(ErrorReport)).text
        await own.send(StatusRequest())
        assert "role worker may not send StatusRequest" in (await own.expect(ErrorReport)).text
        await own.send(StepDone(epoch=1, step=1, tokens=(), step_s=0.1))
        assert "role worker may not send StepDone" in (await own.expect(ErrorReport)).text
        other = cluster.dealer(cluster.client_link, keys, b"desk/data")
        await other.send(TileRequest(digest=b"d" * 32, offset=0, length=1))
        assert "can't use the routing id" in (await other.expect(ErrorReport)).text
        guest = cluster.dealer(await client.invite())
        await guest.send(StatusRequest())
        assert "role invited may not send" in (await guest.expect(ErrorReport)).text
        assert (await status(client))["frames"]["refusals"] == 5  # type: ignore[index]


# ---------------------------------------------------------------- answers


async def ask_one(cluster: Cluster, **more: object) -> tuple[str, Finished]:
    client = await cluster.client()
    await client.ask("hi", **more)  # type: ignore[arg-type]
    return await answer(client)


async def test_a_request_streams_pieces(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path) as cluster:
        head = await cluster.worker("desk", trusted=True, script="größe €".encode())
        client = await cluster.client()
        await client.ask("hi", max_tokens=11)
        accepted = await client.expect(Accepted)
        assert accepted.prompt_tokens == 2
        text, finished = await answer(client)
        assert text == "größe €"
        assert finished.reason is FinishReason.LENGTH
        assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (2, 11)
        assert finished.timings.total_s > 0
        assert head.steps[0].rows[0].count == 2
        text, finished = await ask_one(cluster, max_tokens=100, stop=("ö",))
        assert (text, finished.reason, finished.usage.completion_tokens) == ("gr", FinishReason.STOP, 4)


async def test_requests_wait_for_a_model_and_are_told_so(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path) as cluster:
        client = await cluster.client()
        await client.ask("hi", max_tokens=5)
        waiting = await client.expect(Waiting)
        assert "waiting" in waiting.phase
        await cluster.worker("desk", trusted=True)
        assert (await answer(client))[0] == "hello"


async def test_cancel_ends_the_session_everywhere(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path) as cluster:
        head = await cluster.worker("desk", trusted=True)
        head.gate.clear()
        client = await cluster.client()
        name = await client.ask("hi", max_tokens=100)
        await asyncio.wait_for(head.step_seen.wait(), 20)
        await client.send(Cancel(request=name))
        assert (await client.expect(Finished)).reason is FinishReason.CANCELLED
        head.gate.set()
        report = await status(client)
        assert report["sessions"] == {"running": 0, "waiting": 0}
        assert (await ask_one(cluster, max_tokens=1))[0] == "h"


async def test_an_answer_outlives_the_worker_that_computed_it(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path, lease_s=0.3, heartbeat_s=0.05) as cluster:
        head = await cluster.worker("desk", trusted=True)
        head.gate.clear()
        client = await cluster.client()
        await client.ask("hi", max_tokens=100)
        await asyncio.wait_for(head.step_seen.wait(), 20)
        await head.fall_silent()
        report = await until_phase(client, "waiting")
        assert "desk was silent for 0.3 s" in str(report["last_error"])
        assert (await head.control.expect(ErrorReport)).code == "peer-lost"
        head.gate.set()
        await head.start(0.05)  # it is back
        text, _ = await answer(client)
        assert text.startswith("hello")


async def test_a_client_that_vanishes_or_falls_silent_is_given_up(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path, client_silence_s=0.4, client_return_s=0.2) as cluster:
        head = await cluster.worker("desk", trusted=True)
        head.gate.clear()
        gone, quiet, watch = await cluster.client(), await cluster.client(), await cluster.client()
        await gone.ask("hi", max_tokens=100)
        name = await quiet.ask("hi", max_tokens=100)
        await asyncio.wait_for(head.step_seen.wait(), 20)
        gone.socket.close()
        while (report := await status(watch))["sessions"] != {"running": 0, "waiting": 0}:
            pass
        assert report["totals"]["requests"] == 2  # type: ignore[index]
        await quiet.send(Resume(request=name, tokens=0, chars=0))
        error = await quiet.expect(ErrorReport)
        assert (error.code, error.request) == ("cancelled", name)


async def read(client: FakeClient, num_chars: int) -> str:
    text = ""
    while len(text) < num_chars:
        text += (await client.expect(Piece)).text
    return text


async def test_a_client_goes_on_over_another_connection(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path) as cluster:
        head = await cluster.worker("desk", trusted=True)
        client = await cluster.client()
        name = await client.ask("hi", max_tokens=30)
        text = await read(client, 3)
        head.gate.clear()
        client.socket.close()
        back = await cluster.client()
        await back.send(Resume(request=name, tokens=3, chars=3))
        assert (await back.expect(Accepted)).prompt_tokens == 2
        head.gate.set()
        rest, finished = await answer(back)
        assert text + rest == "hello" * 6 and finished.usage.completion_tokens == 30


async def test_the_same_request_twice_is_computed_once(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path) as cluster:
        head = await cluster.worker("desk", trusted=True)
        head.gate.clear()
        clients = [await cluster.client() for _ in range(3)]
        for client in clients[:2]:
            await client.ask("hi", name="my-key", max_tokens=5)
        await asyncio.wait_for(head.step_seen.wait(), 20)
        head.gate.set()
        for client in clients[:2]:
            assert (await answer(client))[0] == "hello"
        await clients[2].ask("hi", name="my-key", max_tokens=5)
        assert (await answer(clients[2]))[0] == "hello"
        assert (await status(clients[2]))["totals"]["requests"] == 1  # type: ignore[index]
        await clients[2].ask("ho", name="my-key", max_tokens=5)
        assert "something else before" in (await clients[2].expect(ErrorReport)).text
        await clients[2].send(Resume(request=RequestId("nobody's"), tokens=1, chars=1))
        error = await clients[2].expect(ErrorReport)
        assert (error.code, error.request) == ("request-unknown", "nobody's")


# ---------------------------------------------------------------- over a restart

SCRIPT = b"abcdefghijklmnopqrstuvwxyz"


async def test_a_stream_goes_on_after_a_crash(model: Path, tmp_path: Path) -> None:
    text, more = "", {"max_tokens": 40, "stop": ("never",)}
    async with running(model, tmp_path) as cluster:
        port, head = cluster.port, await cluster.worker("desk", trusted=True, script=SCRIPT, by_position=True)
        client = await cluster.client()
        await client.ask("hi", name="done", max_tokens=4)
        await answer(client)
        await client.ask("hi", name="r", **more)  # type: ignore[arg-type]
        text = await read(client, 5)
        head.gate.clear()
        await cluster.crash()
    async with running(model, tmp_path, return_s=0.1) as cluster:
        assert cluster.port == port
        await cluster.worker("spare", trusted=True, script=SCRIPT, by_position=True)
        client = await cluster.client()
        await client.send(Resume(request=RequestId("r"), tokens=len(text), chars=len(text)))
        rest, finished = await answer(client)
        assert text + rest == "".join(chr(SCRIPT[(2 + index) % 26]) for index in range(40))
        assert finished.usage.completion_tokens == 40
        await client.ask("hi", name="done", max_tokens=4)
        assert (await answer(client))[0] == "cdef"
        assert (await status(client))["totals"]["requests"] == 0  # type: ignore[index]


async def test_after_a_crash_with_another_model_requests_end(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path) as cluster:
        client = await cluster.client()
        await client.ask("hi", name="r")
        await client.expect(Accepted)
        await cluster.crash()
    async with running(model, tmp_path, dtype=Dtype.BFLOAT16) as cluster:
        client = await cluster.client()
        await client.send(Resume(request=RequestId("r"), tokens=0, chars=0))
        error = await client.expect(ErrorReport)
        assert error.code == "session-lost" and "another model" in error.text


async def test_what_was_ended_by_a_stop_or_a_bug_is_not_begun_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for way in ("stop", "bug"):
        async with running(model, tmp_path) as cluster:
            client = await cluster.client()
            await client.ask("hi", name=way)
            await client.expect(Accepted)
            with monkeypatch.context() as broken:
                if way == "stop":
                    await cluster.end()
                else:
                    broken.setattr("coordinator.state.ClusterState.handle", lambda *_: 1 / 0)
                    await asyncio.wait({cluster.task}, timeout=20)
    async with running(model, tmp_path) as cluster:
        client = await cluster.client()
        for way, code in (("stop", "overloaded"), ("bug", "invariant-broken")):
            await client.send(Resume(request=RequestId(way), tokens=0, chars=0))
            assert (await client.expect(ErrorReport)).code == code
        assert (await status(client))["sessions"] == {"running": 0, "waiting": 0}


async def test_what_can_not_be_written_is_not_shown_and_harms_nobody_else(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = TokenLog._put

    def full_for_long_ones(log: TokenLog, db: Connection, record: Record, now: float) -> None:
        if (isinstance(record, Grown) and record.start >= 20) or (
            isinstance(record, Begun) and "late" in record.order.request
        ):
            raise StorageFull("tokens.db: no room")
        put(log, db, record, now)

    monkeypatch.setattr(TokenLog, "_put", full_for_long_ones)
    async with running(model, tmp_path) as cluster:
        await cluster.worker("desk", trusted=True)
        long, short = await cluster.client(), await cluster.client()
        name = await long.ask("hi", max_tokens=100)
        await short.ask("hi", max_tokens=15)
        assert await read(long, 20) == "hello" * 4
        assert (await long.expect(ErrorReport)).code == "storage-full"
        assert (await answer(short))[0] == "hello" * 3
        await long.ask("hi", name="late")
        assert (await long.expect(ErrorReport)).code == "storage-full"
        assert (await ask_one(cluster, max_tokens=5))[0] == "hello"
        report = await status(short)
        assert report["sessions"] == {"running": 0, "waiting": 0}
        await short.send(Resume(request=name, tokens=20, chars=20))
        assert (await short.expect(ErrorReport)).code == "storage-full"


async def test_the_last_port_is_taken_by_somebody_else(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(model, tmp_path / "one") as cluster:
        port = cluster.port
    async with running(model, tmp_path / "two", port=port), running(model, tmp_path / "one") as cluster:
        assert cluster.port != port
        assert "the port of the last start can't be used again" in caplog.text


async def test_a_head_without_its_data_connection_is_given_up(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path, lease_s=0.4, heartbeat_s=0.05) as cluster:
        head = await cluster.worker("desk", trusted=True)
        client = await cluster.client()
        await until_phase(client, "ready")
        await head.leave_data()
        head.data.socket.close()
        await client.ask("hi", max_tokens=1)
        report = await until_phase(client, "waiting")
        assert "desk is gone: its data connection can't be reached" in str(report["last_error"])


async def test_connections_with_a_nonce_are_told_apart(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path) as cluster:
        client = await cluster.client()
        thief_name, thief_keys = await cluster.enroll(await client.invite(), "thief")
        thief = cluster.dealer(cluster.client_link, thief_keys, b"desk/data")  # before its owner
        await thief.send(TileRequest(digest=b"d" * 32, offset=0, length=1))
        assert "can't use the routing id" in (await thief.expect(ErrorReport)).text
        head = await cluster.worker("desk", trusted=True, nonce="/5eed")
        assert (await ask_one(cluster, max_tokens=5))[0] == "hello"
        assert thief_name == "thief" and len(head.steps) == 5


async def test_a_bug_ends_the_coordinator_loudly(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(model, tmp_path) as cluster:
        client = await cluster.client()
        await client.ask("hi")
        await client.expect(Accepted)

        def broken(*_: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr("coordinator.state.ClusterState.handle", broken)
        assert (await client.expect(ErrorReport)).code == "invariant-broken"
        with pytest.raises(RuntimeError, match="a bug"):
            await asyncio.wait_for(cluster.task, 20)
        assert "ends because of a bug" in caplog.text
        assert not (tmp_path / READY_FILE).exists()


async def test_bad_requests_are_told_and_harm_nobody(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path) as cluster:
        head = await cluster.worker("desk", trusted=True)
        head.gate.clear()
        client = await cluster.client()
        await client.ask("hi", name="good", max_tokens=5)
        for name, text, more, code in (
            ("good", "hi", {}, "request-invalid"),
            ("long", "x" * 200, {}, "prompt-too-long"),
            ("empty", "", {}, "request-invalid"),
        ):
            await client.ask(text, name=name, **more)
            error = await client.expect(ErrorReport)
            assert (error.request, error.code) == (name, code)
        head.gate.set()
        assert (await answer(client))[0] == "hello"


async def test_a_drained_worker_is_told_goodbye_once_it_is_not_needed(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path, workers=1) as cluster:
        await cluster.worker("desk", trusted=True)
        pi = await cluster.worker("pi")
        client = await cluster.client()
        await until_phase(client, "ready")
        await pi.leave_control()
        for name in ("pi", "nobody"):
            await client.send(Drain(worker=WorkerId(name)))
            assert (await client.expect(Draining)).worker == name
        while not isinstance(message := (await pi.control.receive())[0], Goodbye):
            if isinstance(message, Load):  # it has no part in this plan
                await pi.control.send(
                    Loaded(epoch=message.plan.epoch, weight_bytes=0, fetched_bytes=0, resident_bytes=1, load_s=0.0)
                )
            if isinstance(message, Stock):
                await pi.control.send(Stocked(order=message.order, done_bytes=0, total_bytes=0, is_over=True))


# ---------------------------------------------------------------- hostile frames


async def test_malformed_frames_do_not_end_the_loop(model: Path, tmp_path: Path) -> None:
    bad_frames: tuple[tuple[bytes, ...], ...] = (
        (b"",),
        (b"\xc1",),
        (b"\x91\xcd\xff\xff",),
        (msgpack.packb([46]), b"surplus"),
        (msgpack.packb([40, "r"]), b""),
        (msgpack.packb([40, "", "text", 1, [0.0, 0, 1.0, 0.0, 1.0, 0]]), b""),
        (b"\x9f" * 70_000,),
        (b"[" * 5000,),
    )
    async with running(model, tmp_path) as cluster:
        client = await cluster.client()
        for frames in bad_frames:
            await client.send_raw(*frames)
            error = await client.expect(ErrorReport)
            assert error.code in ("frame-malformed", "frame-too-large"), frames
        worker = await cluster.worker("pi")
        await worker.leave_data()
        await worker.data.send_raw(msgpack.packb([31, 1, 1, [], 0.1]), b"surplus")
        assert (await worker.data.expect(ErrorReport)).code == "frame-malformed"
        report = await status(client)
        assert report["frames"]["violations"] == len(bad_frames) + 1  # type: ignore[index]


# ---------------------------------------------------------------- relay and tiles


async def test_frames_are_relayed_between_linked_workers_only(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path, plan="1,1") as cluster:
        head = await cluster.worker("desk", trusted=True, can_reach=False)
        pi = await cluster.worker("pi", can_reach=False)
        pad = await cluster.worker("pad")
        client = await cluster.client()
        report = await until_phase(client, "ready")
        for worker in (head, pi, pad):
            await worker.leave_data()
        header = encode(Relay(source=WorkerId("desk"), target=WorkerId("pi")))
        inside = [b"not looked at", b"\xc1" * 10]
        await head.data.send_raw(*header, *inside)
        assert await pi.data.receive_frames() == [*map(bytes, header), *inside]
        await head.data.send_raw(*encode(Relay(source=WorkerId("pi"), target=WorkerId("desk"))), b"forged")
        assert "relays as 'pi'" in (await head.data.expect(ErrorReport)).text
        await pad.data.send_raw(*encode(Relay(source=WorkerId("pad"), target=WorkerId("pi"))), b"not of the plan")
        await head.data.send_raw(*encode(Relay(source=WorkerId("desk"), target=WorkerId("nobody"))), b"x")
        while (report := await status(client))["frames"]["dropped"] != 2:  # type: ignore[index]
            pass
        assert report["frames"]["relayed"] == 1  # type: ignore[index]
        links = {worker["name"]: worker["link"] for worker in report["workers"]}  # type: ignore[attr-defined]
        assert links["pi"] == "relay"
        await pad.data.send(LinkHello(worker=WorkerId("pad"), epoch=1))  # spoken to workers, not to us
        assert (await pad.data.expect(ErrorReport)).code == "access-refused"


async def test_tiles_are_served_and_the_heads_stay_with_the_head(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path, plan="1,1") as cluster:
        head, pi = await cluster.worker("desk", trusted=True), await cluster.worker("pi")
        await until_phase(await cluster.client(), "ready")
        assert not any(entry.tile.kind in HEAD_KINDS for entry in pi.manifest)
        entry = next(entry for entry in pi.manifest if entry.tile.kind is TileKind.ATTENTION)
        data = b""
        while len(data) < entry.num_bytes:
            length = min(1000, entry.num_bytes - len(data))
            await pi.bulk.send(TileRequest(digest=entry.digest, offset=len(data), length=length))
            chunk, payload = await pi.bulk.expect_with_payload(TileChunk)
            assert (chunk.digest, chunk.offset, len(payload)) == (entry.digest, len(data), length)
            data += payload
        assert hashlib.sha256(data).digest() == entry.digest
        embedding = next(entry for entry in head.manifest if entry.tile.kind is TileKind.EMBEDDING)
        refused = TileRequest(digest=embedding.digest, offset=0, length=16)
        for request, code in (
            (refused, "access-refused"),
            (TileRequest(digest=b"?" * 32, offset=0, length=1), "tile-unavailable"),
            (TileRequest(digest=entry.digest, offset=entry.num_bytes, length=1), "frame-malformed"),
        ):
            await pi.bulk.send(request)
            error = await pi.bulk.expect(ErrorReport)
            assert (error.code, error.digest) == (code, request.digest)
        await head.bulk.send(refused)
        assert (await head.bulk.expect(TileChunk)).digest == embedding.digest


# ---------------------------------------------------------------- status, start and end


async def test_the_status_has_its_keys(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path, plan="1/1", name="home") as cluster:
        await cluster.worker("desk", trusted=True)
        client = await cluster.client()
        assert (await status(client))["plan"] is None
        await cluster.worker("pi")
        report = await until_phase(client, "ready")
    assert set(report) >= {
        "cluster", "version", "term", "epoch", "phase", "detail", "model", "plan", "workers", "sessions", "totals",
        "last_error",
        "refusal",
    }  # fmt: skip
    assert report["cluster"] == "home"
    assert report["model"]["layers"] == 2 and report["model"]["hidden"] == 32  # type: ignore[index]
    assert report["model"]["parameters"] == 257 * 32 * 2 + 32 + 2 * (32 * 32 * 2 + 2 * 16 * 32 + 3 * 64 * 32 + 64)  # type: ignore[index]
    assert report["plan"] == {
        "words": "1/1",
        "wire": "float32",
        "head": "desk",
        "stages": [
            {"layers": [0, 1], "hub": "desk", "members": [{"worker": "desk", "groups": [0, 2], "ffn": [0, 2]}]},
            {"layers": [1, 2], "hub": "pi", "members": [{"worker": "pi", "groups": [0, 2], "ffn": [0, 2]}]},
        ],
    }
    workers = report["workers"]
    assert isinstance(workers, list) and [worker["name"] for worker in workers] == ["desk", "pi"]
    assert set(workers[0]) >= {
        "name", "role", "phase", "device", "system", "cores", "memory_bytes", "budget_bytes", "resident_bytes",
        "weight_bytes", "kv_bytes", "last_heard_s", "addresses", "link",
    }  # fmt: skip
    assert report["sessions"] == {"running": 0, "waiting": 0}
    assert set(report["totals"]) == {"prompt_tokens", "completion_tokens", "requests", "errors"}  # type: ignore[call-overload]


async def test_what_is_pinned_survives_a_restart(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path) as cluster:
        first = cluster.client_link
        _, keys = await cluster.enroll(Link.parse(cluster.join_links[0]), "pi")
        assert (await (await cluster.client()).hello()).term == 1
    async with running(model, tmp_path) as cluster:
        second = cluster.client_link
        assert (first.server_key, first.secret) == (second.server_key, second.secret)
        assert (await (await cluster.client()).hello()).term == 2
        worker = cluster.dealer(second, keys, b"pi/control")
        hello = Hello(
            oldest_version=VERSION, version=VERSION, software="t", worker=WorkerId("pi"), profile=PROFILE,
            data_addresses=(),
            epoch=0, phase=WorkerPhase.IDLE,
        )  # fmt: skip
        await worker.send(hello)
        assert (await worker.expect(Welcome)).term == 2


async def test_stopping_tells_everybody_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    process = psutil.Process()
    gc.collect()
    threads = {thread.name for thread in threading.enumerate()}
    async with running(model, tmp_path) as cluster:
        ready = json.loads((tmp_path / READY_FILE).read_text())
        assert ready["pid"] == os.getpid() and ready["address"] in cluster.client_link.addresses
        link_file = tmp_path / CLIENT_LINK_FILE
        assert stat.S_IMODE(link_file.stat().st_mode) == 0o600
        assert Link.parse(link_file.read_text()) == cluster.client_link
        head = await cluster.worker("desk", trusted=True)
        head.gate.clear()
        client = await cluster.client()
        name = await client.ask("hi", max_tokens=100)
        await asyncio.wait_for(head.step_seen.wait(), 20)
        told = asyncio.create_task(client.expect(ErrorReport))  # what is not read when the connection ends is lost
        await cluster.end()
        error = await told
        assert (error.code, error.request) == ("overloaded", name) and "stopping" in error.text
        await asyncio.wait_for(head.unloaded.wait(), 20)
        assert not (tmp_path / READY_FILE).exists()
        assert link_file.exists()
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", int(ready["address"].rpartition(":")[2]))
    assert {thread.name for thread in threading.enumerate()} <= threads
    open_here = [file.path for file in process.open_files() if str(tmp_path) in file.path or str(model) in file.path]
    assert open_here == []
    async with running(model, tmp_path):  # the lock is free again
        pass


async def test_it_stops_while_the_model_is_being_opened(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, gate = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def download(name: str) -> Path:
        loop.call_soon_threadsafe(entered.set)
        gate.wait(20)
        return model

    monkeypatch.setattr("coordinator.startup.find_model_folder", download)
    monkeypatch.setattr("coordinator.daemon.STOP_GRACE_S", 0.01)
    stop = asyncio.Event()
    config = CoordinatorConfig(model="some/model", port=0, state_dir=tmp_path, cache_dir=tmp_path / "cache")
    task = asyncio.create_task(serve(config, stop))
    await asyncio.wait_for(entered.wait(), 20)
    stop.set()
    with pytest.raises(Cancelled, match="stopped before the model was open"):
        await asyncio.wait_for(task, 20)
    gate.set()
    [thread.join(20) for thread in threading.enumerate() if thread.name == "open-model"]
    async with running(model, tmp_path):  # the state folder is free again
        pass


async def test_a_second_coordinator_in_the_same_folder_is_refused(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path):
        with pytest.raises(ConfigInvalid, match="in use by another coordinator"):
            async with running(model, tmp_path):
                pass


async def test_a_port_that_is_taken_is_named_and_everything_closed(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path / "one") as cluster:
        port = int(cluster.client_link.addresses[0].rpartition(":")[2])
        with pytest.raises(ConfigInvalid, match=f"can't listen on 127.0.0.1:{port}"):
            async with running(model, tmp_path / "two", port=port):
                pass
    async with running(model, tmp_path / "two"):
        pass


async def test_sessions_are_released_on_the_workers(model: Path, tmp_path: Path) -> None:
    async with running(model, tmp_path) as cluster:
        head = await cluster.worker("desk", trusted=True)
        await ask_one(cluster, max_tokens=1)
        await head.leave_control()
        await ask_one(cluster, max_tokens=1)
        assert (await head.control.expect(Release)).sessions

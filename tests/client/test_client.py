"""The asynchronous and the synchronous client against a scripted coordinator over real sockets."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from fake_coordinator import (
    FakeCoordinator,
    accepted,
    begin,
    fake_coordinator,
    finished,
    go_on,
    piece,
    refuse,
    speak,
)

from manyhands import (
    AsyncClient,
    AsyncGenerationStream,
    Client,
    CoordinatorLost,
    FinishReason,
    Leg,
    PeerLost,
    RequestInvalid,
    RequestUnknown,
)
from manyhands.conversation import Told
from protocol.errors import AccessRefused, FrameMalformed, LinkInvalid, Overloaded
from protocol.messages import Cancel, ErrorReport, Generate, PromptKind, Resume, StatusRequest, Waiting
from protocol.security import KeyPair, Link

Scene = Callable[[FakeCoordinator, AsyncClient], Awaitable[None]]


def play(scene: Scene, timeout_s: float = 10.0, reconnect_s: float = 60.0) -> None:
    """Run a scene with a fake coordinator and a client of it."""

    async def run() -> None:
        async with (
            asyncio.timeout(20),
            fake_coordinator() as fake,
            AsyncClient(fake.link, timeout_s, reconnect_s) as client,
        ):
            await scene(fake, client)

    asyncio.run(run())


def test_the_whole_answer() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        answer = await client.generate("hi", max_tokens=5, temperature=0.5, seed=7, stop=("x",))
        assert answer.text == "hello"
        assert answer.token_ids == tuple(map(ord, "hello"))
        assert answer.finish_reason is FinishReason.LENGTH
        assert answer.usage.completion_tokens == 5
        assert answer.tokens_per_second == pytest.approx(40.0)
        sent = fake.seen[-1]
        assert (sent.prompt_kind, fake.payloads[-1], sent.max_tokens, sent.stop) == (PromptKind.TEXT, b"hi", 5, ("x",))
        assert (sent.sampling.temperature, sent.sampling.seed) == (0.5, 7)

    play(scene)


def test_ids_and_chat_travel_as_they_should() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        await client.generate([1, 258])
        assert (fake.seen[-1].prompt_kind, fake.payloads[-1]) == (PromptKind.IDS, b"\1\0\0\0\2\1\0\0")
        await client.chat([{"role": "user", "content": "grüß"}])
        assert fake.seen[-1].prompt_kind is PromptKind.CHAT
        assert fake.payloads[-1] == '[{"role": "user", "content": "grüß"}]'.encode()

    play(scene)


def test_a_stream_gives_pieces_and_then_the_result() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        stream = await client.generate("hi", stream=True)
        with pytest.raises(RequestInvalid, match="not ended"):
            _ = stream.result
        pieces = [piece async for piece in stream]
        assert "".join(piece.text for piece in pieces) == stream.result.text == "hello"
        assert [token for piece in pieces for token in piece.token_ids] == list(stream.result.token_ids)

    play(scene)


def test_many_requests_share_a_connection() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        answers = await asyncio.gather(*(client.generate(f"prompt {n}") for n in range(20)))
        assert [answer.text for answer in answers] == ["hello"] * 20

    play(scene)


async def leave_by_aclose(client: AsyncClient) -> None:
    stream = await client.generate("hi", stream=True)
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    assert [piece async for piece in stream] == []


async def leave_by_context(client: AsyncClient) -> None:
    async with await client.generate("hi", stream=True) as stream:
        await anext(stream)


async def leave_by_break(client: AsyncClient) -> None:
    async for _ in await client.generate("hi", stream=True):
        break
    gc.collect()


async def leave_by_cancelled_reader(client: AsyncClient) -> None:
    stream = await client.generate("hi", stream=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            async for _ in stream:
                pass


async def leave_by_cancelled_task(client: AsyncClient) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await client.generate("hi")


LEAVING = [leave_by_aclose, leave_by_context, leave_by_break, leave_by_cancelled_reader, leave_by_cancelled_task]


@pytest.mark.parametrize("leave", LEAVING, ids=lambda leave: leave.__name__)
def test_leaving_early_cancels_the_work(leave: Callable[[AsyncClient], Awaitable[None]]) -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        fake.on_generate = begin("he")
        await leave(client)
        await fake.until(lambda: len(fake.of(Cancel)) == 1)
        fake.on_generate = speak("again")
        assert (await client.generate("hi")).text == "again"
        assert len(fake.of(Cancel)) == 1

    play(scene)


def test_closing_the_client_cancels_what_runs() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        fake.on_generate = begin("he")
        stream = await client.generate("hi", stream=True)
        await anext(stream)
        await client.close()
        await fake.until(lambda: len(fake.of(Cancel)) == 1)

    play(scene)


ERRORS = [PeerLost("gone", node="w2", phase="step"), RequestInvalid("bad"), Overloaded("full", remedy="later")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.code)
def test_a_reported_error_is_raised_as_its_class(error: Any) -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        fake.on_generate = refuse(error)
        with pytest.raises(type(error)) as caught:
            await client.generate("hi")
        assert str(caught.value) == str(error)
        fake.on_generate = speak("fine")
        assert (await client.generate("hi")).text == "fine"

    play(scene)


def test_pieces_before_an_error_are_not_lost() -> None:
    def answer(fake: FakeCoordinator, to: bytes, message: Any, payload: bytes) -> None:
        begin("he")(fake, to, message, payload)
        refuse(PeerLost("gone"))(fake, to, message, payload)

    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        fake.on_generate = answer
        stream = await client.generate("hi", stream=True)
        text = ""
        with pytest.raises(PeerLost):
            async for got in stream:
                text += got.text
        assert text == "he"

    play(scene)


def test_an_error_about_the_conversation_ends_every_request() -> None:
    def answer(fake: FakeCoordinator, to: bytes, message: Any, payload: bytes) -> None:
        if len(fake.payloads) > 2:
            fake.say(to, ErrorReport.of(Overloaded("stopping")))

    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        fake.on_generate = answer
        results = await asyncio.gather(client.generate("a"), client.generate("b"), return_exceptions=True)
        assert [type(result) for result in results] == [Overloaded, Overloaded]

    play(scene)


def test_silence_is_bounded_and_the_next_request_dials_again() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        fake.on_generate = begin("he")
        with pytest.raises(CoordinatorLost, match=r"127\.0\.0\.1"):
            await client.generate("hi")
        fake.on_generate = speak("back")
        assert (await client.generate("hi")).text == "back"

    play(scene, timeout_s=0.4, reconnect_s=0.0)


def test_waiting_extends_the_deadline() -> None:
    def answer(fake: FakeCoordinator, to: bytes, message: Any, payload: bytes) -> None:
        async def drip() -> None:
            for _ in range(8):
                fake.say(to, Waiting(request=message.request, phase="loading w2"))
                await asyncio.sleep(0.1)
            speak("late")(fake, to, message, payload)

        fake.drip = asyncio.create_task(drip())  # type: ignore[attr-defined]

    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        fake.on_generate = answer
        stream = await client.generate("hi", stream=True)
        first = await anext(stream)
        assert first.text.startswith("l")

    play(scene, timeout_s=0.4)


# ---------------------------------------------------------------- over a lost connection


async def read_until(stream: AsyncGenerationStream, text: str) -> None:
    """Read pieces until they have said this much."""
    said = ""
    while said != text:
        said += (await anext(stream)).text


async def half_told(fake: FakeCoordinator, client: AsyncClient) -> AsyncGenerationStream:
    """Return a stream that has said "he" and goes on waiting."""
    fake.on_generate = begin("he")
    stream = await client.generate("hi", stream=True)
    await read_until(stream, "he")
    return stream


async def close_noticed(fake: FakeCoordinator, client: AsyncClient) -> None:
    """End the coordinator and wait until the client has noticed."""
    assert client._line is not None
    talk, noticed = client._line._talk, asyncio.Event()
    lost = talk.lost

    def noticing(error: CoordinatorLost, now: float) -> list[Told]:
        noticed.set()
        return lost(error, now)

    talk.lost = noticing  # type: ignore[method-assign]
    await fake.close()
    await noticed.wait()


def test_a_stream_goes_on_over_a_restart() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        fake.on_resume = go_on("hello")
        stream = await half_told(fake, client)
        await close_noticed(fake, client)
        assert "reconnecting" in stream.waits_for
        fake.start()
        assert "".join([piece.text async for piece in stream]) == "llo"
        assert (stream.result.text, stream.result.token_ids) == ("hello", tuple(map(ord, "hello")))
        [resume] = fake.of(Resume)
        assert (resume.tokens, resume.chars) == (2, 2)
        assert resume.request == fake.of(Generate)[0].request

    play(scene)


def test_a_connection_that_breaks_is_replaced_at_once() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        fake.on_generate, fake.on_resume = begin("he"), go_on("hello")
        answers = [asyncio.create_task(client.generate(f"prompt {n}")) for n in range(3)]
        await fake.until(lambda: len(fake.of(Generate)) == 3)
        await fake.close()
        fake.on_generate = speak("hello")  # for those that had not heard of their first letter yet
        fake.start()
        assert [(await answer).text for answer in answers] == ["hello"] * 3

    play(scene, timeout_s=15.0)  # so much more than the scene may take that no silence can be what it goes on by


def test_what_was_never_heard_of_is_asked_again() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        fake.on_generate = lambda *_: None
        asking = asyncio.create_task(client.generate("hi"))
        await fake.until(lambda: len(fake.of(Generate)) == 1)
        await fake.close()
        fake.on_generate = speak("hello")
        fake.start()
        assert (await asking).text == "hello"
        first, second = fake.of(Generate)
        assert first == second and fake.payloads[-1] == b"hi"

    play(scene)


def test_what_had_begun_and_is_not_known_any_more_fails() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        stream = await half_told(fake, client)
        await fake.close()
        fake.start()
        with pytest.raises(RequestUnknown, match="never heard of it"):
            await anext(stream)

    play(scene)


def test_requests_made_while_there_is_no_connection_wait_for_it() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        fake.on_resume = go_on("hello")
        stream = await half_told(fake, client)
        await close_noticed(fake, client)
        assert "reconnecting" in stream.waits_for
        second = await client.generate("ho", stream=True)
        assert "reconnecting" in second.waits_for
        asking = asyncio.create_task(client.status())
        fake.on_generate = speak("fine")
        fake.start()
        assert await asking == {"phase": "ready"}
        assert "".join([piece.text async for piece in second]) == "fine"
        assert second.waits_for == ""

    play(scene)


def test_leaving_while_there_is_no_connection_cancels_on_the_next_one() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        fake.on_generate = begin("he")
        left, kept = await client.generate("a", stream=True), await client.generate("b", stream=True)
        for stream in (left, kept):
            await read_until(stream, "he")
        await close_noticed(fake, client)
        assert "reconnecting" in kept.waits_for
        await left.aclose()
        fake.on_resume = go_on("hello")
        fake.start()
        assert "".join([piece.text async for piece in kept]) == "llo"
        assert [message.request for message in fake.of(Cancel)] == [fake.of(Generate)[0].request]

    play(scene)


def test_nobody_coming_back_ends_the_requests_with_the_addresses() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        stream = await half_told(fake, client)
        await fake.close()
        with pytest.raises(CoordinatorLost, match=r"127\.0\.0\.1"):
            await anext(stream)
        fake.on_generate = speak("back")
        fake.start()
        assert (await client.generate("hi")).text == "back"

    play(scene, reconnect_s=0.3)


def test_a_key_that_is_refused_on_the_way_back_ends_the_requests() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        stream = await half_told(fake, client)
        await fake.close()
        fake.client_keys = KeyPair.generate()
        fake.start()
        with pytest.raises(AccessRefused):
            await anext(stream)

    play(scene)


def test_a_coordinator_that_never_says_a_word_about_a_request_again_is_given_up() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        fake.on_generate = begin("he")
        fake.on_resume = lambda *_: None
        stream = await client.generate("hi", stream=True)
        await read_until(stream, "he")
        with pytest.raises(CoordinatorLost, match="silent"):
            await anext(stream)
        assert len(fake.of(Resume)) >= 2

    play(scene, timeout_s=0.3, reconnect_s=0.8)


def test_closing_the_client_while_there_is_no_connection_is_no_wait() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        stream = await half_told(fake, client)
        await close_noticed(fake, client)
        assert "reconnecting" in stream.waits_for
        reading = asyncio.create_task(stream.next_piece())
        await client.close()
        assert await reading is None
        fake.start()

    play(scene)


def test_a_request_has_the_name_it_was_given_or_one_that_nobody_guesses() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        await client.generate("hi", request="my-key")
        await client.generate("hi")
        await client.chat([{"role": "user", "content": "hi"}], request="another")
        names = [message.request for message in fake.of(Generate)]
        assert names[::2] == ["my-key", "another"] and len(names[1]) == 32
        fake.on_generate = begin("he")
        stream = await client.generate("hi", request="my-key", stream=True)
        with pytest.raises(RequestInvalid, match="'my-key' is open on this client already"):
            await client.generate("hi", request="my-key")
        await stream.aclose()

    play(scene)


def test_an_answer_says_who_computed_it() -> None:
    legs = (Leg(epoch=7, start=0, words="1/1", stages=("layers 0 to 1: pi",)),)

    def answer(fake: FakeCoordinator, to: bytes, message: Any, payload: bytes) -> None:
        fake.say(to, accepted(message.request))
        fake.say(to, replace(finished(message.request, FinishReason.LENGTH, 0), legs=legs))

    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        fake.on_generate = answer
        assert (await client.generate("hi")).legs == legs

    play(scene)


@pytest.mark.parametrize("text", ["not json", "[1]", "\udcff"])
def test_broken_status_is_a_typed_error(text: str) -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        fake.answers_status = False
        asking = asyncio.create_task(client.status())
        await fake.until(lambda: bool(fake.of(StatusRequest)))
        to = fake.peers[0]
        from protocol.messages import StatusReport

        fake.say(to, StatusReport(), text.encode(errors="surrogateescape"))
        with pytest.raises(FrameMalformed):
            await asking

    play(scene)


@pytest.mark.parametrize("frames", [(b"garbage",), (b"",), (b"\x91\x28",), (b"\x91\x29", b"", b"")])
def test_frames_that_break_the_protocol_end_requests_with_a_typed_error(frames: tuple[bytes, ...]) -> None:
    def answer(fake: FakeCoordinator, to: bytes, message: Any, payload: bytes) -> None:
        fake.say_raw(to, *frames)

    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        fake.on_generate = answer
        with pytest.raises(FrameMalformed):
            await client.generate("hi")
        fake.on_generate = speak("back")
        assert (await client.generate("hi")).text == "back"

    play(scene)


def test_a_piece_out_of_order_ends_its_request_only() -> None:
    def answer(fake: FakeCoordinator, to: bytes, message: Any, payload: bytes) -> None:
        fake.say(to, accepted(message.request))
        fake.say(to, piece(message.request, 5, "x", 1))

    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        fake.on_generate = begin("he")
        good = await client.generate("hi", stream=True)
        await anext(good)
        fake.on_generate = answer
        with pytest.raises(FrameMalformed, match="from token 5, expected 0"):
            await client.generate("hi")
        assert good._mailbox.end is None

    play(scene)


def test_status_and_invitation() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        assert await client.status() == {"phase": "ready"}
        assert await client.invite() == "a link, trusted False"
        assert await client.invite(trusted=True) == "a link, trusted True"

    play(scene)


def test_status_has_a_deadline() -> None:
    async def scene(fake: FakeCoordinator, client: AsyncClient) -> None:
        fake.answers_status = False
        with pytest.raises(CoordinatorLost, match="StatusRequest"):
            await client.status()

    play(scene, timeout_s=0.3)


def stranger(link: Link) -> Link:
    return Link(role="ask", addresses=link.addresses, server_key=link.server_key, secret=KeyPair.generate().secret)


def elsewhere(link: Link) -> Link:
    return Link(role="ask", addresses=("127.0.0.1:1",), server_key=link.server_key, secret=link.secret)


def imposter(link: Link) -> Link:
    return Link(role="ask", addresses=link.addresses, server_key=KeyPair.generate().public, secret=link.secret)


@pytest.mark.parametrize(
    ("change", "error"), [(stranger, AccessRefused), (elsewhere, CoordinatorLost), (imposter, CoordinatorLost)]
)
def test_a_link_that_leads_nowhere_names_the_addresses(change: Callable[[Link], Link], error: type[Exception]) -> None:
    async def run() -> None:
        async with fake_coordinator() as fake:
            link = change(fake.link)
            with pytest.raises(error, match=link.addresses[0]):
                async with AsyncClient(link, timeout_s=1.0):
                    pass

    asyncio.run(run())


def test_a_join_link_is_no_client_link() -> None:
    keys = KeyPair.generate()
    link = Link(role="join", addresses=("127.0.0.1:1",), server_key=keys.public, secret=keys.secret)
    with pytest.raises(LinkInvalid, match="for a worker"):
        AsyncClient(link)


def run_beside_a_fake(use: Callable[[FakeCoordinator], None]) -> None:
    """Run synchronous code in a thread while the fake coordinator serves."""

    async def run() -> None:
        async with fake_coordinator() as fake:
            await asyncio.to_thread(use, fake)
            await fake.until(lambda: True)

    asyncio.run(run())


def test_the_synchronous_client_is_the_same() -> None:
    def use(fake: FakeCoordinator) -> None:
        with Client(fake.link) as client:
            assert client.generate("hi").text == "hello"
            assert client.chat([{"role": "user", "content": "hi"}]).text == "hello"
            stream = client.generate("hi", stream=True)
            assert "".join(piece.text for piece in stream) == stream.result.text == "hello"
            assert "".join(p.text for p in client.chat([{"role": "user", "content": "hi"}], stream=True)) == "hello"
            assert client.status() == {"phase": "ready"}
            assert client.invite().startswith("a link")
        client.close()
        with pytest.raises(CoordinatorLost, match="closed"):
            client.status()
        assert not [thread for thread in threading.enumerate() if thread.name == "manyhands client"]

    run_beside_a_fake(use)


def test_a_synchronous_stream_that_is_left_cancels() -> None:
    def use(fake: FakeCoordinator) -> None:
        fake.on_generate = begin("he")
        with Client(fake.link) as client:
            with client.generate("hi", stream=True) as stream:
                next(stream)
            for _ in client.generate("hi", stream=True):
                break
            gc.collect()
            client.status()  # answered after both cancels were sent
            assert len(fake.of(Cancel)) == 2

    run_beside_a_fake(use)


def test_a_synchronous_client_that_is_dropped_leaves_no_thread() -> None:
    def use(fake: FakeCoordinator) -> None:
        client = Client(fake.link)
        client.status()
        del client
        gc.collect()
        assert not [thread for thread in threading.enumerate() if thread.name == "manyhands client"]

    run_beside_a_fake(use)


def test_a_client_dropped_in_its_own_thread_does_not_block() -> None:
    def use(fake: FakeCoordinator) -> None:
        client = Client(fake.link)
        client.status()
        loop, end, thread = client._loop, client._end, client._loop._thread

        async def drop() -> None:
            end()

        loop.call(drop())
        thread.join(10)
        assert not thread.is_alive()

    run_beside_a_fake(use)


def test_an_error_crosses_the_thread() -> None:
    def use(fake: FakeCoordinator) -> None:
        fake.on_generate = refuse(PeerLost("gone", node="w2"))
        with Client(fake.link) as client, pytest.raises(PeerLost, match="w2"):
            client.generate("hi")

    run_beside_a_fake(use)

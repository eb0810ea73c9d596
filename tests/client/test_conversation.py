"""The client's conversation and options as tables: no sockets, no clock."""

from __future__ import annotations

from typing import Any

import pytest
from fake_coordinator import accepted, finished, piece
from hypothesis import given
from hypothesis import strategies as st

from manyhands.conversation import MAX_OPEN_REQUESTS, Conversation, RequestLog, RequestPhase, Told, WaitsFor
from manyhands.options import Options, chat_order, completion_order
from manyhands.results import Generation, Piece
from protocol.errors import CoordinatorLost, FrameMalformed, ManyhandsError, PeerLost, RequestInvalid
from protocol.frames import decode
from protocol.ids import RequestId
from protocol.messages import Cancel, ErrorReport, FinishReason, Resume, Waiting

R = RequestId("r1")
ACCEPTED, P0, P1 = accepted(R), piece(R, 0, "a", 1), piece(R, 1, "b", 2)
WAITING, DONE = Waiting(request=R, phase="loading"), finished(R, FinishReason.LENGTH, 2)
ERROR = ErrorReport.of(PeerLost("gone"), request=R)
TEXT_ONLY = piece(R, 2, "!")

SENT, QUEUED, STREAMING, ENDED = RequestPhase
STORIES = [
    ([], SENT, []),
    ([WAITING], SENT, [WaitsFor]),
    ([ACCEPTED], QUEUED, []),
    ([ACCEPTED, WAITING], QUEUED, [WaitsFor]),
    ([ACCEPTED, P0], STREAMING, [Piece]),
    ([ACCEPTED, P0, WAITING, P1], STREAMING, [Piece, WaitsFor, Piece]),
    ([ACCEPTED, P0, P1, TEXT_ONLY, DONE], ENDED, [Piece, Piece, Piece, Generation]),
    ([ACCEPTED, DONE], ENDED, [Generation]),
    ([DONE], ENDED, [Generation]),
    ([ERROR], ENDED, [PeerLost]),
    ([ACCEPTED, P0, ERROR], ENDED, [Piece, PeerLost]),
]
BROKEN = [
    [P0],
    [ACCEPTED, ACCEPTED],
    [ACCEPTED, P1],
    [ACCEPTED, P0, P0],
    [ACCEPTED, P0, ACCEPTED],
    [ACCEPTED, piece(R, 0, "", 1, 2, 3, 4)],
    [ACCEPTED, piece(R, 0, "x" * 5000, 1)],
    [ACCEPTED, *[piece(R, 0, "x" * 1000)] * 2],
]


def request_log() -> RequestLog:
    return RequestLog(completion_order(R, "hi", Options(max_tokens=3)))


@pytest.mark.parametrize(("story", "phase", "updates"), STORIES)
def test_stories_of_a_request(story: list[Any], phase: RequestPhase, updates: list[type]) -> None:
    log = request_log()
    got = [update for message in story if (update := log.receive(message)) is not None]
    assert [type(update) for update in got] == updates
    assert log.phase is phase
    if got and isinstance(got[-1], Generation):
        assert got[-1].text == "".join(update.text for update in got if isinstance(update, Piece))


@pytest.mark.parametrize("story", BROKEN)
def test_stories_that_break_the_protocol(story: list[Any]) -> None:
    log = request_log()
    with pytest.raises(FrameMalformed):
        for message in story:
            log.receive(message)


def conversation(timeout_s: float = 10.0, reconnect_s: float = 0.0) -> Conversation:
    talk = Conversation(
        timeout_s=timeout_s, reconnect_s=reconnect_s, addresses=("10.0.0.1:7411", "[::1]:7411"), now=0.0
    )
    talk.open(completion_order(R, "hi", Options()), now=0.0)
    return talk


def lose(talk: Conversation, now: float) -> list[Told]:
    error = CoordinatorLost("the connection broke")
    return talk.lost(error, now) + talk.give_up(error, now)


def said_again(talk: Conversation, now: float) -> list[Any]:
    return [decode(frames).message for frames in talk.say_again(now)]


def test_after_the_end_nothing_more_is_told() -> None:
    talk = conversation()
    assert len(talk.receive(DONE, 1.0)) == 1
    for message in (DONE, P0, WAITING, ERROR):
        assert talk.receive(message, 1.0) == []
    assert talk.open_requests == ()


def test_an_abandoned_request_is_followed_but_tells_nobody() -> None:
    talk = conversation()
    assert talk.abandon(R)
    assert not talk.abandon(R)
    for message in (ACCEPTED, P0):
        assert talk.receive(message, 1.0) == []
    assert talk.open_requests == (R,)
    assert talk.receive(DONE, 1.0) == []
    assert talk.open_requests == ()
    assert not talk.abandon(R)


def test_silence_is_told_and_life_goes_on() -> None:
    talk = conversation(timeout_s=2.0)
    for second in range(1, 20):
        assert talk.silence(second) is None
        talk.receive(WAITING, second)
    assert talk.silence(20.0) is None
    error = talk.silence(21.0)
    assert isinstance(error, CoordinatorLost)
    assert "10.0.0.1:7411, [::1]:7411 has been silent for 2 s" in str(error)
    assert [type(update) for _, update in lose(talk, 21.0)][-1] is CoordinatorLost
    assert talk.silence(99.0) is None


def test_silence_while_we_were_away_proves_nothing() -> None:
    talk = conversation(timeout_s=2.0)
    assert talk.silence(1.0) is None
    assert talk.silence(500.0) is None
    assert talk.silence(501.0) is None
    assert talk.silence(502.0) is not None


def test_silence_about_what_nobody_waits_for_is_no_loss() -> None:
    talk = conversation(timeout_s=2.0)
    talk.abandon(R)
    assert [talk.silence(second) for second in (1.0, 2.0, 3.0)] == [None] * 3
    assert talk.open_requests == ()


# ---------------------------------------------------------------- from one connection to the next

OTHER = RequestId("r2")


def test_what_has_not_begun_is_asked_again_and_what_has_goes_on() -> None:
    talk = conversation(reconnect_s=60.0)
    order = completion_order(OTHER, "ho", Options())
    talk.open(order, now=0.0)
    for message in (ACCEPTED, P0, P1, TEXT_ONLY, accepted(OTHER)):
        talk.receive(message, 1.0)
    assert lose(talk, 2.0) == [Told(name, WaitsFor("reconnecting: the connection broke")) for name in (R, OTHER)]
    assert said_again(talk, 3.0) == [Resume(request=R, tokens=2, chars=3), order.message]
    assert talk.receive(ACCEPTED, 3.0) == [Told(R, WaitsFor(""))]
    assert talk.receive(piece(R, 2, "c", 3), 3.0) == [Told(R, Piece(text="c", token_ids=(3,)))]
    for message in (accepted(OTHER), piece(OTHER, 0, "x", 1)):
        talk.receive(message, 3.0)
    assert said_again(talk, 4.0)[1] == Resume(request=OTHER, tokens=1, chars=1)
    [(_, answer)] = talk.receive(DONE, 4.0)
    assert isinstance(answer, Generation) and (answer.text, answer.token_ids) == ("ab!c", (1, 2, 3))


def test_what_was_abandoned_is_cancelled_on_the_next_connection() -> None:
    talk = conversation(reconnect_s=60.0)
    talk.abandon(R)
    assert lose(talk, 1.0) == []
    assert said_again(talk, 2.0) == [Cancel(request=R)]


def test_a_piece_that_was_received_already_breaks_the_protocol() -> None:
    talk = conversation(reconnect_s=60.0)
    for message in (ACCEPTED, P0):
        talk.receive(message, 1.0)
    lose(talk, 2.0)
    talk.say_again(3.0)
    talk.receive(ACCEPTED, 3.0)
    [(_, error)] = talk.receive(P0, 3.0)
    assert isinstance(error, FrameMalformed)


def test_a_request_is_given_up_when_nothing_was_heard_about_it_for_too_long() -> None:
    talk = conversation(timeout_s=10.0, reconnect_s=60.0)
    lose(talk, 5.0)
    assert talk.patience_s(20.0) == 45.0
    talk.open(completion_order(OTHER, "ho", Options()), now=40.0)
    assert len(lose(talk, 40.0)) == 2
    talk.say_again(50.0)  # connected, but nothing comes
    assert [request for request, update in lose(talk, 65.0) if isinstance(update, CoordinatorLost)] == [R]
    talk.receive(accepted(OTHER), 66.0)
    assert [type(update) for _, update in lose(talk, 101.0)] == [WaitsFor]  # counted from the last loss
    assert talk.patience_s(101.0) == 60.0


def test_a_name_is_open_once() -> None:
    talk = conversation()
    with pytest.raises(RequestInvalid, match="'r1' is open on this client already"):
        talk.open(completion_order(R, "ho", Options()), now=0.0)


def test_pings_only_while_requests_are_open() -> None:
    talk = conversation()
    assert [now for now in range(10) if talk.is_ping_due(now)] == [3, 6, 9]
    talk.receive(DONE, 9.0)
    assert not talk.is_ping_due(99.0)


def test_open_requests_are_bounded() -> None:
    talk = conversation()
    with pytest.raises(RequestInvalid, match="requests are open"):
        for number in range(MAX_OPEN_REQUESTS):
            talk.open(completion_order(RequestId(f"x{number}"), "hi", Options()), now=0.0)


MESSAGES = st.sampled_from([ACCEPTED, P0, P1, TEXT_ONLY, WAITING, DONE, ERROR])


@given(st.lists(st.one_of(MESSAGES, st.sampled_from(["abandon", "late", "lost", "again"])), max_size=12))
def test_every_request_ends_at_most_once_and_tells_its_end(story: list[Any]) -> None:
    talk = conversation(timeout_s=5.0, reconnect_s=3.0)
    ends = 0
    for now, event in enumerate(story):
        told: list[Told] = []
        if event == "abandon":
            talk.abandon(R)
        elif event == "late":
            if any(talk.silence(now + later) for later in range(0, 10, 2)):
                told = lose(talk, now)
        elif event == "lost":
            told = lose(talk, now)
        elif event == "again":
            assert len(talk.say_again(now)) == len(talk.open_requests)
        else:
            told = talk.receive(event, now)
        ends += sum(isinstance(update, Generation | ManyhandsError) for _, update in told)
        assert not told or ends <= 1
        assert bool(talk.open_requests) or "abandon" in story or ends == 1


GOOD_OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 2**40},
    {"stop": "one string"},
    {"stop": ["a", "b"]},
    {"max_tokens": 1},
]
BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens 0"),
    ({"max_tokens": 1.5}, "max_tokens must be an integer"),
    ({"max_tokens": True}, "max_tokens must be an integer"),
    ({"temperature": -1}, "temperature -1"),
    ({"temperature": float("nan")}, "temperature nan"),
    ({"temperature": "hot"}, "temperature must be a number"),
    ({"top_p": 0.0}, "top_p 0"),
    ({"top_p": 1.5}, "top_p 1.5"),
    ({"top_k": -1}, "top_k -1"),
    ({"seed": -1}, "seed -1"),
    ({"stop": [""]}, "stop string ''"),
    ({"stop": ["x" * 257]}, "1 to 256 characters"),
    ({"stop": ["x"] * 17}, "17 stop strings"),
    ({"stop": [1]}, "stop string 1"),
    ({"request": 1}, "request must be text"),
    ({"request": "x" * 65}, "65 characters"),
    ({"request": "\ud800"}, "UTF-8"),
]


@pytest.mark.parametrize("options", GOOD_OPTIONS)
def test_good_options(options: dict[str, Any]) -> None:
    order = completion_order(R, "hi", Options(**options))
    assert order.message.max_tokens == options.get("max_tokens", 128)


@pytest.mark.parametrize(("options", "problem"), BAD_OPTIONS)
def test_bad_options_are_named(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestInvalid, match=problem):
        Options(**options)


def test_a_lone_string_is_one_stop_string() -> None:
    assert completion_order(R, "hi", Options(stop="end")).message.stop == ("end",)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="max_token"):
        Options(max_token=3)  # type: ignore[call-arg]


BAD_PROMPTS: list[tuple[Any, str]] = [
    ([1, -1], "prompt token 1 is -1"),
    ([2**31], "prompt token 0"),
    (["a"], "prompt token 0 is 'a'"),
    ([True], "prompt token 0 is True"),
    ("\ud800", "UTF-8 at character 0"),
    ("x" * (8 * 2**20 + 1), "8388609 bytes"),
]


@pytest.mark.parametrize(("prompt", "problem"), BAD_PROMPTS, ids=range(len(BAD_PROMPTS)))
def test_bad_prompts_are_named(prompt: Any, problem: str) -> None:
    with pytest.raises(RequestInvalid, match=problem):
        completion_order(R, prompt, Options())


BAD_CHATS: list[Any] = [
    [],
    "hi",
    {"role": "user", "content": "x"},
    [{"role": "user"}],
    [{"role": 1, "content": "x"}],
    [5],
]


@pytest.mark.parametrize("messages", BAD_CHATS)
def test_bad_chats_are_refused(messages: Any) -> None:
    with pytest.raises(RequestInvalid, match="chat"):
        chat_order(R, messages, Options())

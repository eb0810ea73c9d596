"""The client's conversation and options as tables: no sockets, no clock."""

from __future__ import annotations

from typing import Any

import pytest
from fake_coordinator import accepted, finished, piece
from hypothesis import given
from hypothesis import strategies as st

from manyhands.conversation import MAX_OPEN_REQUESTS, Conversation, RequestLog, RequestPhase, WaitsFor
from manyhands.options import Options, chat_order, completion_order
from manyhands.results import Generation, Piece
from protocol.errors import CoordinatorLost, FrameMalformed, ManyhandsError, PeerLost, RequestInvalid
from protocol.ids import RequestId
from protocol.messages import ErrorReport, FinishReason, Waiting

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


@pytest.mark.parametrize(("story", "phase", "updates"), STORIES)
def test_stories_of_a_request(story: list[Any], phase: RequestPhase, updates: list[type]) -> None:
    log = RequestLog(max_tokens=3)
    got = [update for message in story if (update := log.receive(message)) is not None]
    assert [type(update) for update in got] == updates
    assert log.phase is phase
    if got and isinstance(got[-1], Generation):
        assert got[-1].text == "".join(update.text for update in got if isinstance(update, Piece))


@pytest.mark.parametrize("story", BROKEN)
def test_stories_that_break_the_protocol(story: list[Any]) -> None:
    log = RequestLog(max_tokens=3)
    with pytest.raises(FrameMalformed):
        for message in story:
            log.receive(message)


def conversation(timeout_s: float = 10.0) -> Conversation:
    talk = Conversation(timeout_s=timeout_s, addresses=("10.0.0.1:7411", "[::1]:7411"), now=0.0)
    talk.open(completion_order(R, "hi", Options()).message, now=0.0)
    return talk


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


def test_silence_ends_a_request_and_life_does_not() -> None:
    talk = conversation(timeout_s=2.0)
    for second in range(1, 20):
        assert talk.overdue(second) == []
        talk.receive(WAITING, second)
    assert talk.overdue(20.0) == []
    told = talk.overdue(21.0)
    assert [type(update) for _, update in told] == [CoordinatorLost]
    assert "10.0.0.1:7411, [::1]:7411" in str(told[0].update)
    assert talk.overdue(99.0) == []


def test_silence_while_we_were_away_ends_nothing() -> None:
    talk = conversation(timeout_s=2.0)
    assert talk.overdue(1.0) == []
    assert talk.overdue(500.0) == []
    assert talk.overdue(501.0) == []
    assert len(talk.overdue(502.0)) == 1


def test_pings_only_while_requests_are_open() -> None:
    talk = conversation()
    assert [now for now in range(10) if talk.is_ping_due(now)] == [3, 6, 9]
    talk.receive(DONE, 9.0)
    assert not talk.is_ping_due(99.0)


def test_open_requests_are_bounded() -> None:
    talk = conversation()
    with pytest.raises(RequestInvalid, match="requests are open"):
        for number in range(MAX_OPEN_REQUESTS):
            talk.open(completion_order(RequestId(f"x{number}"), "hi", Options()).message, now=0.0)


MESSAGES = st.sampled_from([ACCEPTED, P0, P1, TEXT_ONLY, WAITING, DONE, ERROR])


@given(st.lists(st.one_of(MESSAGES, st.sampled_from(["abandon", "late"])), max_size=12))
def test_every_request_ends_at_most_once_and_tells_its_end(story: list[Any]) -> None:
    talk = conversation(timeout_s=5.0)
    ends = 0
    for now, event in enumerate(story):
        told = []
        if event == "abandon":
            talk.abandon(R)
        elif event == "late":
            told = [one for later in range(0, 10, 2) for one in talk.overdue(now + later)]
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

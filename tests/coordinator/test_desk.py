"""The clients' desk, by events and the time alone: pieces, stop strings, waiting, silence, names."""

from __future__ import annotations

import json

import pytest

from coordinator.answer_text import AnswerText
from coordinator.desk import MAX_PIECE_CHARS, MAX_READING, Act, Desk, Say, Ticket
from coordinator.events import (
    RequestArrived,
    RequestCancelled,
    SessionEnded,
    SessionFailed,
    TokensCommitted,
    token_bytes,
    token_ids,
)
from coordinator.prompts import read_prompt
from coordinator.tokens import TextCodec
from protocol.batches import Sampling
from protocol.errors import ManyhandsError, Overloaded, PeerLost, RequestInvalid, TokenizerMissing
from protocol.ids import RequestId, SessionId
from protocol.messages import (
    Accepted,
    Cancel,
    ErrorReport,
    Finished,
    FinishReason,
    Generate,
    Piece,
    PromptKind,
    Timings,
    Usage,
    Waiting,
)
from tests.coordinator.byte_model import EOS, codec

USAGE = Usage(prompt_tokens=2, completion_tokens=3)
TIMINGS = Timings(queued_s=0.1, first_token_s=0.2, total_s=0.3)
ANN, BOB = b"client-ann", b"client-bob"


@pytest.fixture(scope="module")
def text_codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    return codec(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def desk(text_codec: TextCodec) -> Desk:
    return Desk(text_codec, eos=[EOS], client_silence_s=15.0)


def order(name: str = "r", kind: PromptKind = PromptKind.TEXT, **more: object) -> Generate:
    values = {"request": RequestId(name), "prompt_kind": kind, "max_tokens": 9, "sampling": Sampling(), **more}
    return Generate(**values)  # type: ignore[arg-type]


def start(desk: Desk, client: bytes = ANN, now: float = 0.0, **more: object) -> Ticket:
    ticket = desk.open(client, order(**more), now)  # type: ignore[arg-type]
    desk.submit(ticket, token_bytes([1, 2]), now)
    return ticket


def commit(desk: Desk, ticket: Ticket, text: bytes, now: float = 0.0) -> list[Act]:
    assert ticket.session is not None
    return desk.committed(TokensCommitted(session=ticket.session, index=ticket.num_tokens, tokens=tuple(text)), now)


def end(desk: Desk, ticket: Ticket, reason: FinishReason = FinishReason.LENGTH) -> list[Act]:
    assert ticket.session is not None
    return desk.ended(SessionEnded(session=ticket.session, reason=reason, usage=USAGE, timings=TIMINGS))


def said(acts: list[Act]) -> str:
    return "".join(act.message.text for act in acts if isinstance(act, Say) and isinstance(act.message, Piece))


def test_a_request_is_accepted_streamed_and_finished(desk: Desk) -> None:
    ticket = desk.open(ANN, order(), 0.0)
    accepted, arrived = desk.submit(ticket, token_bytes([7, 8, 9]), 0.0)
    assert accepted == Say(ANN, Accepted(request=RequestId("r"), session=SessionId(1), prompt_tokens=3))
    assert arrived == RequestArrived(
        session=SessionId(1), prompt=token_bytes([7, 8, 9]), max_tokens=9, sampling=Sampling(),
        stop_tokens=frozenset({EOS}),
    )  # fmt: skip
    assert commit(desk, ticket, b"ab") == [Say(ANN, Piece(request=RequestId("r"), index=0, text="ab", tokens=(97, 98)))]
    assert commit(desk, ticket, b"c") == [Say(ANN, Piece(request=RequestId("r"), index=2, text="c", tokens=(99,)))]
    finished = Finished(request=RequestId("r"), reason=FinishReason.LENGTH, usage=USAGE, timings=TIMINGS)
    assert end(desk, ticket) == [Say(ANN, finished)]
    assert desk.num_open == 0


def test_ignore_eos_leaves_no_stop_tokens(desk: Desk) -> None:
    ticket = desk.open(ANN, order(ignore_eos=True), 0.0)
    arrived = desk.submit(ticket, token_bytes([1]), 0.0)[1]
    assert isinstance(arrived, RequestArrived) and arrived.stop_tokens == frozenset()


def test_half_a_character_waits_for_its_rest(desk: Desk) -> None:
    ticket = start(desk)
    euro = "€".encode()
    assert [said(commit(desk, ticket, euro[i : i + 1])) for i in range(3)] == ["", "", "€"]
    assert said(commit(desk, ticket, euro[:2])) == ""
    assert said(end(desk, ticket)) == "\ufffd"


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        ([b"one END two"], ["one "]),
        ([b"one E", b"N", b"D two"], ["one ", "", ""]),
        ([b"one E", b"X END"], ["one ", "EX "]),
        ([b"END"], [""]),
    ],
)
def test_a_stop_string_cuts_the_text_and_ends_the_session(desk: Desk, pieces: list[bytes], shown: list[str]) -> None:
    ticket = start(desk, stop=("END", "never"))
    acts = [commit(desk, ticket, piece) for piece in pieces]
    assert [said(one) for one in acts] == shown
    assert acts[-1][-1] == RequestCancelled(session=SessionId(1), reason=FinishReason.STOP)
    assert commit(desk, ticket, b"in flight") == []
    last = end(desk, ticket, FinishReason.STOP)
    assert [type(act.message) for act in last if isinstance(act, Say)] == [Finished]


def test_text_held_back_for_a_stop_string_comes_at_the_end(desk: Desk) -> None:
    ticket = start(desk, stop=("END",))
    assert said(commit(desk, ticket, b"the EN")) == "the "
    assert said(end(desk, ticket, FinishReason.STOP)) == "EN"


def test_cancelled_text_is_not_flushed(desk: Desk) -> None:
    ticket = start(desk, stop=("END",))
    commit(desk, ticket, b"the EN")
    assert said(end(desk, ticket, FinishReason.CANCELLED)) == ""


def test_long_text_is_cut_into_messages_within_bounds(desk: Desk) -> None:
    ticket = start(desk)
    text = b"x" * (2 * MAX_PIECE_CHARS + 5)
    acts = commit(desk, ticket, text)
    pieces = [act.message for act in acts if isinstance(act, Say) and isinstance(act.message, Piece)]
    assert said(acts).encode() == text
    assert b"".join(bytes(piece.tokens) for piece in pieces) == text
    assert all(len(piece.text) <= MAX_PIECE_CHARS and len(piece.tokens) <= 1024 for piece in pieces)
    position = 0
    for piece in pieces:
        assert piece.index == position
        position += len(piece.tokens)


def test_names_belong_to_a_client(desk: Desk) -> None:
    first, second = start(desk, ANN), start(desk, BOB)
    assert first.session != second.session
    with pytest.raises(RequestInvalid, match="'r' is open already"):
        desk.open(ANN, order(), 0.0)
    end(desk, first)
    start(desk, ANN)  # free again


def test_cancel_before_and_after_the_prompt_was_read(desk: Desk) -> None:
    ticket = desk.open(ANN, order(), 0.0)
    [act] = desk.cancel(ANN, Cancel(request=RequestId("r")))
    assert isinstance(act, Say) and isinstance(act.message, Finished)
    assert act.message.reason is FinishReason.CANCELLED
    assert desk.submit(ticket, token_bytes([1]), 0.0) == []
    assert desk.refuse(ticket, RequestInvalid("late")) == []
    ticket = start(desk)
    assert desk.cancel(BOB, Cancel(request=RequestId("r"))) == []
    assert ticket.session is not None
    assert desk.cancel(ANN, Cancel(request=RequestId("r"))) == [RequestCancelled(session=ticket.session)]
    assert len(end(desk, ticket, FinishReason.CANCELLED)) == 1


def test_waiting_is_said_every_second_of_silence(desk: Desk) -> None:
    reading = desk.open(ANN, order("a"), 0.0)
    queued = start(desk, ANN, name="b")
    assert desk.tick(0.9, lambda session: "queued") == []
    assert [act.message for act in desk.tick(1.0, lambda session: f"queued {session}") if isinstance(act, Say)] == [
        Waiting(request=reading.request, phase="reading the prompt"),
        Waiting(request=queued.request, phase="queued 1"),
    ]
    commit(desk, queued, b"x", now=1.8)
    acts = desk.tick(2.0, lambda session: "")
    assert [act.message.request for act in acts if isinstance(act, Say)] == ["a"]  # type: ignore[attr-defined]


def test_a_silent_client_loses_its_requests(desk: Desk) -> None:
    quiet, loud = start(desk, ANN), start(desk, BOB)
    reading = desk.open(ANN, order("unread"), 0.0)
    desk.heard(BOB, 10.0)
    acts = desk.tick(15.0, lambda session: "")
    assert acts[0] == RequestCancelled(session=quiet.session or SessionId(0))
    goodbyes = [act.message for act in acts if isinstance(act, Say) and act.client == ANN]
    assert [(type(one), getattr(one, "code", "")) for one in goodbyes] == [(ErrorReport, "cancelled")] * 2
    assert not desk.is_open(quiet) and not desk.is_open(reading) and desk.is_open(loud)
    assert end(desk, quiet, FinishReason.CANCELLED) == []


def test_a_client_that_is_gone_is_told_nothing(desk: Desk) -> None:
    ticket = start(desk, ANN)
    start(desk, BOB)
    assert desk.client_gone(ANN) == [RequestCancelled(session=ticket.session or SessionId(0))]
    assert commit(desk, ticket, b"x") == []
    assert desk.num_open == 1
    assert desk.client_gone(b"stranger") == []


def test_failures_name_the_request(desk: Desk) -> None:
    ticket = start(desk)
    error = PeerLost("pi was silent", node="pi")
    [act] = desk.failed(SessionFailed(session=ticket.session or SessionId(0), error=error))
    assert act == Say(ANN, ErrorReport.of(error, request="r"))
    assert desk.failed(SessionFailed(session=SessionId(99), error=error)) == []


def test_close_refuses_all_that_is_open(desk: Desk) -> None:
    start(desk, ANN)
    desk.open(BOB, order(), 0.0)
    acts = desk.close(Overloaded("the coordinator is stopping"))
    assert [(act.client, act.message.code) for act in acts if isinstance(act, Say)] == [  # type: ignore[attr-defined]
        (ANN, "overloaded"),
        (BOB, "overloaded"),
    ]
    assert desk.num_open == 0


def test_prompts_being_read_are_bounded(desk: Desk) -> None:
    for number in range(MAX_READING):
        desk.open(b"client-%d" % number, order(), 0.0)
    with pytest.raises(Overloaded, match="prompts are being read"):
        desk.open(ANN, order(), 0.0)


def test_without_a_tokenizer_only_ids_are_taken() -> None:
    desk = Desk(None, eos=[], client_silence_s=15.0)
    for bad in (order(), order(kind=PromptKind.CHAT), order(kind=PromptKind.IDS, stop=("END",))):
        with pytest.raises(TokenizerMissing):
            desk.open(ANN, bad, 0.0)
    ticket = start(desk, kind=PromptKind.IDS)
    assert commit(desk, ticket, b"ab") == [Say(ANN, Piece(request=RequestId("r"), index=0, text="", tokens=(97, 98)))]
    assert len(end(desk, ticket)) == 1


CHAT = json.dumps([{"role": "user", "content": "hi"}]).encode()


@pytest.mark.parametrize(
    ("kind", "payload", "ids"),
    [
        (PromptKind.TEXT, "hé".encode(), list("hé".encode())),
        (PromptKind.IDS, token_bytes([5, 6]), [5, 6]),
        (PromptKind.IDS, b"", []),
        (PromptKind.CHAT, CHAT, list(b"<user>hi<assistant>")),
    ],
)
def test_prompts_of_every_kind(text_codec: TextCodec, kind: PromptKind, payload: bytes, ids: list[int]) -> None:
    assert list(token_ids(read_prompt(text_codec, kind, payload))) == ids


@pytest.mark.parametrize(
    ("kind", "payload", "told"),
    [
        (PromptKind.TEXT, b"\xff", "not UTF-8"),
        (PromptKind.IDS, b"123", "3 bytes"),
        (PromptKind.CHAT, b"{", "not JSON"),
        (PromptKind.CHAT, b"[" * 100_000, "not JSON"),
        (PromptKind.CHAT, b"{}", "list of 1"),
        (PromptKind.CHAT, b"[]", "list of 1"),
        (PromptKind.CHAT, b'[{"role": "user"}]', "message 0"),
        (PromptKind.CHAT, b'[{"role": "user", "content": 3}]', "message 0"),
        (PromptKind.CHAT, b"[3]", "message 0"),
    ],
)
def test_bad_prompts_are_the_clients_fault(text_codec: TextCodec, kind: PromptKind, payload: bytes, told: str) -> None:
    with pytest.raises(RequestInvalid, match=told):
        read_prompt(text_codec, kind, payload)


def test_text_without_a_tokenizer() -> None:
    with pytest.raises(ManyhandsError) as caught:
        read_prompt(None, PromptKind.TEXT, b"x")
    assert isinstance(caught.value, TokenizerMissing)


def test_a_stop_string_in_the_held_back_rest_stops_too(text_codec: TextCodec) -> None:
    text = AnswerText(text_codec, ["\ufffd"])
    assert text.push("€".encode()[:2]) == ("", False)
    assert text.finish() == ("", True)

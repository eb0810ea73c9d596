"""The clients' desk, by events and the time alone: pieces, stop strings, waiting, silence, names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.answer_text import AnswerText
from coordinator.desk import MAX_OPEN_PER_CLIENT, MAX_READING, Act, Desk
from coordinator.ended_requests import KEEP_S, MAX_KEPT, MAX_TOKENS
from coordinator.events import (
    Effect,
    RequestArrived,
    RequestCancelled,
    SessionEnded,
    SessionFailed,
    TokensCommitted,
    token_bytes,
    token_ids,
)
from coordinator.prompts import read_prompt
from coordinator.takeover import Takeover, take_over
from coordinator.tickets import MAX_LEG_BYTES, MAX_LISTENERS, MAX_PIECE_CHARS, Say, Ticket, digest_of, fitting
from coordinator.token_log import Begun, Ended, Entry, Forgotten, TokenLog
from coordinator.tokens import TextCodec
from protocol.batches import Sampling
from protocol.errors import (
    ManyhandsError,
    Overloaded,
    PeerLost,
    RequestInvalid,
    RequestUnknown,
    StepFailed,
    TokenizerMissing,
)
from protocol.frames import encode
from protocol.ids import RequestId, SessionId
from protocol.messages import (
    Accepted,
    Cancel,
    ErrorReport,
    Finished,
    FinishReason,
    Generate,
    Leg,
    Piece,
    PromptKind,
    Resume,
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
    return a_desk(text_codec)


def a_desk(text_codec: TextCodec | None) -> Desk:
    return Desk(text_codec, eos=[EOS], client_silence_s=15.0, client_return_s=60.0)


def order(name: str = "r", kind: PromptKind = PromptKind.TEXT, **more: object) -> Generate:
    values = {"request": RequestId(name), "prompt_kind": kind, "max_tokens": 9, "sampling": Sampling(), **more}
    return Generate(**values)  # type: ignore[arg-type]


def open_one(desk: Desk, client: bytes = ANN, now: float = 0.0, **more: object) -> Ticket:
    asked = order(**more)  # type: ignore[arg-type]
    digest = digest_of(asked, b"hi")
    assert desk.repeated(client, asked, digest, now) is None
    return desk.open(client, asked, digest, now)


def start(desk: Desk, client: bytes = ANN, now: float = 0.0, **more: object) -> Ticket:
    ticket = open_one(desk, client, now, **more)
    desk.submit(ticket, token_bytes([1, 2]), now)
    return ticket


def ask_again(desk: Desk, client: bytes = ANN, now: float = 0.0, **more: object) -> list[Act] | None:
    asked = order(**more)  # type: ignore[arg-type]
    return desk.repeated(client, asked, digest_of(asked, b"hi"), now)


def resume(desk: Desk, client: bytes, tokens: int, chars: int, now: float = 0.0) -> list[Act]:
    return desk.resume(client, Resume(request=RequestId("r"), tokens=tokens, chars=chars), now)


def committed(ticket: Ticket, text: bytes) -> TokensCommitted:
    assert ticket.session is not None
    return TokensCommitted(session=ticket.session, index=len(ticket.answer.tokens), tokens=tuple(text))


def ending(ticket: Ticket, reason: FinishReason = FinishReason.LENGTH) -> SessionEnded:
    assert ticket.session is not None
    return SessionEnded(session=ticket.session, reason=reason, usage=USAGE, timings=TIMINGS)


def commit(desk: Desk, ticket: Ticket, text: bytes, now: float = 0.0) -> list[Act]:
    return desk.committed(committed(ticket, text), now)


def end(desk: Desk, ticket: Ticket, reason: FinishReason = FinishReason.LENGTH, now: float = 0.0) -> list[Act]:
    return desk.ended(ending(ticket, reason), now)


def heard_by(client: bytes, acts: list[Act] | None) -> list[object]:
    return [act.message for act in acts or [] if isinstance(act, Say) and act.client == client]


def kinds(messages: list[object]) -> list[str]:
    return [type(message).__name__ for message in messages]


def said(acts: list[Act]) -> str:
    return "".join(act.message.text for act in acts if isinstance(act, Say) and isinstance(act.message, Piece))


def test_a_request_is_accepted_streamed_and_finished(desk: Desk) -> None:
    ticket = open_one(desk)
    begun, accepted, arrived = desk.submit(ticket, token_bytes([7, 8, 9]), 0.0)
    assert begun == Begun(
        session=SessionId(1), order=order(), digest=digest_of(order(), b"hi"), prompt=token_bytes([7, 8, 9])
    )
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
    ticket = open_one(desk, ignore_eos=True)
    arrived = desk.submit(ticket, token_bytes([1]), 0.0)[-1]
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


def test_cancel_before_and_after_the_prompt_was_read(desk: Desk) -> None:
    ticket = open_one(desk)
    [act] = desk.cancel(ANN, Cancel(request=RequestId("r")), 0.0)
    assert isinstance(act, Say) and isinstance(act.message, Finished)
    assert act.message.reason is FinishReason.CANCELLED
    assert desk.submit(ticket, token_bytes([1]), 0.0) == []
    assert desk.refuse(ticket, RequestInvalid("late")) == []
    ticket = start(desk)
    assert desk.cancel(ANN, Cancel(request=RequestId("r")), 0.0) == [RequestCancelled(session=SessionId(1))]
    assert kinds(heard_by(ANN, end(desk, ticket, FinishReason.CANCELLED))) == ["Finished"]


def test_cancel_is_answered_whatever_has_become_of_the_request(desk: Desk) -> None:
    cancel = Cancel(request=RequestId("r"))
    [unknown] = heard_by(ANN, desk.cancel(ANN, cancel, 0.0))
    assert isinstance(unknown, ErrorReport) and unknown.code == "request-unknown"
    ticket = start(desk)
    commit(desk, ticket, b"ab")
    assert desk.cancel(BOB, cancel, 0.0) == [RequestCancelled(session=SessionId(1))]  # from a new connection
    acts = end(desk, ticket, FinishReason.CANCELLED)
    assert kinds(heard_by(ANN, acts)) == kinds(heard_by(BOB, acts)) == ["Finished"]
    assert kinds(heard_by(BOB, desk.cancel(BOB, cancel, 0.0))) == ["Finished"]


def test_waiting_is_said_every_second_of_silence(desk: Desk) -> None:
    reading = open_one(desk, name="a")
    queued = start(desk, ANN, name="b")
    assert desk.tick(0.9, lambda session: "queued") == []
    assert [act.message for act in desk.tick(1.0, lambda session: f"queued {session}") if isinstance(act, Say)] == [
        Waiting(request=reading.request, phase="reading the prompt"),
        Waiting(request=queued.request, phase="queued 1"),
    ]
    commit(desk, queued, b"x", now=1.8)
    acts = desk.tick(2.0, lambda session: "")
    assert [act.message.request for act in acts if isinstance(act, Say)] == ["a"]  # type: ignore[attr-defined]


def test_a_request_goes_on_while_its_client_is_gone_and_ends_when_nobody_comes_back(desk: Desk) -> None:
    quiet, loud, reading = start(desk, ANN), start(desk, BOB, name="loud"), open_one(desk, ANN, name="unread")
    for now in (10.0, 24.0, 38.0, 52.0, 66.0):
        desk.heard(BOB, now)
        acts = desk.tick(now, lambda session: "")
        assert heard_by(ANN, acts) == [] or now == 10.0
        assert not any(isinstance(act, RequestCancelled) for act in acts)
    assert heard_by(ANN, commit(desk, quiet, b"x")) == []
    acts = desk.tick(84.0, lambda session: "")
    assert [act for act in acts if isinstance(act, RequestCancelled)] == [RequestCancelled(session=SessionId(1))]
    assert not any(isinstance(act, RequestCancelled) for act in desk.tick(85.0, lambda session: ""))
    assert not desk.is_open(reading) and desk.is_open(loud)
    assert desk.ended(ending(quiet, FinishReason.CANCELLED), 85.0) == []
    _, piece, error = heard_by(ANN, resume(desk, ANN, 0, 0, 86.0))
    assert isinstance(piece, Piece) and piece.text == "x"
    assert isinstance(error, ErrorReport) and error.code == "cancelled" and "60 s" in error.text


def test_a_client_that_is_gone_is_told_nothing_until_it_is_back(desk: Desk) -> None:
    ticket = start(desk, ANN)
    start(desk, BOB, name="other")
    commit(desk, ticket, b"ab")
    desk.client_gone(ANN, 5.0)
    desk.client_gone(b"stranger", 5.0)
    assert commit(desk, ticket, b"cd") == []
    assert heard_by(ANN, desk.tick(6.0, lambda session: "")) == []
    back = b"client-ann-again"
    assert heard_by(back, resume(desk, back, 2, 2, 64.0)) == [
        Accepted(request=RequestId("r"), session=SessionId(1), prompt_tokens=2),
        Piece(request=RequestId("r"), index=2, text="cd", tokens=(99, 100)),
    ]
    assert not any(isinstance(act, RequestCancelled) for act in desk.tick(70.0, lambda session: ""))
    assert said(commit(desk, ticket, b"e")) == "e"


def test_a_name_is_one_request_wherever_it_is_said(desk: Desk) -> None:
    ticket = start(desk, ANN)
    commit(desk, ticket, b"ab")
    assert [said(heard) for heard in (ask_again(desk, BOB) or [], commit(desk, ticket, b"c"))] == ["ab", "cc"]
    assert desk.num_open == 1
    with pytest.raises(RequestInvalid, match="'r' was something else before"):
        desk.repeated(BOB, order(), digest_of(order(), b"ho"), 0.0)
    with pytest.raises(RequestInvalid, match="'r' was something else before"):
        ask_again(desk, BOB, max_tokens=8)
    end(desk, ticket)
    again = ask_again(desk, BOB)
    assert kinds(heard_by(BOB, again)) == ["Accepted", "Piece", "Finished"]
    assert said(again or []) == "abc"
    with pytest.raises(RequestInvalid, match="something else"):
        desk.repeated(BOB, order(), b"another digest", 0.0)


def test_a_repeated_request_that_is_being_read_hears_of_its_start(desk: Desk) -> None:
    ticket = open_one(desk, ANN)
    assert ask_again(desk, BOB) == []
    acts = desk.submit(ticket, token_bytes([1]), 0.0)
    assert kinds(heard_by(ANN, acts)) == kinds(heard_by(BOB, acts)) == ["Accepted"]


@pytest.mark.parametrize("reason", [None, FinishReason.CANCELLED])
def test_what_failed_or_was_cancelled_is_tried_again_under_its_name(desk: Desk, reason: FinishReason | None) -> None:
    ticket = start(desk)
    if reason is None:
        desk.ended(SessionFailed(session=SessionId(1), error=PeerLost("pi left")), 0.0)
    else:
        end(desk, ticket, reason)
    again = open_one(desk)
    acts = desk.submit(again, token_bytes([1, 2]), 0.0)
    assert acts[0] == Forgotten(session=SessionId(1))
    assert again.session == 2
    assert said(commit(desk, again, b"x")) == "x"


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("stops", [(), ("END",)])
def test_a_stream_goes_on_from_any_point(desk: Desk, ended: bool, stops: tuple[str, ...]) -> None:
    text = "aé€ and more\N{GRINNING FACE} E" + ("ND never seen" if stops else "")
    raw, ticket = text.encode(), start(desk, stop=stops, max_tokens=99)
    shown, points = "", [(0, 0)]
    for index in range(len(raw)):
        shown += said(commit(desk, ticket, raw[index : index + 1]))
        points.append((len(ticket.answer.tokens), len(shown)))
    if ended:
        shown += said(end(desk, ticket, FinishReason.STOP if stops else FinishReason.LENGTH))
    for number, (tokens, chars) in enumerate(points):
        client = b"client-%d" % number
        acts = resume(desk, client, tokens, chars)
        pieces = [act.message for act in acts if isinstance(act, Say) and isinstance(act.message, Piece)]
        assert shown[:chars] + said(acts) == shown
        assert sum(len(piece.tokens) for piece in pieces) == len(ticket.answer.tokens) - tokens
        assert not pieces or pieces[0].index == tokens
        assert kinds(heard_by(client, acts))[-1:] == (["Finished"] if ended else kinds(heard_by(client, acts))[-1:])


def test_one_who_has_seen_more_than_there_is_waits_for_what_follows(desk: Desk) -> None:
    ticket = start(desk)
    commit(desk, ticket, b"a")
    desk.client_gone(ANN, 0.0)
    resume(desk, BOB, 3, 3)
    assert said(commit(desk, ticket, b"bc")) == ""
    assert commit(desk, ticket, b"d") == [Say(BOB, Piece(request=RequestId("r"), index=3, text="d", tokens=(100,)))]


def test_one_who_has_seen_more_than_there_will_be_is_told_so(desk: Desk) -> None:
    ticket = start(desk)
    resume(desk, BOB, 3, 3)
    commit(desk, ticket, b"a")
    acts = end(desk, ticket)
    assert kinds(heard_by(ANN, acts)) == ["Finished"]
    [error] = heard_by(BOB, acts)
    assert isinstance(error, ErrorReport) and error.code == "session-lost" and "after 1 tokens, but 3" in error.text


def test_what_can_not_be_resumed(desk: Desk) -> None:
    with pytest.raises(RequestUnknown, match="'r' is not known"):
        resume(desk, ANN, 0, 0)
    start(desk)
    with pytest.raises(RequestInvalid, match="10 tokens are more than were asked for: 9"):
        resume(desk, ANN, 10, 0)


def test_listeners_are_bounded(desk: Desk) -> None:
    ticket = start(desk)
    for number in range(MAX_LISTENERS):
        resume(desk, b"client-%d" % number, 0, 0)
    acts = commit(desk, ticket, b"x")
    assert len(acts) == MAX_LISTENERS and heard_by(ANN, acts) == []
    many = a_desk(None)
    for number in range(MAX_OPEN_PER_CLIENT):
        start(many, name=f"r{number}", kind=PromptKind.IDS)
    with pytest.raises(Overloaded, match="requests of this client"):
        open_one(many, name="one more", kind=PromptKind.IDS)


def test_the_ended_are_forgotten_in_time_and_within_bounds(desk: Desk) -> None:
    first = start(desk, name="first")
    end(desk, first, now=0.0)
    assert desk.tick(KEEP_S - 1, lambda session: "") == []
    assert desk.tick(KEEP_S, lambda session: "") == [Forgotten(session=SessionId(1))]
    for number in range(MAX_KEPT + 1):
        end(desk, start(desk, name=f"r{number}"), now=1000.0)
    assert desk.tick(1000.0, lambda session: "") == [Forgotten(session=SessionId(2))]
    large = start(desk, name="large", max_tokens=MAX_TOKENS + 1)
    assert large.session is not None
    large.answer.tokens.extend([0] * (MAX_TOKENS + 1))
    end(desk, large, now=1000.0)
    assert len(desk.tick(1000.0, lambda session: "")) == MAX_KEPT + 1  # it does not fit by itself either


def test_what_is_written_before_it_is_shown(desk: Desk) -> None:
    one, two, three = (start(desk, name=name) for name in ("one", "two", "three"))
    error = StepFailed("too hot")
    effects: list[Effect] = [
        committed(one, b"a"), committed(two, b"b"), ending(two), SessionFailed(session=SessionId(3), error=error),
        TokensCommitted(session=SessionId(99), index=0, tokens=(1,)),
    ]  # fmt: skip
    records = desk.records(effects)
    assert [(type(record).__name__, record.session) for record in records] == [
        ("Grown", 1), ("Grown", 2), ("Ended", 2), ("Ended", 3),
    ]  # fmt: skip
    assert desk.records(effects) == records  # only a look
    assert [record.outcome for record in records if isinstance(record, Ended)] == [
        Finished(request=RequestId("two"), reason=FinishReason.LENGTH, usage=USAGE, timings=TIMINGS),
        ErrorReport.of(error, request="three"),
    ]
    assert three.session == 3


def test_legs_fit_a_message() -> None:
    line = "layers 0 to 1: " + "pi, " * 200
    legs = tuple(
        Leg(epoch=number, start=number, words="1/1", stages=(line,) * 20, repeated=1, cause="€" * 500)
        for number in range(64)
    )
    kept = fitting(legs)
    assert kept and kept == legs[-len(kept) :]
    finished = Finished(request=RequestId("r"), reason=FinishReason.STOP, usage=USAGE, timings=TIMINGS, legs=kept)
    assert len(encode(finished)[0]) <= 2 * MAX_LEG_BYTES
    assert fitting(legs[:1]) == legs[:1] and fitting(()) == ()


# ---------------------------------------------------------------- over a restart

MODEL = b"m" * 32


def restarted(log: TokenLog, text_codec: TextCodec, model: bytes = MODEL) -> tuple[Desk, Takeover]:
    desk = a_desk(text_codec)
    return desk, take_over(log.entries(), desk, model=model, now=1000.0, unix_now=500.0)


def keep(log: TokenLog, acts: list[Act]) -> None:
    log.write([act for act in acts if isinstance(act, Begun)], 400.0)


@pytest.mark.parametrize("stops", [(), ("END",)])
@pytest.mark.parametrize("reason", [None, FinishReason.LENGTH, FinishReason.CANCELLED])
@pytest.mark.parametrize("text", ["aé€ E", "aé€ END more"])
def test_a_restart_changes_nothing_for_who_resumes(
    tmp_path: Path, text_codec: TextCodec, stops: tuple[str, ...], reason: FinishReason | None, text: str
) -> None:
    log = TokenLog.open(tmp_path / "tokens.db", MODEL)
    desk = a_desk(text_codec)
    ticket = open_one(desk, stop=stops, max_tokens=99)
    keep(log, desk.submit(ticket, token_bytes([7, 8]), 0.0))
    acts: list[Act] = []
    for byte in text.encode():
        effect = committed(ticket, bytes([byte]))
        log.write(desk.records([effect]), 401.0)
        acts += desk.committed(effect, 0.0)
        if ticket.answer.is_stopped:
            break
    if reason is not None:
        log.write(desk.records([ending(ticket, reason)]), 402.0)
        acts += end(desk, ticket, reason)
    before = heard_by(ANN, acts)
    told = "".join(message.text for message in before if isinstance(message, Piece))
    new, taken = restarted(log, text_codec)
    log.close()
    after = heard_by(BOB, resume(new, BOB, 0, 0, 1000.0))
    assert "".join(message.text for message in after if isinstance(message, Piece)) == told
    tokens = [token for message in after if isinstance(message, Piece) for token in message.tokens]
    assert tokens == list(ticket.answer.tokens)
    if reason is not None:
        assert after[-1] == before[-1] and taken == Takeover([], [])
        is_answered = reason is not FinishReason.CANCELLED or ticket.answer.is_stopped
        assert (ask_again(new, BOB, stop=stops, max_tokens=99) is not None) is is_answered
        return
    [session] = taken.sessions
    assert (session.session, session.num_prompt, session.max_tokens) == (1, 2, 99)
    assert (session.stop_tokens, session.arrived_at) == (frozenset({EOS}), 1000.0)
    assert list(session.tokens) == [7, 8, *tokens]
    is_stopped = bool(stops) and "END" in text
    assert taken.acts == [RequestCancelled(session=SessionId(1), reason=FinishReason.STOP)] * is_stopped
    if not is_stopped:
        [piece] = heard_by(BOB, new.committed(TokensCommitted(session=SessionId(1), index=99, tokens=(33,)), 1001.0))
        assert isinstance(piece, Piece) and piece.index == len(tokens)


def test_sessions_of_another_model_are_not_gone_on_with(tmp_path: Path, text_codec: TextCodec) -> None:
    log = TokenLog.open(tmp_path / "tokens.db", MODEL)
    keep(log, (desk := a_desk(text_codec)).submit(open_one(desk), token_bytes([7]), 0.0))
    new, taken = restarted(log, text_codec, model=b"another")
    assert taken.sessions == []
    [ended] = taken.acts
    assert isinstance(ended, Ended) and log.write([ended], 500.0) == []
    [entry] = log.entries()
    assert isinstance(entry, Entry) and entry.outcome == ended.outcome
    log.close()
    last = heard_by(ANN, resume(new, ANN, 0, 0, 1000.0))[-1]
    assert isinstance(last, ErrorReport) and last.code == "session-lost" and "another model" in last.text


def test_nobody_coming_back_after_a_restart_ends_the_session(tmp_path: Path, text_codec: TextCodec) -> None:
    log = TokenLog.open(tmp_path / "tokens.db", MODEL)
    keep(log, (desk := a_desk(text_codec)).submit(open_one(desk), token_bytes([7]), 0.0))
    new, _ = restarted(log, text_codec)
    log.close()
    assert new.tick(1059.0, lambda session: "") == []
    assert new.tick(1060.0, lambda session: "") == [RequestCancelled(session=SessionId(1))]


def test_failures_name_the_request(desk: Desk) -> None:
    ticket = start(desk)
    error = PeerLost("pi was silent", node="pi")
    [act] = desk.ended(SessionFailed(session=ticket.session or SessionId(0), error=error), 0.0)
    assert act == Say(ANN, ErrorReport.of(error, request="r"))
    assert desk.ended(SessionFailed(session=SessionId(99), error=error), 0.0) == []


def test_close_refuses_all_that_is_open(desk: Desk) -> None:
    start(desk, ANN)
    open_one(desk, BOB, name="unread")
    acts = desk.close(Overloaded("the coordinator is stopping"))
    assert [act.session for act in acts if isinstance(act, Ended)] == [1]
    assert [(act.client, act.message.code) for act in acts if isinstance(act, Say)] == [  # type: ignore[attr-defined]
        (ANN, "overloaded"),
        (BOB, "overloaded"),
    ]
    assert desk.num_open == 0


def test_prompts_being_read_are_bounded(desk: Desk) -> None:
    for number in range(MAX_READING):
        open_one(desk, b"client-%d" % number, name=f"r{number}")
    with pytest.raises(Overloaded, match="prompts are being read"):
        open_one(desk)


def test_without_a_tokenizer_only_ids_are_taken() -> None:
    desk = a_desk(None)
    for bad in (order(), order(kind=PromptKind.CHAT), order(kind=PromptKind.IDS, stop=("END",))):
        with pytest.raises(TokenizerMissing):
            desk.open(ANN, bad, b"", 0.0)
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
    answer = AnswerText(text_codec, ["\ufffd"])
    answer.push("€".encode()[:2])
    assert (answer.text, answer.is_stopped) == ("", False)
    answer.finish()
    assert (answer.text, answer.is_stopped) == ("", True)


def test_an_answer_depends_on_its_tokens_alone(text_codec: TextCodec) -> None:
    raw, stops = b"one two END three", ("END", "nothing")
    whole, single = AnswerText(text_codec, stops), AnswerText(text_codec, stops)
    whole.push(raw)
    for byte in raw:
        single.push([byte])
    assert (whole.text, whole.tokens, whole.is_stopped) == (single.text, single.tokens, single.is_stopped)
    assert (whole.text, bytes(list(whole.tokens))) == ("one two ", b"one two END")

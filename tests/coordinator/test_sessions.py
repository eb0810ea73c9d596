"""Sessions: admission, batching, ends, memory, and what a lost plan does to them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from core_cases import GB, arrived, done, make_spec, of, sent, steps

from coordinator.cluster_status import KvStatus
from coordinator.events import (
    Effect,
    RequestCancelled,
    SendStep,
    SessionEnded,
    SessionFailed,
    TokensCommitted,
    token_ids,
)
from coordinator.memory import Candidate, KvRoom, StepBounds
from coordinator.planner import PlanRequest, make_plan
from coordinator.policy import ClusterPolicy
from coordinator.replays import Kept, Remains
from coordinator.session import open_session
from coordinator.sessions import Sessions
from coordinator.shares import parse_words
from protocol.errors import (
    FrameMalformed,
    InvariantBroken,
    ManyhandsError,
    Overloaded,
    PeerLost,
    PromptTooLong,
    RequestInvalid,
    StepFailed,
)
from protocol.ids import SessionId, WorkerId
from protocol.messages import FinishReason, Release, SampledToken, Step, StepDone, Usage
from protocol.plans import Plan
from protocol.specs import NO_LAYERS, Span

SPEC = make_spec(layers=4, max_positions=512, vocab=1000)


def make_test_plan(words: str = "1/1", epoch: int = 1) -> Plan:
    step = StepBounds(rows=16, sampled=4)
    request = PlanRequest(spec=SPEC, shares=parse_words(words), head_only=False, step=step)
    names = ("head", "b", "c", "d")[: request.num_workers]
    return make_plan(request, [Candidate(worker=WorkerId(name), budget_bytes=GB) for name in names], epoch=epoch)


def serve(sessions: Sessions, plan: Plan, room: KvRoom, held: Mapping[SessionId, int] | None = None) -> int:
    sessions.prepare(plan, room)
    return sessions.serve(plan, remains(held or {})).positions


def remains(held: Mapping[SessionId, int]) -> dict[SessionId, Remains]:
    """What is left where all layers have the same positions."""
    return {session: Remains([positions] * SPEC.layers) for session, positions in held.items()}


def serving(
    policy: ClusterPolicy | None = None, *, positions: int = 10_000, words: str = "1/1", epoch: int = 1
) -> Sessions:
    sessions = Sessions(SPEC, policy or ClusterPolicy(prefill_chunk=8))
    serve(sessions, make_test_plan(words, epoch), KvRoom(positions, WorkerId("b")))
    return sessions


def error_of(effects: list[Effect]) -> ManyhandsError:
    (failed,) = of(SessionFailed, effects)
    return failed.error


def begin(sessions: Sessions, *numbers: int, prompt: range = range(1, 4), max_tokens: int = 4) -> list[Effect]:
    effects: list[Effect] = []
    for number in numbers:
        effects += sessions.arrive(arrived(number, prompt, max_tokens=max_tokens), 0.0)
    return effects + sessions.schedule(0.0)


def finish(sessions: Sessions, step: Step, *tokens: int, now: float = 1.0) -> list[Effect]:
    return sessions.step_finished(done(step, *tokens), now) + sessions.schedule(now)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "kind", "message"),
    [
        ([], 1, RequestInvalid, "empty"),
        ([1, 2, 1000], 1, RequestInvalid, "token 1000 at position 2 .* vocabulary of 1000"),
        ([1, -1], 1, RequestInvalid, "token -1 at position 1"),
        ([1], 0, RequestInvalid, "max_tokens 0"),
        ([1] * 500, 13, PromptTooLong, "500 prompt tokens and max_tokens 13 exceed the context of 512"),
    ],
)
def test_bad_requests_are_refused(prompt: list[int], max_tokens: int, kind: type[ManyhandsError], message: str) -> None:
    sessions = serving()
    error = error_of(sessions.arrive(arrived(1, prompt, max_tokens=max_tokens), 0.0))
    assert type(error) is kind
    with pytest.raises(kind, match=message):
        raise error
    assert sessions.counts.waiting == 0
    assert sessions.totals.errors == 1


def test_a_prompt_that_is_no_int32_list_is_refused() -> None:
    event = arrived(1)
    odd = type(event)(session=event.session, prompt=b"abcde", max_tokens=1, sampling=event.sampling)
    assert isinstance(error_of(serving().arrive(odd, 0.0)), RequestInvalid)


def test_the_whole_context_is_allowed() -> None:
    assert steps(begin(serving(), 1, prompt=range(500), max_tokens=12))


def test_a_session_number_is_used_once() -> None:
    sessions = serving()
    begin(sessions, 1)
    with pytest.raises(InvariantBroken, match="session 1"):
        sessions.arrive(arrived(1), 0.0)


def test_the_queue_is_bounded() -> None:
    sessions = Sessions(SPEC, ClusterPolicy(max_waiting=2))
    assert begin(sessions, 1, 2) == []
    assert isinstance(error_of(begin(sessions, 3)), Overloaded)
    assert sessions.counts.waiting == 2


def test_what_can_never_fit_is_refused_with_numbers() -> None:
    error = error_of(begin(serving(positions=20), 1, prompt=range(18), max_tokens=3))
    assert isinstance(error, PromptTooLong)
    assert "need 21 positions, but memory is left for 20" in error.message
    assert error.node == "b"


def test_room_that_a_setting_bounds_names_the_setting() -> None:
    sessions = Sessions(SPEC, ClusterPolicy(prefill_chunk=8))
    serve(sessions, make_test_plan(), KvRoom(20, None))
    error = error_of(begin(sessions, 1, prompt=range(18), max_tokens=3))
    assert "there is room for 20" in error.message
    assert "--kv-positions" in error.remedy
    assert error.node == ""


def places(effects: list[Effect]) -> dict[int, int]:
    return {part.session: part.at for step in steps(effects) for part in step.rows}


def test_sessions_lie_one_behind_the_other() -> None:
    """Each takes 7 of 20 positions: two run, the third waits until a gap is large enough."""
    sessions = serving(positions=20, words="1")
    (first,) = steps(begin(sessions, 1, 2, 3))
    assert [part.at for part in first.rows] == [0]
    assert sessions.kv == KvStatus(positions=20, used=14)
    assert sessions.counts.waiting == 1
    (second,) = steps(finish(sessions, first, 5))
    assert {part.session: part.at for part in second.rows} == {1: 0, 2: 7}
    sessions.cancel(RequestCancelled(session=SessionId(1)), 1.0)
    assert sessions.schedule(1.0) == []  # a step still computes it
    assert sessions.kv.used == 14
    effects = finish(sessions, second, 5, 6)
    kinds = [type(getattr(effect, "message", effect)) for effect in effects]
    assert kinds.index(Release) < kinds.index(SendStep)
    assert places(effects) == {2: 7, 3: 0}


def test_a_place_that_the_workers_never_saw_is_free_at_once() -> None:
    sessions = serving(positions=20, words="1")
    begin(sessions, 1, 2, 3)
    sessions.cancel(RequestCancelled(session=SessionId(2)), 1.0)
    assert sessions.schedule(1.0) == []
    assert (sessions.kv.used, sessions.counts.waiting) == (14, 0)


def test_a_lost_plan_leaves_no_places() -> None:
    sessions = serving()
    begin(sessions, 1, 2)
    sessions.interrupt(PeerLost("b is gone"), 1.0)
    assert sessions.kv == KvStatus(positions=0, used=0)


def test_what_turns_out_never_to_fit_is_passed_over() -> None:
    sessions = Sessions(SPEC, ClusterPolicy())
    begin(sessions, 1, prompt=range(30))
    begin(sessions, 2)
    serve(sessions, make_test_plan(), KvRoom(20, WorkerId("b")))
    effects = sessions.schedule(1.0)
    assert isinstance(error_of(effects), PromptTooLong)
    assert [part.session for part in steps(effects)[0].rows] == [2]


# ---------------------------------------------------------------- one stream


def test_a_prompt_goes_in_chunks_and_then_tokens_one_by_one() -> None:
    sessions = serving(ClusterPolicy(prefill_chunk=8), words="1")
    effects = begin(sessions, 7, prompt=range(20), max_tokens=3)
    seen = []
    for token in (0, 0, 50, 51):
        (send,) = of(SendStep, effects)
        (part,) = send.step.rows
        assert token_ids(send.tokens).tolist() == ([*range(20), 50, 51])[part.start : part.start + part.count]
        assert (part.session, part.capacity) == (7, 23)
        seen.append((part.start, part.count, part.sample, bool(send.step.opens)))
        effects = finish(sessions, send.step, *([token] if part.sample else []))
    assert seen == [(0, 8, False, True), (8, 8, False, False), (16, 4, True, False), (20, 1, True, False)]
    (send,) = of(SendStep, effects)
    effects = finish(sessions, send.step, 52, now=5.0)
    assert of(TokensCommitted, effects) == [TokensCommitted(session=SessionId(7), index=2, tokens=(52,))]
    (ended,) = of(SessionEnded, effects)
    assert (ended.reason, ended.usage) == (FinishReason.LENGTH, Usage(prompt_tokens=20, completion_tokens=3))
    assert (ended.timings.queued_s, ended.timings.first_token_s, ended.timings.total_s) == (0.0, 1.0, 5.0)
    assert sent(Release, effects) == {"head": Release(sessions=(SessionId(7),))}
    assert sessions.is_idle


def test_an_end_of_text_token_ends_the_stream_and_is_not_part_of_it() -> None:
    sessions = serving()
    sessions.arrive(arrived(1, stop_tokens=[99, 98]), 0.0)
    (step,) = steps(sessions.schedule(0.0))
    (step,) = steps(finish(sessions, step, 5))
    effects = finish(sessions, step, 98)
    assert of(TokensCommitted, effects) == []
    (ended,) = of(SessionEnded, effects)
    assert (ended.reason, ended.usage.completion_tokens) == (FinishReason.STOP, 1)
    assert set(sent(Release, effects)) == {"head", "b"}


def test_token_totals_are_counted() -> None:
    sessions = serving()
    (step,) = steps(begin(sessions, 1, max_tokens=1))
    finish(sessions, step, 5)
    totals = sessions.totals
    assert (totals.requests, totals.prompt_tokens, totals.completion_tokens, totals.errors) == (1, 3, 1, 0)


# ---------------------------------------------------------------- batches


def test_all_decode_together_beside_one_chunk_of_one_prompt() -> None:
    sessions = serving(ClusterPolicy(prefill_chunk=4), words="1")
    (step,) = steps(begin(sessions, 1, 2, max_tokens=9))
    (step,) = steps(finish(sessions, step, 11))  # 1 decodes, 2 reads its prompt
    assert [(part.session, part.count) for part in step.rows] == [(1, 1), (2, 3)]
    begin(sessions, 3, 4, prompt=range(9), max_tokens=9)
    (step,) = steps(finish(sessions, step, 12, 21))
    assert [(part.session, part.count) for part in step.rows] == [(1, 1), (2, 1), (3, 4)]
    assert [new.session for new in step.opens] == [3]


def test_every_stage_gets_a_step_and_no_session_two() -> None:
    sessions = serving(words="1/1/1")
    sent_steps = steps(begin(sessions, *range(7)))
    while any(part.count > 1 for step in sent_steps for part in step.rows):
        step = sent_steps.pop(0)
        sent_steps += steps(finish(sessions, step, *[1] * len(step.rows)))
    assert len(sent_steps) == 3
    flying = [part.session for step in sent_steps for part in step.rows]
    assert sorted(flying) == list(range(7))
    assert max(len(step.rows) for step in sent_steps) <= 3


def test_step_numbers_rise_over_epochs() -> None:
    sessions = serving(words="1")
    (first,) = steps(begin(sessions, 1))
    sessions.interrupt(PeerLost("b is gone"), 1.0)
    serve(sessions, make_test_plan("1", epoch=2), KvRoom(100, WorkerId("b")))
    (second,) = steps(begin(sessions, 2))
    assert second.step > first.step
    assert (first.epoch, second.epoch) == (1, 2)


def test_at_most_max_sessions_run() -> None:
    sessions = serving(ClusterPolicy(max_sessions=2))
    begin(sessions, 1, 2, 3)
    assert (sessions.counts.running, sessions.counts.waiting) == (2, 1)
    assert sessions.phase_of(SessionId(3)) == "queued behind 0 others, 2 running"
    assert sessions.phase_of(SessionId(1)) == "reading the prompt: 0 of 3 tokens"
    assert sessions.phase_of(SessionId(9)) == ""


def test_memory_admits_in_order_and_is_given_back() -> None:
    sessions = serving(positions=20, words="1")  # 7 positions each
    (step,) = steps(begin(sessions, 1, 2, 3, max_tokens=4))
    assert (sessions.counts.running, sessions.counts.waiting) == (2, 1)
    while sessions.counts.waiting:
        effects = finish(sessions, step, *[5] * sum(part.sample for part in step.rows))
        (step,) = steps(effects)
    kinds = [type(getattr(effect, "message", effect)) for effect in effects]
    assert kinds.index(Release) < kinds.index(SendStep)


# ---------------------------------------------------------------- hostile or late answers


def test_late_and_repeated_answers_are_ignored() -> None:
    sessions = serving()
    (step,) = steps(begin(sessions, 1))
    other = StepDone(epoch=9, step=step.step, tokens=done(step, 5).tokens, step_s=0.0)
    assert sessions.step_finished(other, 1.0) == []
    assert of(TokensCommitted, finish(sessions, step, 5))
    assert sessions.step_finished(done(step, 6), 1.0) == []


@pytest.mark.parametrize(
    "tokens",
    [
        (),
        ((2, 5),),
        ((1, 5), (2, 5)),
        ((1, 5), (1, 5)),
        ((1, 1000),),
    ],
)
def test_wrong_tokens_are_refused_before_anything_changes(tokens: tuple[tuple[int, int], ...]) -> None:
    sessions = serving()
    (step,) = steps(begin(sessions, 1))
    sampled = tuple(SampledToken(session=SessionId(one), token=token, logprob=0.0) for one, token in tokens)
    with pytest.raises(FrameMalformed, match=f"step {step.step}"):
        sessions.step_finished(StepDone(epoch=1, step=step.step, tokens=sampled, step_s=0.0), 1.0)
    assert of(TokensCommitted, finish(sessions, step, 5))


# ---------------------------------------------------------------- cancel


def test_cancelling_a_waiting_request() -> None:
    sessions = Sessions(SPEC, ClusterPolicy())
    begin(sessions, 1)
    (ended,) = sessions.cancel(RequestCancelled(session=SessionId(1)), 2.0)
    assert isinstance(ended, SessionEnded)
    assert (ended.reason, ended.timings.queued_s) == (FinishReason.CANCELLED, 2.0)
    assert sessions.counts.waiting == 0
    assert sessions.cancel(RequestCancelled(session=SessionId(1)), 2.0) == []


def test_cancelling_while_a_step_computes_it_releases_after_the_step() -> None:
    sessions = serving(positions=7, words="1")
    (step,) = steps(begin(sessions, 1, 2))
    effects = sessions.cancel(RequestCancelled(session=SessionId(1), reason=FinishReason.STOP), 1.0)
    assert [ended.reason for ended in of(SessionEnded, effects)] == [FinishReason.STOP]
    assert sessions.schedule(1.0) == []  # its memory is still held: session 2 has to wait
    assert not sessions.is_idle
    effects = finish(sessions, step, 5)
    assert of(TokensCommitted, effects) == []
    assert sent(Release, effects) == {"head": Release(sessions=(SessionId(1),))}
    assert [part.session for part in steps(effects)[0].rows] == [2]


def test_cancelling_between_steps_releases_at_once() -> None:
    sessions = serving(words="1")
    (step,) = steps(begin(sessions, 1, 2, max_tokens=9))
    (step,) = steps(finish(sessions, step, 5))
    begin(sessions, 3)  # started, but no step has room for its prompt
    assert of(SessionEnded, sessions.cancel(RequestCancelled(session=SessionId(3)), 1.0))
    assert sent(Release, sessions.schedule(1.0)) == {}  # the workers never saw it


# ---------------------------------------------------------------- plans that end


def test_a_lost_plan_puts_what_ran_in_front_of_what_waits() -> None:
    sessions = serving(ClusterPolicy(max_sessions=2))
    begin(sessions, 1, 2, 3)
    assert sessions.interrupt(PeerLost("b is gone", node="b"), 1.0) == []
    assert (sessions.counts.running, sessions.counts.waiting) == (0, 3)
    assert sessions.schedule(1.0) == []
    serve(sessions, make_test_plan(epoch=2), KvRoom(100, WorkerId("b")))
    (first, second) = steps(sessions.schedule(2.0))
    assert [new.session for step in (first, second) for new in step.opens] == [1, 2]


def decoding(num_tokens: int, *, epoch: int = 1) -> Sessions:
    """Session 1 with a prompt of 3 tokens and so many tokens of its answer, which are 50, 51 and so on."""
    sessions = serving(words="1", epoch=epoch)
    (step,) = steps(begin(sessions, 1, max_tokens=20))
    for token in range(50, 50 + num_tokens):
        sessions.step_finished(done(step, token), 1.0)
        (step,) = steps(sessions.schedule(1.0))
    return sessions


@pytest.mark.parametrize(
    ("held", "start", "count"), [({}, 0, 3), ({1: 2}, 2, 1), ({1: 5}, 5, 3), ({1: 7}, 7, 1), ({1: 99}, 7, 1)]
)
def test_a_session_goes_on_where_the_workers_end(held: dict[SessionId, int], start: int, count: int) -> None:
    """Its log has 8 tokens, of which 7 were computed; the head is told all that lies before the first row."""
    sessions = decoding(5)
    sessions.interrupt(PeerLost("b is gone"), 2.0)
    plan = make_test_plan("1", 2)
    (carry,) = sessions.prepare(plan, KvRoom(100, WorkerId("b")))
    assert (carry.session, carry.at, carry.capacity, carry.computed) == (1, 0, 23, 7)
    assert sessions.serve(plan, remains(held)).positions == 7 - start
    (sent,) = of(SendStep, sessions.schedule(2.0))
    (rows,) = sent.step.rows
    assert (rows.start, rows.count, rows.sample) == (start, count, start + count == 8)
    assert [(new.session, new.history) for new in sent.step.opens] == [(1, start)]
    assert token_ids(sent.tokens).tolist() == [1, 2, 3, 50, 51, 52, 53, 54][: start + count]


@pytest.mark.parametrize(
    ("chunk", "num_answer", "cuts"),
    [
        (16, 5, [(0, 3, False), (3, 5, True)]),
        (2, 5, [(0, 2, False), (2, 1, False), (3, 2, True), (5, 2, True), (7, 1, False)]),
        (16, 1, [(0, 3, False), (3, 1, False)]),
        (16, 0, [(0, 3, False)]),
    ],
)
def test_what_is_computed_again_is_cut_as_it_was_the_first_time(
    chunk: int, num_answer: int, cuts: list[tuple[int, int, bool]]
) -> None:
    """The prompt in its chunks; rows of the answer attend alone. Only the last row of all is sampled."""
    session = open_session(arrived(1, (1, 2, 3), max_tokens=20), SPEC, 1.0)
    session.tokens.extend(range(50, 50 + num_answer))
    found = []
    while session.num_pending:
        rows = session.next_rows(chunk)
        found.append((rows.start, rows.count, rows.alone))
        assert rows.sample == (rows.start + rows.count == 3 + num_answer)
        session.advance_to(rows.start + rows.count)
    assert found == cuts


def test_what_workers_once_had_may_still_be_there_after_a_plan_that_had_nothing() -> None:
    sessions = decoding(5)
    for epoch in (2, 3):
        sessions.interrupt(PeerLost("b is gone"), 2.0)
        plan = make_test_plan("1", epoch)
        (carry,) = sessions.prepare(plan, KvRoom(100, WorkerId("b")))
        assert carry.computed == 7
        repeated = sessions.serve(plan, remains({SessionId(1): 7} if epoch == 3 else {}))
        assert repeated.positions == (7 if epoch == 2 else 0)


def test_what_was_said_is_not_said_again() -> None:
    sessions = decoding(5)
    sessions.interrupt(PeerLost("b is gone"), 2.0)
    serve(sessions, make_test_plan("1", 2), KvRoom(100, WorkerId("b")))
    (prompt,) = steps(sessions.schedule(2.0))
    (answer,) = steps(finish(sessions, prompt, now=2.0))
    (committed,) = of(TokensCommitted, sessions.step_finished(done(answer, 55), 3.0))
    assert (committed.index, committed.tokens) == (5, (55,))


def test_an_answer_tells_who_computed_it_and_why_that_changed() -> None:
    sessions = decoding(5)
    sessions.interrupt(PeerLost("b is gone"), 2.0)
    serve(sessions, make_test_plan("1", 2), KvRoom(100, WorkerId("b")), {SessionId(1): 4})
    ended = sessions.cancel(RequestCancelled(session=SessionId(1)), 3.0)[0]
    assert isinstance(ended, SessionEnded)
    legs = [(leg.epoch, leg.start, leg.repeated, leg.cause) for leg in ended.legs]
    assert legs == [(1, 0, 0, ""), (2, 5, 3, "b is gone")]
    assert ended.legs[0].stages[0].startswith("layers 0 to ")


def test_who_finds_no_place_any_more_waits_and_begins_anew() -> None:
    sessions = decoding(5)
    sessions.interrupt(PeerLost("b is gone"), 2.0)
    plan = make_test_plan("1", 2)
    assert sessions.prepare(plan, KvRoom(20, WorkerId("b"))) == ()
    assert (sessions.counts.running, sessions.counts.waiting) == (0, 1)


@pytest.mark.parametrize(("error", "times"), [(PeerLost("b is gone"), 12), (StepFailed("it broke"), 4)])
def test_a_session_that_ends_epochs_time_and_again_fails(error: ManyhandsError, times: int) -> None:
    sessions = decoding(1)
    for epoch in range(2, times + 1):
        assert sessions.interrupt(error, 2.0) == []
        serve(sessions, make_test_plan("1", epoch), KvRoom(100, WorkerId("b")))
        assert steps(sessions.schedule(2.0))
    assert error_of(sessions.interrupt(error, 2.0)) is error


def test_progress_forgives_setbacks() -> None:
    sessions = decoding(1)
    for epoch in range(2, 10):
        assert sessions.interrupt(StepFailed("it broke"), 2.0) == []
        serve(sessions, make_test_plan("1", epoch), KvRoom(100, WorkerId("b")), {SessionId(1): 99})
        (step,) = steps(sessions.schedule(2.0))
        assert of(TokensCommitted, sessions.step_finished(done(step, 60), 2.0))
        assert steps(sessions.schedule(2.0))


def test_while_held_no_step_begins() -> None:
    sessions = decoding(1)
    sessions.is_held = True
    begin(sessions, 2)
    assert sessions.schedule(3.0) == []
    assert not sessions.is_between_steps


def test_a_step_that_ends_after_its_plan_is_ignored() -> None:
    sessions = serving()
    (step,) = steps(begin(sessions, 1))
    sessions.interrupt(PeerLost("b is gone"), 1.0)
    assert sessions.step_finished(done(step, 5), 1.0) == []
    assert sessions.steps.oldest_at is None


def test_waiting_for_a_plan_has_a_deadline_that_says_what_is_missing() -> None:
    sessions = Sessions(SPEC, ClusterPolicy(form_timeout_s=60.0))
    begin(sessions, 1)
    assert sessions.expire(59.9, "waiting for b") == []
    error = error_of(sessions.expire(60.0, "waiting for b"))
    assert isinstance(error, Overloaded)
    assert "60 s: waiting for b" in error.message


def test_the_deadline_counts_from_the_loss_of_the_plan() -> None:
    sessions = serving(ClusterPolicy(max_sessions=1))
    begin(sessions, 1, 2)
    sessions.interrupt(PeerLost("b is gone"), 100.0)
    assert sessions.expire(159.0, "") == []
    assert len(sessions.expire(160.0, "")) == 2


def test_stopping_fails_everything_and_everybody_after() -> None:
    sessions = serving(ClusterPolicy(max_sessions=1))
    begin(sessions, 1, 2)
    failed = of(SessionFailed, sessions.stop("stopping"))
    assert [one.session for one in failed] == [1, 2]
    assert isinstance(error_of(begin(sessions, 3)), Overloaded)


# ---------------------------------------------------------------- a part of the layers


def lacking_the_middle(sessions: Sessions, *numbers: int, kept_until: int = 99) -> Plan:
    """Serve a plan under which the layers 1 and 2 lack all that these sessions had, and 0 has the inputs of layer 1."""
    sessions.interrupt(PeerLost("b is gone"), 2.0)
    plan = make_test_plan("1", 2)
    sessions.prepare(plan, KvRoom(200, WorkerId("b")))
    left = Remains([99, 0, 0, 99], {1: Kept(kept_until, 0)})
    sessions.serve(plan, {SessionId(number): left for number in numbers})
    return plan


def test_what_some_layers_lack_is_computed_through_these_alone_and_then_the_session_goes_on() -> None:
    sessions = decoding(10)  # 13 tokens, 3 of them the prompt, 12 positions, chunks of 8
    lacking_the_middle(sessions, 1)
    seen = []
    for token in (None, None, None, 60):
        (sent,) = of(SendStep, sessions.schedule(2.0))
        (rows,) = sent.step.rows
        seen.append((sent.step.layers, rows.start, rows.count, rows.alone, rows.sample))
        answer = () if token is None else (token,)
        committed = of(TokensCommitted, sessions.step_finished(done(sent.step, *answer), 3.0))
        assert [one.tokens for one in committed] == [answer] * (token is not None)
    some = Span(1, 3)
    assert seen == [
        (some, 0, 3, False, False),
        (some, 3, 8, True, False),
        (some, 11, 1, False, False),
        (NO_LAYERS, 12, 1, False, True),
    ]


def test_what_inputs_do_not_reach_is_computed_through_all_layers() -> None:
    sessions = decoding(10)
    lacking_the_middle(sessions, 1, kept_until=5)
    for start, count in ((0, 3), (3, 2)):
        (step,) = steps(sessions.schedule(2.0))
        assert (step.layers, step.rows[0].start, step.rows[0].count) == (Span(1, 3), start, count)
        assert sessions.step_finished(done(step), 3.0) == []
    (step,) = steps(sessions.schedule(2.0))
    assert (step.layers, step.rows[0].start, step.rows[0].count) == (NO_LAYERS, 5, 8)


def test_sessions_that_lack_the_same_share_a_step_and_others_take_turns_with_them() -> None:
    sessions = serving(words="1")
    (step,) = steps(begin(sessions, 1, 2, 3, max_tokens=20))
    for _ in range(4):
        tokens = [50] * sum(part.sample for part in step.rows)
        sessions.step_finished(done(step, *tokens), 1.0)
        (step,) = steps(sessions.schedule(1.0))
    lacking_the_middle(sessions, 1, 2)
    seen = []
    for _ in range(4):
        (step,) = steps(sessions.schedule(2.0))
        seen.append((step.layers, {part.session: part.count for part in step.rows}))
        sessions.step_finished(done(step, *[51] * sum(part.sample for part in step.rows)), 2.0)
    some = Span(1, 3)
    assert seen == [
        (some, {1: 3, 2: 3}),  # their prompts
        (NO_LAYERS, {3: 3}),
        (some, {1: 3, 2: 2}),
        (NO_LAYERS, {1: 1, 2: 1, 3: 2}),
    ]


def test_a_plan_that_ends_meanwhile_leaves_nothing_of_it() -> None:
    sessions = decoding(10)
    lacking_the_middle(sessions, 1)
    steps(sessions.schedule(2.0))
    sessions.interrupt(PeerLost("c is gone"), 3.0)
    serve(sessions, make_test_plan("1", 3), KvRoom(100, WorkerId("b")), {SessionId(1): 12})
    (step,) = steps(sessions.schedule(4.0))
    assert (step.layers, step.rows[0].start, step.rows[0].sample) == (NO_LAYERS, 12, True)


def test_sessions_whose_inputs_lie_with_two_hubs_share_no_step() -> None:
    sessions = serving(words="1")
    (step,) = steps(begin(sessions, 1, 2, max_tokens=20))
    for _ in range(2):
        sessions.step_finished(done(step, *[50] * sum(part.sample for part in step.rows)), 1.0)
        (step,) = steps(sessions.schedule(1.0))
    sessions.interrupt(PeerLost("b is gone"), 2.0)
    plan = make_test_plan("1/1", 2)
    sessions.prepare(plan, KvRoom(200, WorkerId("b")))
    left = {SessionId(number): Remains([99, 99, 0, 99], {2: Kept(99, number - 1)}) for number in (1, 2)}
    sessions.serve(plan, left)
    assert [len(step.rows) for step in steps(sessions.schedule(2.0)) if len(step.layers)] == [1, 1]

"""The star's bookkeeping and its arithmetic, with a post that the test fills."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_cluster import SPEC, plan_of

import worker.star as star_module
from protocol import flat
from protocol.errors import DeadlineExceeded, FrameMalformed, ManyhandsError, ProtocolViolation, StepFailed
from protocol.frames import Buffer
from protocol.ids import WorkerId
from protocol.messages import Activation, Partial, Sum
from protocol.specs import ActivationFormat, Span
from runtime.reduce import Room, add_parts, to_wire
from worker.due import Due
from worker.lanes import Unfinished
from worker.seat import Seat
from worker.star import MAX_ROOMS, Star
from worker.wire import Arrival, open_data, pack_data, unpack_data

A, B, C = (WorkerId(name) for name in "abc")
FP32, BF16 = ActivationFormat.FLOAT32, ActivationFormat.BFLOAT16
MEMBERS = [("a", Span(0, 1), Span(0, 1)), ("b", Span(1, 2), Span(1, 2)), ("c", Span(2, 2), Span(2, 3))]
PLAN = plan_of([(Span(0, SPEC.layers), MEMBERS, 0)], head="a")
ATTENTION, FFN = 2, 3


class FakeLane:
    """The short way of a `FakePost`: takes what is due, leaves what is not, and sends to the first target only."""

    def __init__(self, post: FakePost, seat: Seat, room: Room) -> None:
        self._post = post
        self._seat = seat
        self._room = room

    def sum(self, step: int, op: int) -> Unfinished | None:
        post, seat, room = self._post, self._seat, self._room
        due = seat.due(step, op, len(room.part))
        if seat.has_part[op & 1]:
            if seat.adds:
                due.parts[seat.own] = room.part
            if not seat.hands_out:
                header = seat.partial_header(step, op, seat.ranks[seat.own], seat.form)
                post.send(seat.targets, header, bytes(room.part))
        unread: Any = post.take(due)
        if due.owing:
            return Unfinished(due, unread, seat.targets if seat.hands_out else ())
        if not seat.adds:
            room.total[:] = due.parts[seat.hub]
            return None
        room.total[:] = add_parts(list(due.parts.values()), FP32, (len(room.part_TD), SPEC.hidden))
        if not seat.hands_out:
            return None
        post.send(seat.targets[:1], seat.sum_header(step, op, seat.form), room.total)
        return Unfinished(due, None, seat.targets[1:]) if seat.targets[1:] else None


class FakeDoors:
    """Doors through which the ways are those of a `FakeLane`."""

    def __init__(self, post: FakePost) -> None:
        self.between = lambda sources, targets: post


@pytest.fixture(autouse=True, params=[False, True], ids=["long way", "short way"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakePost, "has_doors", request.param)
    monkeypatch.setattr(star_module, "HubLane", FakeLane)
    monkeypatch.setattr(star_module, "MemberLane", FakeLane)
    monkeypatch.setattr(star_module, "PairLane", FakeLane)


class FakePost:
    """Hands in frames one by one, whether they are due or not; remembers what was sent."""

    has_doors = False

    def __init__(self, frames: list[Arrival]) -> None:
        self.frames = frames
        self.sent: list[tuple[WorkerId, Any, bytes]] = []
        self._doors: Any = FakeDoors(self)

    def send(self, targets: Sequence[WorkerId], message: object, payload: Buffer) -> None:
        assert isinstance(message, bytes)
        self.sent += [(target, flat.unpack(message), bytes(payload)) for target in targets]

    def doors(self) -> Any:
        return self._doors if self.has_doors else None

    def collect(self, due: Due, timeout_s: float, unread: Any = None) -> Arrival | None:
        return unread or self.take(due)

    def take(self, due: Due) -> Arrival | None:
        """Take what is due from others; returns the first that is not."""
        while due.owing and self.frames:
            arrival = self.frames.pop(0)
            if not due.take(arrival):
                return arrival
        return None


def tensor(value: float, rows: int = 2) -> torch.Tensor:
    return torch.full((rows, SPEC.hidden), value)


def part(
    sender: WorkerId, rank: int, value: float, *, op: int = ATTENTION, step: int = 5, rows: int = 2, wire: Any = FP32
) -> Arrival:
    message = Partial(epoch=1, step=step, op=op, rank=rank, format=wire)
    return Arrival(sender, flat.FORMS[Partial].pack(message), to_wire(tensor(value, rows), wire))


def total(sender: WorkerId, value: float, *, op: int = ATTENTION, step: int = 5) -> Arrival:
    message = Sum(epoch=1, step=step, op=op, format=FP32)
    return Arrival(sender, flat.FORMS[Sum].pack(message), to_wire(tensor(value), FP32))


def star(own: WorkerId, frames: list[Arrival]) -> tuple[Star, FakePost]:
    post = FakePost(frames)
    return Star(PLAN, own, post, torch.device("cpu"), timeout_s=1.0), post


@given(st.permutations([0, 1, 2]), st.integers(0, 2))
def test_parts_are_added_in_rank_order_whatever_order_they_come_in(order: list[int], hub: int) -> None:
    plan = plan_of([(Span(0, SPEC.layers), MEMBERS, hub)], head="a")
    values = [2.0**24, 1.0, -(2.0**24)]  # 0 in the order of ranks, 1 when the big ones meet first
    frames = [part((A, B, C)[rank], rank, values[rank], op=FFN) for rank in order if rank != hub]
    end = Star(plan, (A, B, C)[hub], FakePost(frames), torch.device("cpu"))
    assert torch.equal(end.reduce(5, 2, FFN, tensor(values[hub])), tensor(0.0))


def test_the_hub_adds_in_rank_order_and_sends_all_the_same_bytes() -> None:
    big, small = 2.0**24, 1.0
    hub, post = star(A, [part(C, 2, small, op=FFN), part(B, 1, -big, op=FFN)])
    found = hub.reduce(5, 2, FFN, tensor(big))
    assert torch.equal(found, tensor(small))  # big + small - big would lose it
    message, payload = Sum(epoch=1, step=5, op=FFN, format=FP32), bytes(to_wire(found, FP32))
    assert post.sent == [(B, message, payload), (C, message, payload)]


def test_a_member_without_a_part_only_receives() -> None:
    member, post = star(C, [total(A, 3.0)])
    assert torch.equal(member.reduce(5, 2, ATTENTION, None), tensor(3.0))
    assert post.sent == []
    hub, _ = star(A, [part(B, 1, 2.0)])  # and the hub does not wait for it
    assert torch.equal(hub.reduce(5, 2, ATTENTION, tensor(1.0)), tensor(3.0))


def test_a_member_sends_its_part_to_the_hub() -> None:
    member, post = star(B, [total(A, 3.0)])
    member.reduce(5, 2, ATTENTION, tensor(2.0))
    assert post.sent == [
        (A, Partial(epoch=1, step=5, op=ATTENTION, rank=1, format=FP32), bytes(to_wire(tensor(2.0), FP32)))
    ]


WRONG = {
    "another's rank": (A, part(C, 1, 1.0), C),
    "a rank beyond the members": (A, part(C, 7, 1.0), C),
    "a rank without a part": (A, part(C, 2, 1.0), C),
    "another op": (A, part(B, 1, 1.0, op=6), B),
    "another step": (A, part(B, 1, 1.0, step=4), B),
    "a sender from elsewhere": (A, part(WorkerId("z"), 1, 1.0), "z"),
    "a number out of bounds": (A, Arrival(B, flat.FORMS[Partial].header(1, 5, 2**40, 1, 0), memoryview(b"")), B),
    "too few rows": (A, part(B, 1, 1.0, rows=1), B),
    "another format": (A, part(B, 1, 1.0, wire=BF16), B),
    "a sum to the hub": (A, total(B, 1.0), B),
    "a sum of a member": (B, total(C, 1.0), C),
    "a sum of another op": (B, total(A, 1.0, op=3), A),
    "a sum of another step": (B, total(A, 1.0, step=6), A),
    "a part to a member": (B, part(A, 0, 1.0), A),
}


@pytest.mark.parametrize("words", WRONG)
def test_a_frame_that_does_not_fit_names_its_sender(words: str) -> None:
    own, frame, blamed = WRONG[words]
    end, _ = star(own, [frame])
    with pytest.raises(ProtocolViolation) as caught:
        end.reduce(5, 2, ATTENTION, tensor(1.0))
    assert caught.value.node == blamed


def test_sums_of_the_same_size_follow_each_other_in_the_same_memory() -> None:
    for own, frames in ((A, [part(B, 1, 1.0), part(B, 1, 2.0, step=6)]), (B, [total(A, 2.0), total(A, 3.0, step=6)])):
        end, _ = star(own, frames)
        first = end.reduce(5, 2, ATTENTION, tensor(1.0))
        assert torch.equal(first, tensor(2.0))
        assert torch.equal(end.reduce(6, 2, ATTENTION, tensor(1.0)), tensor(3.0))
        assert torch.equal(first, tensor(3.0))


PAIR = plan_of([(Span(0, SPEC.layers), [("a", Span(0, 2), Span(0, 1)), ("b", Span(2, 2), Span(1, 3))], 1)], head="a")


@pytest.mark.parametrize("own", [A, B])
def test_two_send_each_other_their_parts_and_both_add_them(own: WorkerId) -> None:
    other, rank = (B, 0) if own == A else (A, 1)
    post = FakePost([part(other, 1 - rank, 2.0, op=FFN)])
    end = Star(PAIR, own, post, torch.device("cpu"))
    assert torch.equal(end.reduce(5, 2, FFN, tensor(1.0)), tensor(3.0))
    message = Partial(epoch=1, step=5, op=FFN, rank=rank, format=FP32)
    assert post.sent == [(other, message, bytes(to_wire(tensor(1.0), FP32)))]


def test_of_two_one_may_have_no_part() -> None:
    ends = [(A, tensor(4.0), []), (B, None, [part(A, 0, 4.0)])]
    for own, own_TD, frames in ends:
        post = FakePost(frames)
        assert torch.equal(Star(PAIR, own, post, torch.device("cpu")).reduce(5, 2, ATTENTION, own_TD), tensor(4.0))
        assert len(post.sent) == (own_TD is not None)


def test_what_does_not_fit_of_two_names_its_sender() -> None:
    for frame in (total(A, 1.0), part(A, 0, 1.0, op=FFN), part(A, 1, 1.0), part(A, 0, 1.0, rows=1)):
        with pytest.raises(ProtocolViolation) as caught:
            Star(PAIR, B, FakePost([frame]), torch.device("cpu")).reduce(5, 2, ATTENTION, None)
        assert caught.value.node == A


def test_a_part_that_comes_twice_is_refused() -> None:
    hub, _ = star(A, [part(B, 1, 1.0, op=FFN), part(B, 1, 1.0, op=FFN)])
    with pytest.raises(ProtocolViolation, match="b has no part in op 3, or sent it twice"):
        hub.reduce(5, 2, FFN, tensor(1.0))


def test_a_part_may_lie_where_it_is_sent_from() -> None:
    for own, frames in ((A, [part(B, 1, 1.0)]), (B, [total(A, 3.0)])):
        end, post = star(own, frames)
        own_TD = end.part(2)
        assert own_TD is not None
        own_TD.fill_(2.0)
        assert torch.equal(end.reduce(5, 2, ATTENTION, own_TD), tensor(3.0))
        assert post.sent[0][2] == bytes(to_wire(tensor(3.0 if own == A else 2.0), FP32))
    assert end.part(32 * 1024 // (4 * SPEC.hidden) + 1) is None  # too long to be copied


def test_sums_of_many_sizes_are_kept_in_little_memory() -> None:
    end, post = star(B, [])
    for rows in [*range(1, 2 * MAX_ROOMS), 1]:
        post.frames.append(
            Arrival(A, total(A, 0.0)[1], to_wire(tensor(float(rows), rows), FP32)),
        )
        assert torch.equal(end.reduce(5, rows, ATTENTION, tensor(1.0, rows)), tensor(float(rows), rows))
    assert len(end._rooms) == MAX_ROOMS
    assert len(end._lanes) <= MAX_ROOMS


@pytest.mark.parametrize(("own", "op", "words"), [(A, ATTENTION, "a has no part"), (C, ATTENTION, "c has a part")])
def test_a_part_unlike_in_the_plan_is_refused(own: WorkerId, op: int, words: str) -> None:
    end, post = star(own, [])
    with pytest.raises(StepFailed, match=words):
        end.reduce(5, 2, op, None if own == A else tensor(1.0))
    assert post.sent == []


def test_an_own_part_of_another_shape_is_refused() -> None:
    for own in (A, B):
        end, post = star(own, [part(B, 1, 1.0)])
        with pytest.raises(StepFailed, match=r"has shape \[3, "):
            end.reduce(5, 2, ATTENTION, tensor(1.0, rows=3))
        assert post.sent == []


@pytest.mark.parametrize(("own", "awaited"), [(A, B), (B, A)])
def test_a_wait_in_vain_names_whom_it_waited_for(own: WorkerId, awaited: WorkerId) -> None:
    end, _ = star(own, [])
    with pytest.raises(DeadlineExceeded, match=f"{awaited} sent nothing for op 2 of step 5") as caught:
        end.reduce(5, 2, ATTENTION, tensor(1.0))
    assert caught.value.node == awaited


@pytest.mark.parametrize("num_bytes", [0, 4, 32 * 1024, 32 * 1024 + 1])
def test_a_data_message_survives_its_packing(num_bytes: int) -> None:
    message, payload = Partial(epoch=1, step=2, op=3, rank=4, format=FP32), bytes(num_bytes)
    frames = pack_data(message, payload)
    assert len(frames) == (1 if num_bytes <= 32 * 1024 else 2)
    assert unpack_data(frames) == (message, memoryview(payload))
    assert pack_data(flat.FORMS[Partial].pack(message), payload) == frames


def test_a_sum_in_more_frames_than_its_form_has_is_refused() -> None:
    header = flat.FORMS[Sum].pack(Sum(epoch=1, step=2, op=3, format=FP32))
    for frames in ([header, b"x", b"y"], [header + b"x", b"y"], [header[:20]], [header[:20], b"x"]):
        with pytest.raises(FrameMalformed, match="Sum"):
            open_data(frames)


@given(st.binary(max_size=60), st.booleans())
def test_hostile_frames_are_refused_by_a_typed_error(data: bytes, marked: bool) -> None:
    frame = b"\xc1" + data if marked else data
    try:
        received = unpack_data([frame])
    except ManyhandsError as error:
        assert isinstance(error, ProtocolViolation)
    else:
        assert not isinstance(received.message, Activation)

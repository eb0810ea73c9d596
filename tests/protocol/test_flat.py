"""The flat form of sums' headers: its bytes for good, every bound, and whatever a hostile peer may put there."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import FrameMalformed, InvariantBroken
from protocol.flat import FORMS, MARK, FlatForm
from protocol.messages import LinkHello, Partial, Sum
from protocol.specs import ActivationFormat

FP32, BF16 = ActivationFormat.FLOAT32, ActivationFormat.BFLOAT16
BIGGEST, COUNT = 2**53, 2**31 - 1


@pytest.mark.parametrize(
    ("message", "golden"),
    [
        (Partial(epoch=1, step=2, op=3, rank=4, format=FP32), (33, 1, 2, 3, 4, 0)),
        (Partial(epoch=BIGGEST, step=BIGGEST, op=COUNT, rank=0, format=BF16), (33, BIGGEST, BIGGEST, COUNT, 0, 1)),
        (Sum(epoch=1, step=2, op=3, format=BF16), (34, 1, 2, 3, 1)),
    ],
)
def test_golden_bytes_both_ways(message: Any, golden: tuple[int, ...]) -> None:
    code, *fields = golden
    header = bytes((MARK, code, 0, 0, 0, 0, 0, 0)) + b"".join(field.to_bytes(8, "little") for field in fields)
    form = FORMS[type(message)]
    assert form.pack(message) == header
    assert len(header) == form.num_bytes
    assert len(header) % 8 == 0  # the payload after it is aligned
    assert form.unpack(memoryview(header + b"payload")) == message


@pytest.mark.parametrize(
    ("at", "value", "name"),
    [(0, BIGGEST + 1, "epoch"), (1, 2**64 - 1, "step"), (2, COUNT + 1, "op"), (3, COUNT + 1, "rank"), (4, 2, "format")],
)
def test_a_number_beyond_its_bound_is_refused_by_name(at: int, value: int, name: str) -> None:
    fields = [1, 1, 1, 1, 1]
    fields[at] = value
    with pytest.raises(FrameMalformed, match=f"Partial.{name}: value {value} is outside"):
        FORMS[Partial].unpack(memoryview(struct.pack("<BB6x5Q", MARK, 33, *fields)))


@given(st.binary(min_size=48, max_size=48))
def test_hostile_bytes_are_a_valid_message_or_refused(data: bytes) -> None:
    try:
        message = FORMS[Partial].unpack(memoryview(data))
    except FrameMalformed:
        return
    assert 0 <= message.epoch <= BIGGEST
    assert 0 <= message.rank <= COUNT
    assert message.format in ActivationFormat


def test_what_has_no_place_is_our_own_mistake() -> None:
    with pytest.raises(InvariantBroken, match="Sum can't be packed"):
        FORMS[Sum].pack(Sum(epoch=-1, step=0, op=0, format=FP32))
    with pytest.raises(TypeError, match=r"LinkHello\.worker has no place"):
        FlatForm(LinkHello)

"""Parts of a sum as they come from the wire: the bits of `sum_partials`, whatever the frames look like."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from protocol.errors import StepFailed
from protocol.specs import ActivationFormat
from runtime.reduce import ALIGNMENT, Adder, Room, add_parts, sum_partials, to_wire
from runtime.tensors import dtype_of

FORMATS = tuple(ActivationFormat)
SHAPE = (3, 17)
EXTREMES = (math.inf, -math.inf, math.nan, 3.0e38, -3.0e38, 1.0e-45, -0.0)  # of infinities, overflows, tiny ones


def random_parts(seed: int, count: int, wire: ActivationFormat) -> list[Tensor]:
    """Values of very different sizes, some of them at the ends of what fp32 holds."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(SHAPE, generator=generator) * 10.0 ** (3 * number - 6) for number in range(count)]
    for number, tensor in enumerate(tensors):
        if seed % 3 == 0:
            tensor[0, : len(EXTREMES)] = torch.tensor(EXTREMES).roll(number)
    return [tensor.to(dtype_of(wire)) for tensor in tensors]


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(0, 5), st.sampled_from(FORMATS), st.integers(0, 7))
def test_the_bits_are_those_of_torch(seed: int, count: int, own: int, wire: ActivationFormat, offset: int) -> None:
    tensors = random_parts(seed, count, wire)
    parts: list[memoryview] = []
    for number, tensor in enumerate(tensors):
        data = bytearray(offset) + bytearray(to_wire(tensor, wire))  # at any offset: frames are aligned to nothing
        frame = memoryview(data if seed % 2 else bytes(data))[offset:]
        parts.append(to_wire(tensor, wire) if number == own else frame)
    before = [bytes(to_wire(tensor, wire)) for tensor in tensors]
    wanted = bytes(to_wire(sum_partials(tensors, wire), wire))
    assert bytes(add_parts(parts, wire, SHAPE)) == wanted
    assert [bytes(to_wire(tensor, wire)) for tensor in tensors] == before


@given(st.integers(0, 2**32), st.integers(1, 6), st.sampled_from(FORMATS))
def test_parts_laid_in_rows_make_the_same_bits_again_and_again(seed: int, count: int, wire: ActivationFormat) -> None:
    room = Room(*SHAPE, wire, before_part=48, before_total=40)
    adder = Adder(room, count)
    for again in range(3):
        tensors = random_parts(seed + again, count, wire)
        for row, tensor in zip(adder.rows, tensors, strict=True):
            row[:] = to_wire(tensor, wire)
        with np.errstate(over="ignore", invalid="ignore"):  # as in the compute thread
            adder.add()
        wanted = sum_partials(tensors, wire)
        assert torch.equal(room.total_TD.isnan(), wanted.isnan())
        assert torch.equal(room.total_TD.nan_to_num(), wanted.nan_to_num())
        assert bytes(room.total) == bytes(to_wire(room.total_TD, wire))


@pytest.mark.parametrize("wire", FORMATS)
def test_a_room_is_one_memory_for_tensors_bytes_and_frames(wire: ActivationFormat) -> None:
    room = Room(*SHAPE, wire, before_part=48, before_total=40)
    for values_TD, octets, frame, before in (
        (room.part_TD, room.part, room.part_frame, 48),
        (room.total_TD, room.total, room.total_frame, 40),
    ):
        values_TD.fill_(2.5)
        assert bytes(octets) == bytes(to_wire(values_TD, wire)) == bytes(frame[before:])
        assert values_TD.shape == SHAPE
        assert values_TD.data_ptr() % ALIGNMENT == 0


@pytest.mark.parametrize("wire", FORMATS)
def test_a_sum_without_a_part_is_refused(wire: ActivationFormat) -> None:
    with pytest.raises(StepFailed, match="none of 0"):
        add_parts([], wire, (1, 4))

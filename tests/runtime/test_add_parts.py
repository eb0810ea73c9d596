"""Parts of a sum as they come from the wire: the bits of `sum_partials`, whatever the frames look like."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import StepFailed
from protocol.specs import ActivationFormat
from runtime.reduce import Total, add_parts, sum_partials, to_wire
from runtime.tensors import dtype_of

FORMATS = tuple(ActivationFormat)


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(0, 5), st.sampled_from(FORMATS), st.integers(0, 7))
def test_the_bits_are_those_of_torch(seed: int, count: int, own: int, wire: ActivationFormat, offset: int) -> None:
    shape = (3, 17)
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        (torch.randn(shape, generator=generator) * 10.0 ** (3 * number - 6)).to(dtype_of(wire))
        for number in range(count)
    ]
    parts: list[memoryview] = []
    for number, tensor in enumerate(tensors):
        data = bytearray(offset) + bytearray(to_wire(tensor, wire))  # at any offset: frames are aligned to nothing
        frame = memoryview(data if seed % 2 else bytes(data))[offset:]
        parts.append(to_wire(tensor, wire) if number == own else frame)
    before = [bytes(to_wire(tensor, wire)) for tensor in tensors]
    wanted = bytes(to_wire(sum_partials(tensors, wire), wire))
    assert bytes(add_parts(parts, wire, shape)) == wanted
    if wire is ActivationFormat.FLOAT32:
        total = Total(*shape)
        for _ in range(2):
            assert add_parts(parts, wire, shape, total) is total.octets
            assert bytes(total.octets) == bytes(to_wire(total.total_TD, wire)) == wanted
    assert [bytes(to_wire(tensor, wire)) for tensor in tensors] == before


@pytest.mark.parametrize("wire", FORMATS)
def test_a_sum_without_a_part_is_refused(wire: ActivationFormat) -> None:
    with pytest.raises(StepFailed, match="none of 0"):
        add_parts([], wire, (1, 4))

"""Bytes to tensors and back: shared memory, checked lengths, fixed order of sums."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiles_of import cut_tile, make_model, spec_of

from protocol.errors import CheckpointInvalid, FrameMalformed, ModelUnsupported, StepFailed
from protocol.specs import ActivationFormat
from protocol.tiles import all_tiles, tile_slices
from runtime.reduce import from_wire, sum_partials, to_wire
from runtime.tensors import as_bytes, as_tensor, dtype_named, tile_tensors

FORMATS = list(ActivationFormat)


@pytest.mark.parametrize("wire", FORMATS)
def test_a_frame_round_trips_without_a_copy(wire):
    tensor = torch.randn(3, 8).to(dtype_named(wire.value))
    frame = to_wire(tensor, wire)
    assert (frame.nbytes, frame.format, frame.ndim) == (24 * wire.num_bytes, "B", 1)
    tensor[0, 0] = 5  # the frame sees it: no copy
    found = from_wire(frame, wire, (3, 8))
    assert torch.equal(found, tensor)
    assert found.data_ptr() == tensor.data_ptr()
    assert torch.equal(from_wire(bytes(frame), wire, (3, 8)), tensor)  # read-only memory, and no warning


def test_tensors_of_inference_mode_can_be_sent():
    with torch.inference_mode():
        tensor = torch.ones(2, 3) * 2
    frame = to_wire(tensor, ActivationFormat.FLOAT32)
    with torch.inference_mode():
        assert torch.equal(from_wire(frame, ActivationFormat.FLOAT32, (2, 3)) + tensor, tensor * 2)


def test_a_frame_is_cast_and_put_in_order():
    tensor = torch.randn(4, 6).T
    assert torch.equal(from_wire(to_wire(tensor, ActivationFormat.FLOAT32), ActivationFormat.FLOAT32, (6, 4)), tensor)
    wire = ActivationFormat.BFLOAT16
    assert torch.equal(from_wire(to_wire(tensor, wire), wire, (6, 4)), tensor.bfloat16())


@pytest.mark.parametrize("wire", FORMATS)
@pytest.mark.parametrize("offset", range(5))
def test_memory_at_any_address_is_read(wire, offset):
    tensor = torch.randn(5, 3).to(dtype_named(wire.value))
    frame = memoryview(bytes(offset) + bytes(to_wire(tensor, wire)))[offset:]
    assert torch.equal(from_wire(frame, wire, (5, 3)), tensor)


@given(st.binary(max_size=64), st.sampled_from(FORMATS), st.integers(1, 4), st.integers(1, 6))
def test_any_frame_has_the_right_length_or_is_refused(frame, wire, rows, hidden):
    if len(frame) == rows * hidden * wire.num_bytes:
        assert from_wire(frame, wire, (rows, hidden)).shape == (rows, hidden)
    else:
        with pytest.raises(FrameMalformed, match=f"{len(frame)} bytes are not"):
            from_wire(frame, wire, (rows, hidden))


def test_empty_tensors_have_no_bytes():
    assert bytes(as_bytes(torch.empty(0, 4))) == b""
    assert as_tensor(b"", torch.float32, (0, 4)).shape == (0, 4)


def test_unknown_dtypes_are_named():
    with pytest.raises(ModelUnsupported, match="float8"):
        dtype_named("float8")


def test_tiles_are_viewed_part_by_part():
    model = make_model("llama-biased")
    spec = spec_of(model)
    state = model.state_dict()
    for tile in all_tiles(spec):
        parts = tile_tensors(spec, tile, cut_tile(spec, state, tile))
        for piece in tile_slices(spec, tile):
            rows = slice(piece.rows.start, piece.rows.end) if piece.rows else slice(None)
            wanted = state[piece.tensor][rows]
            if piece.cols:
                wanted = wanted[:, piece.cols.start : piece.cols.end]
            assert torch.equal(parts[piece.part], wanted)


@pytest.mark.parametrize("change", [lambda cut: cut[:-1], lambda cut: cut + b"\0", lambda cut: b""])
def test_tiles_of_wrong_length_are_refused(change):
    model = make_model("qwen2")
    spec = spec_of(model)
    tile = all_tiles(spec)[-1]
    with pytest.raises(CheckpointInvalid, match="instead of"):
        tile_tensors(spec, tile, change(cut_tile(spec, model.state_dict(), tile)))


@pytest.mark.parametrize("activations", FORMATS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_sums_are_taken_in_rank_order_in_fp32(activations, count):
    dtype = dtype_named(activations.value)
    parts = [torch.randn(3, 16, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(count)]
    before = [part.clone() for part in parts]
    wanted = parts[0].float()
    for part in parts[1:]:
        wanted = wanted + part.float()
    assert torch.equal(sum_partials(parts, activations), wanted.to(dtype))
    for holes in itertools.combinations(range(count + 2), 2):  # members without a part change nothing
        sparse: list[torch.Tensor | None] = list(parts)
        for hole in holes:
            sparse.insert(hole, None)
        assert torch.equal(sum_partials(sparse, activations), wanted.to(dtype))
    assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))


@pytest.mark.parametrize("parts", [[], [None, None], [torch.zeros(1, 4), torch.zeros(2, 4)]])
def test_sums_that_make_no_sense_are_refused(parts):
    with pytest.raises(StepFailed):
        sum_partials(parts, ActivationFormat.FLOAT32)

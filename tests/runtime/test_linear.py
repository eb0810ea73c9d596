"""Every kernel multiplies like F.linear, and the choice between them is made by format and device."""

from __future__ import annotations

import pytest
import torch

from protocol.tiles import Part
from runtime import packed
from runtime.kernels import Kernels
from runtime.linear import PackedLinear, PlainLinear, project
from runtime.matrices import arrange, arrangement, make_matrix
from runtime.packed import can_pack_bfloat16, can_view_packed


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64, 48), (7, 24, 40), (33, 160, 17)])
def test_products_are_those_of_torch(shape, dtype, has_bias):
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype) if has_bias else None
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    wanted = torch.nn.functional.linear(x, weight, bias)
    tensors = {"w": weight} if bias is None else {"w": weight, "w.bias": bias}
    matrix = make_matrix(tensors, "w", Kernels(packs_bfloat16=can_pack_bfloat16()), is_pinned=True)
    assert matrix.num_bytes == weight.nbytes + (bias.nbytes if bias is not None else 0)
    with torch.inference_mode():
        found = matrix.apply(x)
    assert found.dtype is dtype
    torch.testing.assert_close(found, wanted, rtol=0.02 if dtype is torch.bfloat16 else 1e-5, atol=1e-3)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_product_may_be_written_where_it_is_wanted_with_the_same_bits(rows, dtype, has_bias):
    generator = torch.Generator().manual_seed(7)
    weight, x = (torch.randn(size, 64, generator=generator).to(dtype) for size in (48, rows))
    matrix = PlainLinear(weight, torch.ones(48, dtype=dtype) if has_bias else None, fewest_rows=2)
    wanted, place = matrix.apply(x), torch.full((rows, 48), 9.0, dtype=dtype)
    found = project(matrix, x, place)
    assert torch.equal(found, wanted)
    is_there = not has_bias and rows >= 2
    assert torch.equal(place, wanted) is is_there
    assert (found.data_ptr() == place.data_ptr()) is is_there


@pytest.mark.parametrize("is_pinned", [False, True])
@pytest.mark.parametrize("can_pack", [False, True])
def test_bfloat16_is_packed_only_where_it_may_be(can_pack, is_pinned):
    if can_pack and not can_pack_bfloat16():
        pytest.skip("this build of torch has no packed bf16 kernel")
    kernels = Kernels(packs_bfloat16=can_pack)
    wanted = PackedLinear if can_pack and is_pinned else PlainLinear
    assert type(make_matrix({"w": torch.zeros(16, 16).bfloat16()}, "w", kernels, is_pinned=is_pinned)) is wanted
    assert type(make_matrix({"w": torch.zeros(16, 16)}, "w", kernels, is_pinned=is_pinned)) is PlainLinear


@pytest.mark.parametrize("shape", [(128, 64), (192, 96), (64, 1000), (48, 64), (100, 33)])
def test_bfloat16_has_the_same_bits_packed_viewed_and_plain_alone_and_in_a_batch(shape):
    if not can_view_packed():
        pytest.skip("this build of torch makes no views on packed memory")
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator).bfloat16()
    x = torch.randn(9, shape[1], generator=generator).bfloat16()
    packs, views = (Kernels(packs_bfloat16=True, views_bfloat16=views) for views in (False, True))
    arranged = {"w": weight.clone()}
    arrange(arranged, views)
    with torch.inference_mode():
        wanted = make_matrix({"w": weight}, "w", packs, is_pinned=True).apply(x)
        for matrix in (
            make_matrix({"w": weight}, "w", packs, is_pinned=False),
            make_matrix(arranged, "w", views, is_pinned=True),
            make_matrix(arranged, "w", views, is_pinned=False),
        ):
            assert torch.equal(matrix.apply(x), wanted)
            assert torch.equal(torch.cat([matrix.apply(row[None]) for row in x]), wanted)


def test_an_arrangement_names_what_lies_where():
    parts = [Part("w", "bfloat16", 128, 64, 0, 128 * 64 * 2), Part("w.bias", "bfloat16", 128, 0, 128 * 64 * 2, 256)]
    plain, viewed = (arrangement(parts, Kernels(views_bfloat16=views)) for views in (False, can_view_packed()))
    assert (plain == viewed) is not can_view_packed()
    nibbles = [Part("w", "uint8", 64, 32, 0, 2048), Part("w.steps", "bfloat16", 2, 128, 2048, 512)]
    assert arrangement(nibbles, Kernels()) != arrangement(nibbles, Kernels(packs_int4=True))


def test_other_machines_are_not_tried(monkeypatch):
    monkeypatch.setattr(packed.platform, "machine", lambda: "aarch64")
    assert can_pack_bfloat16.__wrapped__() is False

"""Every kernel multiplies like F.linear, and the choice between them is made by format and device."""

from __future__ import annotations

import pytest
import torch

from runtime import linear
from runtime.kernels import Kernels
from runtime.linear import PackedLinear, PlainLinear, can_pack_bfloat16
from runtime.matrices import make_matrix


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


@pytest.mark.parametrize("is_pinned", [False, True])
@pytest.mark.parametrize("can_pack", [False, True])
def test_bfloat16_is_packed_only_where_it_may_be(can_pack, is_pinned):
    if can_pack and not can_pack_bfloat16():
        pytest.skip("this build of torch has no packed bf16 kernel")
    kernels = Kernels(packs_bfloat16=can_pack)
    wanted = PackedLinear if can_pack and is_pinned else PlainLinear
    assert type(make_matrix({"w": torch.zeros(16, 16).bfloat16()}, "w", kernels, is_pinned=is_pinned)) is wanted
    assert type(make_matrix({"w": torch.zeros(16, 16)}, "w", kernels, is_pinned=is_pinned)) is PlainLinear


def test_other_machines_are_not_tried(monkeypatch):
    monkeypatch.setattr(linear.platform, "machine", lambda: "aarch64")
    assert can_pack_bfloat16.__wrapped__() is False

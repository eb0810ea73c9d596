"""Every kernel multiplies like F.linear, and the choice between them is made by format and device."""

from __future__ import annotations

import pytest
import torch

from runtime import linear
from runtime.linear import PackedLinear, PlainLinear, can_pack_bfloat16, make_linear


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
    matrix = make_linear(weight, bias)
    assert matrix.num_bytes == weight.nbytes + (bias.nbytes if bias is not None else 0)
    with torch.inference_mode():
        found = matrix.apply(x)
    assert found.dtype is dtype
    torch.testing.assert_close(found, wanted, rtol=0.02 if dtype is torch.bfloat16 else 1e-5, atol=1e-3)


@pytest.mark.parametrize("can_pack", [False, True])
def test_bfloat16_is_packed_only_where_the_trial_passed(monkeypatch, can_pack):
    if can_pack and not can_pack_bfloat16():
        pytest.skip("this build of torch has no packed bf16 kernel")
    monkeypatch.setattr(linear, "can_pack_bfloat16", lambda: can_pack)
    assert isinstance(make_linear(torch.zeros(16, 16).bfloat16()), PackedLinear if can_pack else PlainLinear)
    assert isinstance(make_linear(torch.zeros(16, 16)), PlainLinear)


def test_other_machines_are_not_tried(monkeypatch):
    monkeypatch.setattr(linear.platform, "machine", lambda: "aarch64")
    assert can_pack_bfloat16.__wrapped__() is False

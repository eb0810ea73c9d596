"""Every quantised kernel against the plain one that dequantises, and rows that don't see each other."""

from __future__ import annotations

import pytest
import torch

from runtime.int4 import Int4Packed, Int4Unpacked, can_pack_int4, pack_int4, unpack_int4
from runtime.quantised import (
    ByRows,
    DequantisedLinear,
    Int4Weight,
    Int8Dynamic,
    Int8Integer,
    Int8Weight,
    integer_products,
    relative_error,
)

ROWS, COLS, GROUP = 208, 128, 32


def int8_weight() -> Int8Weight:
    generator = torch.Generator().manual_seed(3)
    value = torch.randint(-127, 128, (ROWS, COLS), dtype=torch.int8, generator=generator)
    return Int8Weight(value, torch.rand(ROWS, generator=generator) * 0.01 + 0.001)


def int4_weight(rows: int = ROWS) -> Int4Weight:
    generator = torch.Generator().manual_seed(4)
    packed = torch.randint(0, 256, (rows, COLS // 2), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(rows, COLS // GROUP, generator=generator) * 0.01 + 0.001).bfloat16()
    return Int4Weight(packed, scale, torch.randn(rows, COLS // GROUP, generator=generator).bfloat16() * 0.01)


def inputs(rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, COLS, generator=torch.Generator().manual_seed(5)).to(dtype)


def bias() -> torch.Tensor:
    return torch.randn(ROWS, generator=torch.Generator().manual_seed(6))


def test_nibbles_stand_even_column_low() -> None:
    weight = Int4Weight(torch.tensor([[0x80 | 0x09]], dtype=torch.uint8), torch.tensor([[0.5]]), torch.tensor([[0.25]]))
    assert DequantisedLinear(weight, None).apply(torch.eye(2)).flatten().tolist() == [0.75, 0.25]


@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["integer", "dynamic", "int4"])
def test_kernels_agree_with_the_reference(kernel: str, dtype: torch.dtype, rows: int) -> None:
    weight = int4_weight() if kernel == "int4" else int8_weight()
    offset, x = bias().to(dtype), inputs(rows, dtype)
    if isinstance(weight, Int4Weight):
        assert can_pack_int4(ROWS, COLS, GROUP)
        linear = Int4Packed(*pack_int4(weight), weight.group, offset)
    else:
        linear = Int8Integer(weight, offset) if kernel == "integer" else Int8Dynamic(weight, offset)
    wanted = DequantisedLinear(weight, offset.double()).apply(x.double())
    bound = {"integer": 0.015, "dynamic": 0.015, "int4": 0.006}[kernel]
    assert relative_error(linear.apply(x), wanted) < bound
    assert linear.apply(x).dtype is dtype


def test_packing_in_strips_is_packing_at_once() -> None:
    weight = int4_weight(rows=592)
    nibble = torch.stack((weight.packed & 15, weight.packed >> 4), dim=-1).view(592, -1)
    assert torch.equal(pack_int4(weight)[0], torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibble.int(), 1))


@pytest.mark.parametrize("rows", [16, 64, 80, 208, 592])
def test_unpacking_gives_the_nibbles_back(rows: int) -> None:
    weight = int4_weight(rows)
    nibble = torch.stack((weight.packed & 15, weight.packed >> 4), dim=-1).view(rows, -1)
    assert torch.equal(unpack_int4(pack_int4(weight)[0]), nibble.t())


@pytest.mark.parametrize("rows", [16, 208, 592])
def test_packed_int4_for_many_rows(rows: int) -> None:
    weight = int4_weight(rows)
    x, offset = inputs(40, torch.float32), torch.randn(rows)
    found = Int4Unpacked(*pack_int4(weight), weight.group, offset).apply(x)
    assert relative_error(found, DequantisedLinear(weight, offset).apply(x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_int8_kernels_give_the_same_bits(dtype: torch.dtype) -> None:
    weight, x = int8_weight(), inputs(2000, dtype)
    assert torch.equal(Int8Integer(weight, None).apply(x), Int8Dynamic(weight, None).apply(x))


def test_integer_products_are_exact_without_an_integer_kernel() -> None:
    x = torch.randint(-128, 128, (3, 5000), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    weight = torch.randint(-127, 128, (7, 5000), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    wanted = (x.long() @ weight.long().t()).float()
    assert torch.equal(integer_products(x, weight), wanted)


@pytest.mark.parametrize("kernel", [Int8Integer, Int8Dynamic])
def test_int8_rows_do_not_see_each_other(kernel: type[Int8Integer] | type[Int8Dynamic]) -> None:
    linear = kernel(int8_weight(), None)
    x = inputs(33, torch.float32)
    x[7] *= 50
    together = linear.apply(x)
    for row in range(33):
        assert torch.equal(together[row], linear.apply(x[row : row + 1])[0])


@pytest.mark.parametrize("kernel", [Int8Integer, Int8Dynamic])
def test_a_row_of_zeros_gives_the_bias(kernel: type[Int8Integer] | type[Int8Dynamic]) -> None:
    assert torch.equal(kernel(int8_weight(), bias()).apply(torch.zeros(1, COLS))[0], bias())


def test_few_and_many_rows_choose_their_kernel() -> None:
    weight = int4_weight()
    few, many = Int4Packed(*pack_int4(weight), weight.group, None), DequantisedLinear(weight, None)
    both = ByRows(few, many, few_rows=4)
    x = inputs(5, torch.bfloat16)
    assert torch.equal(both.apply(x), many.apply(x))
    assert torch.equal(both.apply(x[:4]), few.apply(x[:4]))

"""Quantised matrices stay within their bounds, and do not depend on how the matrix is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from coordinator.quantise import Int4Matrix, int8_scales, quantise_int4, quantise_int8

WEIGHTS = nps.arrays(np.float32, (6, 64), elements=st.floats(-4, 4, width=32))


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def dequantise_int4(matrix: Int4Matrix, group: int) -> np.ndarray:
    low, high = matrix.packed & 15, matrix.packed >> 4
    nibble = np.stack((low, high), axis=-1).reshape(matrix.packed.shape[0], -1).astype(np.float32)
    scale, zero = (np.repeat(widen(part), group, axis=1) for part in (matrix.scale, matrix.zero))
    return (nibble - 8) * scale + zero


@given(WEIGHTS)
def test_int8_error_is_half_a_step(weight: np.ndarray) -> None:
    value, scale = quantise_int8(weight, int8_scales(weight))
    error = np.abs(value.astype(np.float64) * scale[:, None] - weight)
    assert (error <= scale[:, None] * 0.5 * (1 + 1e-5)).all()


@given(WEIGHTS, st.integers(1, 63))
def test_int8_columns_take_the_scale_of_the_whole_row(weight: np.ndarray, cut: int) -> None:
    scale = int8_scales(weight)
    whole = quantise_int8(weight, scale).value_OI
    parts = [quantise_int8(weight[:, :cut], scale).value_OI, quantise_int8(weight[:, cut:], scale).value_OI]
    assert (np.concatenate(parts, axis=1) == whole).all()


@settings(max_examples=200)
@example(np.tile(np.array([0.0, 1e-45], np.float32), (6, 32)), 32)
@given(WEIGHTS, st.sampled_from([16, 32, 64]))
def test_int4_error_is_bounded_by_its_group(weight: np.ndarray, group: int) -> None:
    matrix = quantise_int4(weight, group)
    error = np.abs(dequantise_int4(matrix, group) - weight).reshape(6, -1, group)
    # half a step, and what rounding scale and zero to 8 bits of mantissa costs at the ends of the group
    reach = np.abs(weight).reshape(6, -1, group).max(axis=2) + 8 * widen(matrix.scale)
    bound = widen(matrix.scale) / 2 + reach * 2**-7
    assert (error <= bound[..., None] + 1e-30).all()


def test_int4_groups_do_not_see_each_other() -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(8, 128)).astype(np.float32)
    whole = quantise_int4(weight, 32)
    half = quantise_int4(weight[:, 64:], 32)
    assert (whole.packed[:, 32:] == half.packed).all()
    assert (whole.scale[:, 2:] == half.scale).all() and (whole.zero[:, 2:] == half.zero).all()


@pytest.mark.parametrize("value", [0.0, 1.5, -1e-20])
def test_constant_rows(value: float) -> None:
    weight = np.full((2, 64), value, np.float32)
    int8 = quantise_int8(weight, int8_scales(weight))
    assert np.allclose(int8.value_OI * int8.scale_O[:, None], weight, rtol=1e-6)
    assert np.allclose(dequantise_int4(quantise_int4(weight, 32), 32), weight, rtol=0.02)


def test_gaussian_error_is_what_the_field_measures() -> None:
    weight = np.random.default_rng(0).normal(size=(64, 2048)).astype(np.float32)
    int8 = quantise_int8(weight, int8_scales(weight))
    int4 = quantise_int4(weight, 32)
    relative = [
        float(np.linalg.norm(found - weight) / np.linalg.norm(weight))
        for found in (int8.value_OI * int8.scale_O[:, None], dequantise_int4(int4, 32))
    ]
    assert relative[0] < 0.011 and relative[1] < 0.085

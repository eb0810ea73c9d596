"""Quantises weight matrices, once, from the checkpoint: int8 per output row, int4 in groups along the input.

Knows nothing of tiles or files. Rounding to nearest; the scale of an int8 row is taken over the whole row of the
checkpoint, and int4 groups never cross a tile, so that the numbers do not depend on how a matrix is cut.

Shapes: O output rows, I input columns, g columns a group.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from coordinator.number_formats import float32_to_bfloat16

Float32 = npt.NDArray[np.float32]
INT8_MOST = 127
INT4_LEVELS = 15
INT4_MIDDLE = 8


class Int8Matrix(NamedTuple):
    """`value_OI * scale_O` approximates the weights; |error| <= scale / 2."""

    value_OI: npt.NDArray[np.int8]
    scale_O: Float32


class Int4Matrix(NamedTuple):
    """`(nibble - 8) * scale + zero` approximates the weights, with one scale and zero (bfloat16 bit patterns) a group.

    Two nibbles a byte: the even column in the low half.
    """

    packed: npt.NDArray[np.uint8]  # [O, I / 2]
    scale: npt.NDArray[np.uint16]  # [O, I / g]
    zero: npt.NDArray[np.uint16]  # [O, I / g]


def int8_scales(weight_OI: Float32) -> Float32:
    """Return the scale of each row: its largest magnitude becomes 127. Never so small that dividing by it overflows."""
    most = np.abs(weight_OI).max(axis=1)
    scale: Float32 = np.maximum(most / INT8_MOST, np.finfo(np.float32).tiny).astype(np.float32)
    return scale


def quantise_int8(weight_OI: Float32, scale_O: Float32) -> Int8Matrix:
    """Round a matrix, or some columns of one, under the scales of its whole rows."""
    value = np.rint(weight_OI / scale_O[:, None])
    np.clip(value, -INT8_MOST, INT8_MOST, out=value)
    return Int8Matrix(value.astype(np.int8), scale_O)


def quantise_int4(weight_OI: Float32, group: int) -> Int4Matrix:
    """Round in groups of `group` columns between each group's least and largest weight.

    Scale and zero are rounded to bfloat16 first and the nibbles chosen under the rounded ones, so that the reader's
    arithmetic is the writer's.
    """
    rows, cols = weight_OI.shape
    grouped = np.ascontiguousarray(weight_OI, dtype=np.float32).reshape(rows, cols // group, group)
    least, most = grouped.min(axis=2), grouped.max(axis=2)
    # Never so small that the scale becomes 0.
    spread = np.maximum(np.where(most > least, most - least, np.abs(most)), 1e-30) / INT4_LEVELS
    scale_bits = float32_to_bfloat16(np.ascontiguousarray(spread, dtype=np.float32))
    scale = _widen(scale_bits)
    zero_bits = float32_to_bfloat16(np.ascontiguousarray(least + INT4_MIDDLE * scale, dtype=np.float32))
    value = np.rint((grouped - _widen(zero_bits)[..., None]) / scale[..., None]) + INT4_MIDDLE
    nibble = np.clip(value, 0, INT4_LEVELS).astype(np.uint8).reshape(rows, cols)
    return Int4Matrix(nibble[:, 0::2] | (nibble[:, 1::2] << 4), scale_bits, zero_bits)


def _widen(bits: npt.NDArray[np.uint16]) -> Float32:
    """bfloat16 bit patterns as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)

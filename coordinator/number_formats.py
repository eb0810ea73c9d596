"""Converts between the float formats of checkpoints, exactly where that is possible, else to the nearest, ties to even.

Knows nothing of files. numpy has no bfloat16: its bit patterns travel as little-endian uint16.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FloatName = Literal["float32", "bfloat16"]

STORED_AS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<f2")}
RESULT_AS: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}


def is_exact_copy(source: str, target: str) -> bool:
    """Say whether a safetensors dtype has the very bytes of "float32" or "bfloat16"."""
    return (source, target) in (("F32", "float32"), ("BF16", "bfloat16"))


def convert_into(result: Array, target: str, values: Array, source: str) -> None:
    """Fill `result` ("float32", or "bfloat16" bit patterns) from `values` of a safetensors dtype, same shape.

    `result` must be contiguous, `values` may be strided.
    """
    if is_exact_copy(source, target) or (source, target) == ("F16", "float32"):
        result[...] = values
    elif target == "float32":  # bfloat16 is the upper half of a float32
        bits = result.view("<u4")
        bits[...] = values
        bits <<= np.uint32(16)
    else:
        result[...] = float32_to_bfloat16(np.ascontiguousarray(values, dtype="<f4"))


def float32_to_bfloat16(values: Array) -> Array:
    """Round contiguous float32 to the nearest bfloat16, ties to even; a NaN stays a (quiet) NaN of its sign."""
    bits = values.view(np.dtype("<u4"))
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if is_nan.any():
        rounded[is_nan] = (bits[is_nan] >> np.uint32(16)) | np.uint32(0x40)
    return rounded.astype(np.dtype("<u2"))

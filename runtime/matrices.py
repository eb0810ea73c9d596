"""Makes a matrix ready to be multiplied with from its tensors in a block: the one place where a kernel is put to work.

Knows nothing of layers. A pinned matrix may be packed anew, for it stays; a streamed one is used as it lies in a slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protocol.specs import INT4_GROUP
from runtime.fused import Tensors, is_packable
from runtime.kernels import Kernels
from runtime.linear import Linear, PackedLinear, PlainLinear
from runtime.quantised import (
    ByRows,
    DequantisedLinear,
    Int4Packed,
    Int4Unpacked,
    Int4Weight,
    Int8Dynamic,
    Int8Integer,
    Int8Weight,
)


def make_matrix(tensors: Tensors, name: str, kernels: Kernels, *, is_pinned: bool) -> Linear:
    """Return the matrix `name` of a block; `is_pinned`: the caller gives the tensors up and they are not reused."""
    weight_OI, bias_O = tensors[name], tensors.get(f"{name}.bias")
    if f"{name}.steps" in tensors:
        return _int4(weight_OI, tensors[f"{name}.steps"], bias_O, kernels)
    if f"{name}.scale" in tensors:
        weight = Int8Weight(weight_OI, tensors[f"{name}.scale"])
        is_packed = is_pinned and kernels.packs_int8
        return Int8Dynamic(weight, bias_O) if is_packed else Int8Integer(weight, bias_O)
    if is_pinned and kernels.packs_bfloat16 and weight_OI.dtype is torch.bfloat16 and weight_OI.device.type == "cpu":
        return PackedLinear(weight_OI, bias_O)
    return PlainLinear(weight_OI, bias_O)


def _int4(nibbles: Tensor, steps: Tensor, bias_O: Tensor | None, kernels: Kernels) -> Linear:
    scales_and_zeros = steps.view(steps.shape[0], -1, 2)
    if kernels.packs_int4 and is_packable(nibbles):
        few = Int4Packed(nibbles, scales_and_zeros, INT4_GROUP, bias_O)
        return ByRows(few, Int4Unpacked(nibbles, scales_and_zeros, INT4_GROUP, bias_O), few_rows=kernels.int4_few_rows)
    scale, zero = scales_and_zeros[..., 0].t(), scales_and_zeros[..., 1].t()
    return DequantisedLinear(Int4Weight(nibbles, scale, zero), bias_O)

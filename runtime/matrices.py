"""Makes a matrix ready to be multiplied with from its tensors in a block: the one place where a kernel is put to work.

Knows nothing of layers or files. `arrange` brings a block's matrices into the order that this device's kernels want,
in the same memory, once; `make_matrix` then uses them as they lie, in memory of their own or in a slot. Only where a
kernel keeps its matrix to itself (fbgemm's int8; bfloat16 where torch makes no views) is a pinned matrix copied again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from protocol.specs import INT4_GROUP
from protocol.tiles import Part
from runtime.fused import Tensors
from runtime.int4 import Int4Packed, Int4Unpacked, can_pack_int4, pack_int4
from runtime.kernels import Kernels
from runtime.linear import SAME_SUMS_ROWS, Linear, PackedLinear, PlainLinear
from runtime.packed import pack_in_place, packed_form
from runtime.quantised import ByRows, DequantisedLinear, Int4Weight, Int8Dynamic, Int8Integer, Int8Weight


def arrange(tensors: Tensors, kernels: Kernels) -> None:
    """Bring the matrices of a block into the order of this device's kernels, in place; takes one matrix more."""
    for name, matrix in tensors.items():
        if f"{name}.steps" in tensors and _packs_int4(matrix.shape[0], 2 * matrix.shape[1], kernels):
            unused = torch.empty(matrix.shape[0], 1, dtype=torch.bfloat16)
            matrix.copy_(pack_int4(Int4Weight(matrix, unused, unused))[0])
        elif (
            _is_bfloat16_matrix(matrix)
            and not name.endswith(".steps")
            and _form(matrix.shape[0], matrix.shape[1], kernels) is not None
        ):
            pack_in_place(matrix)


def arrangement(parts: Iterable[Part], kernels: Kernels) -> bytes:
    """Say in a few bytes what `arrange` does with the tensors of a block."""
    digest = hashlib.sha256()
    for part in parts:
        is_matrix = part.cols > 0
        if is_matrix and part.dtype == "bfloat16" and not part.name.endswith(".steps"):
            digest.update(_form(part.rows, part.cols, kernels) or b"-")
        elif is_matrix and part.dtype == "uint8":
            digest.update(b"4" if _packs_int4(part.rows, 2 * part.cols, kernels) else b"-")
    return digest.digest()


def make_matrix(tensors: Tensors, name: str, kernels: Kernels, *, is_pinned: bool) -> Linear:
    """Return the matrix `name` of an arranged block; `is_pinned`: the caller gives the tensors up for good."""
    weight_OI, bias_O = tensors[name], tensors.get(f"{name}.bias")
    if f"{name}.steps" in tensors:
        return _int4(weight_OI, tensors[f"{name}.steps"], bias_O, kernels)
    if f"{name}.scale" in tensors:
        weight = Int8Weight(weight_OI, tensors[f"{name}.scale"])
        is_packed = is_pinned and kernels.packs_int8
        return Int8Dynamic(weight, bias_O) if is_packed else Int8Integer(weight, bias_O)
    if _is_bfloat16_matrix(weight_OI) and kernels.packs_bfloat16:
        if _form(weight_OI.shape[0], weight_OI.shape[1], kernels) is not None:
            return PackedLinear.viewed(weight_OI, bias_O)
        if is_pinned:
            return PackedLinear.reordered(weight_OI, bias_O)
        return PlainLinear(weight_OI, bias_O, fewest_rows=SAME_SUMS_ROWS)
    return PlainLinear(weight_OI, bias_O)


def _is_bfloat16_matrix(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.dtype is torch.bfloat16 and tensor.device.type == "cpu"


def _form(rows: int, cols: int, kernels: Kernels) -> bytes | None:
    """How a bfloat16 matrix is packed in place; None: it stays plain."""
    return packed_form(rows, cols) if kernels.views_bfloat16 else None


def _packs_int4(rows: int, cols: int, kernels: Kernels) -> bool:
    return kernels.packs_int4 and can_pack_int4(rows, cols, INT4_GROUP)


def _int4(nibbles: Tensor, steps: Tensor, bias_O: Tensor | None, kernels: Kernels) -> Linear:
    scales_and_zeros = steps.view(steps.shape[0], -1, 2)
    if _packs_int4(nibbles.shape[0], 2 * nibbles.shape[1], kernels):
        few = Int4Packed(nibbles, scales_and_zeros, INT4_GROUP, bias_O)
        return ByRows(few, Int4Unpacked(nibbles, scales_and_zeros, INT4_GROUP, bias_O), few_rows=kernels.int4_few_rows)
    scale, zero = scales_and_zeros[..., 0].t(), scales_and_zeros[..., 1].t()
    return DequantisedLinear(Int4Weight(nibbles, scale, zero), bias_O)

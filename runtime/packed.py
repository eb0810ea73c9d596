"""bfloat16 matrices in oneDNN's own order: the same bytes in another order, so that a file or a slot can hold them.

Knows nothing of layers or files. oneDNN's product on a matrix in its order is twice as fast for few rows as on a plain
one, which it reorders at each call. torch hides that order in opaque tensors that own their memory; the interface for
compiled models (torch/csrc/inductor/aoti_torch/c/shim.h) also makes them over memory that is somebody else's. Where a
build of torch lacks it, `can_view_packed` says so and matrices are packed when they are pinned, or not at all.

Shapes: T rows of a batch, I input features, O output features.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

MKLDNN_BFLOAT16_BYTES = 2


@cache
def can_pack_bfloat16() -> bool:
    """Try the packed product on a small matrix and compare; False where it is missing or wrong."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch._C._has_mkldnn:
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight") or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    weight_OI, bias_O, x_TI = _trial(48, 64)
    with torch.inference_mode():
        try:
            found = multiply_packed(x_TI, reorder(weight_OI), bias_O)
        except RuntimeError:  # a build of torch without this product: the plain one is always there
            return False
        wanted = functional.linear(x_TI, weight_OI, bias_O)
    return torch.allclose(found.float(), wanted.float(), rtol=0.02, atol=0.05)


@cache
def can_view_packed() -> bool:
    """Try to pack a matrix in place and to multiply with a view on it; False where torch can't make such views."""
    if not can_pack_bfloat16():
        return False
    weight_OI, bias_O, x_TI = _trial(128, 64)
    with torch.inference_mode():
        try:
            wanted = multiply_packed(x_TI, reorder(weight_OI), bias_O)
            if packed_form(128, 64) is None:
                return False
            pack_in_place(weight_OI)
            return torch.equal(multiply_packed(x_TI, view_packed(weight_OI), bias_O), wanted)
        except (RuntimeError, AttributeError, OSError):  # the interface is another in this build
            return False


def reorder(weight_OI: Tensor) -> Tensor:
    """Return an opaque copy of a bfloat16 matrix in oneDNN's order."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous())
    return packed


def multiply_packed(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return `x_TI @ weight.T + bias`, `[T, O]`."""
    # An operator of the compiler's backend, without a public name: see torch/_inductor/mkldnn_lowerings.py.
    multiply: Any = torch.ops.mkldnn._linear_pointwise
    result_TO: Tensor = multiply(x_TI, packed, bias_O, "none", [], "")
    return result_TO


@cache
def packed_form(rows: int, cols: int) -> bytes | None:
    """Return oneDNN's description of its order for a matrix of this shape; None when it needs more bytes than plain.

    Takes the memory of one such matrix for a moment, so ask before memory is given out.
    """
    packed = reorder(torch.empty(rows, cols, dtype=torch.bfloat16))
    if torch.ops.mkldnn._nbytes(packed) != rows * cols * MKLDNN_BFLOAT16_BYTES:
        return None
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes())


def pack_in_place(weight_OI: Tensor) -> None:
    """Bring a contiguous matrix whose `packed_form` is known into oneDNN's order, in the same memory."""
    packed = reorder(weight_OI)
    ctypes.memmove(weight_OI.data_ptr(), torch.ops.mkldnn.data_ptr(packed), weight_OI.nbytes)


def view_packed(weight_OI: Tensor) -> Tensor:
    """Return an opaque tensor over the memory of a matrix that was packed in place; keep the matrix as long as it.

    Raises RuntimeError when this build of torch can't.
    """
    rows, cols = weight_OI.shape
    form = packed_form(rows, cols)
    if form is None:
        raise RuntimeError(f"a matrix of {rows} x {cols} can't be packed in place")
    shim = _shim()
    handle = ctypes.c_void_p()
    failed = shim.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(weight_OI.data_ptr()),
        ctypes.c_int64(2),
        (ctypes.c_int64 * 2)(rows, cols),
        (ctypes.c_int64 * 2)(cols, 1),
        ctypes.c_int64(0),
        ctypes.c_int32(shim.aoti_torch_dtype_bfloat16()),
        ctypes.c_int32(shim.aoti_torch_device_type_cpu()),
        ctypes.c_int32(0),
        ctypes.byref(handle),
        ctypes.c_int32(shim.aoti_torch_layout__mkldnn()),
        (ctypes.c_uint8 * len(form)).from_buffer_copy(form),
        ctypes.c_int64(len(form)),
    )
    if failed or not handle.value:
        raise RuntimeError("torch made no view on packed memory")
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    view: Tensor = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(new_capsule(handle, None, None))
    return view


@cache
def _shim() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


def _trial(rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(rows, cols, generator=generator).bfloat16()
    bias_O = torch.randn(rows, generator=generator).bfloat16()
    return weight_OI, bias_O, torch.randn(3, cols, generator=generator).bfloat16()

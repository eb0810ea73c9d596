"""A matrix ready to be multiplied with, in the form that is fastest on this device.

Knows nothing of layers, nor of which form is chosen: `runtime.matrices` does that. The quantised forms stand in
`runtime.quantised`.

Shapes: T rows of a batch, I input features, O output features.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional


class Linear(Protocol):
    """A matrix `[O, I]`, perhaps with a bias `[O]`; `num_bytes` is the memory it holds."""

    num_bytes: int

    def apply(self, x_TI: Tensor) -> Tensor:
        """Return `x_TI @ weight.T + bias`, shape `[T, O]`, in the dtype of `x_TI`."""
        ...


class PlainLinear:
    """The matrix as it is; works in every float format and on every device."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._weight_OI = weight_OI
        self._bias_O = bias_O
        self.num_bytes = _num_bytes(weight_OI, bias_O)

    def apply(self, x_TI: Tensor) -> Tensor:
        """Return the product, shape `[T, O]`."""
        return functional.linear(x_TI, self._weight_OI, self._bias_O)


class PackedLinear:
    """The matrix reordered once into oneDNN's blocks: bf16 on x86, 1.3 to 2.8 times faster for few rows.

    Same sums as `F.linear`, which reorders the matrix at each call.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._packed = _reorder(weight_OI)
        self._bias_O = bias_O
        self.num_bytes = _num_bytes(weight_OI, bias_O)

    def apply(self, x_TI: Tensor) -> Tensor:
        """Return the product, shape `[T, O]`."""
        return _multiply(x_TI, self._packed, self._bias_O)


@cache
def can_pack_bfloat16() -> bool:
    """Try the packed kernel on a small matrix and compare; False where it is missing or wrong."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch._C._has_mkldnn:
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight") or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        weight_OI = torch.randn(48, 64, generator=generator).bfloat16()
        bias_O = torch.randn(48, generator=generator).bfloat16()
        x_TI = torch.randn(3, 64, generator=generator).bfloat16()
        try:
            found = _multiply(x_TI, _reorder(weight_OI), bias_O)
        except RuntimeError:  # a build of torch without this kernel: the plain one is always there
            return False
        wanted = functional.linear(x_TI, weight_OI, bias_O)
    return torch.allclose(found.float(), wanted.float(), rtol=0.02, atol=0.05)


def _reorder(weight_OI: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous())
    return packed


def _multiply(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    # An operator of the compiler's backend, without a public name: see torch/_inductor/mkldnn_lowerings.py.
    multiply: Any = torch.ops.mkldnn._linear_pointwise
    result_TO: Tensor = multiply(x_TI, packed, bias_O, "none", [], "")
    return result_TO


def _num_bytes(weight_OI: Tensor, bias_O: Tensor | None) -> int:
    return weight_OI.nbytes + (bias_O.nbytes if bias_O is not None else 0)

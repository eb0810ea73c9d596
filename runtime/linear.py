"""A float matrix ready to be multiplied with, in the form that is fastest on this device.

Knows nothing of layers, nor of which form is chosen: `runtime.matrices` does that. The quantised forms stand in
`runtime.quantised`, oneDNN's order of a matrix in `runtime.packed`.

Shapes: T rows of a batch, I input features, O output features.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from runtime.packed import multiply_packed, reorder, view_packed

SAME_SUMS_ROWS = 2
"""From here on oneDNN adds a row's products in one order however many rows there are; for a single row in another."""
QUICK_ROWS = 4
"""oneDNN's packed product takes a fifth longer for one or two rows than for four."""


class Linear(Protocol):
    """A matrix `[O, I]`, perhaps with a bias `[O]`; `num_bytes` is the memory it holds."""

    num_bytes: int

    def apply(self, x_TI: Tensor) -> Tensor:
        """Return `x_TI @ weight.T + bias`, shape `[T, O]`, in the dtype of `x_TI`."""
        ...


class PlainLinear:
    """The matrix as it is; works in every float format and on every device.

    Fewer rows than `fewest_rows` are filled up with zeros.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, *, fewest_rows: int = 1) -> None:
        self._weight_OI = weight_OI
        self._weight_IO = weight_OI.t()
        self._bias_O = bias_O
        self._fewest_rows = fewest_rows
        self.num_bytes = _num_bytes(weight_OI, bias_O)

    def apply(self, x_TI: Tensor, into_TO: Tensor | None = None) -> Tensor:
        """Return the product, shape `[T, O]`; it is `into_TO` where there is one, of that shape, and no row to add."""
        rows = x_TI.shape[0]
        if into_TO is not None and self._bias_O is None and rows >= self._fewest_rows:
            return torch.mm(x_TI, self._weight_IO, out=into_TO)
        result_TO = functional.linear(fill_up(x_TI, self._fewest_rows), self._weight_OI, self._bias_O)
        return result_TO[:rows]


class PackedLinear:
    """A bfloat16 matrix in oneDNN's order: 1.4 to 2 times faster than the plain one for few rows, with the same bits.

    Rows are filled up to four with zeros: that is quicker, and a row has the same bits alone and in any batch.
    """

    def __init__(self, packed: Tensor, bias_O: Tensor | None, weight_OI: Tensor) -> None:
        self._packed = packed
        self._bias_O = bias_O
        self._weight_OI = weight_OI  # the memory that `packed` may be a view on
        self.num_bytes = _num_bytes(weight_OI, bias_O)

    @classmethod
    def reordered(cls, weight_OI: Tensor, bias_O: Tensor | None) -> PackedLinear:
        """Copy a plain matrix into oneDNN's order."""
        packed = reorder(weight_OI)
        return cls(packed, bias_O, packed)

    @classmethod
    def viewed(cls, weight_OI: Tensor, bias_O: Tensor | None) -> PackedLinear:
        """Use a matrix that was packed in place."""
        return cls(view_packed(weight_OI), bias_O, weight_OI)

    def apply(self, x_TI: Tensor) -> Tensor:
        """Return the product, shape `[T, O]`."""
        rows = x_TI.shape[0]
        return multiply_packed(fill_up(x_TI, QUICK_ROWS), self._packed, self._bias_O)[:rows]


def project(matrix: Linear, x_TI: Tensor, into_TO: Tensor | None) -> Tensor:
    """Return `matrix.apply(x_TI)`, written into `into_TO` if there is one and this kind of matrix can do so."""
    return matrix.apply(x_TI, into_TO) if isinstance(matrix, PlainLinear) else matrix.apply(x_TI)


def fill_up(x_TI: Tensor, fewest_rows: int) -> Tensor:
    """Return at least so many rows, zeros after those of `x_TI`."""
    rows = x_TI.shape[0]
    if rows >= fewest_rows:
        return x_TI
    filled = torch.zeros(fewest_rows, x_TI.shape[1], dtype=x_TI.dtype, device=x_TI.device)
    filled[:rows] = x_TI
    return filled


def _num_bytes(weight_OI: Tensor, bias_O: Tensor | None) -> int:
    size = weight_OI.numel() * weight_OI.dtype.itemsize  # an opaque tensor does not tell its bytes
    return size + (bias_O.nbytes if bias_O is not None else 0)

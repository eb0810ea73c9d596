"""Kernels for quantised matrices: what torch offers for int8, and a plain way that is right everywhere.

Knows nothing of layers or of which kernel is fastest here: `runtime.kernels` tries them and chooses. What torch offers
for int4 stands in `runtime.int4`.

Shapes: T rows of a batch, I input features, O output features, g columns a group. Weights as in `protocol.tiles`:
int8 `[O, I]` with one scale a row; int4 two nibbles a byte, `(nibble - 8) * scale + zero` in groups of g columns.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATION_STEP = float(torch.tensor(2.0) / 255)  # int8 activations: [-1, 1] in 255 steps, in float32
DEQUANTISE_BYTES = 2 << 20  # of weights at a time: stays in the cache between writing and reading
STRIP_VALUES = 1 << 20  # of activations or products at a time: a step has room for few (`protocol.contract`)


class Int8Weight(NamedTuple):
    """`value_OI * scale_O`; scale in float32."""

    value_OI: Tensor
    scale_O: Tensor


class Int4Weight(NamedTuple):
    """Nibbles `[O, I/2]` (even column low), scale and zero `[O, I/g]` in bfloat16."""

    packed: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return 2 * self.packed.shape[1] // self.scale.shape[1]


class QuantisedLinear(Protocol):
    """A quantised matrix `[O, I]`, perhaps with a bias `[O]`; `num_bytes` is the memory it holds."""

    num_bytes: int

    def apply(self, x_TI: Tensor) -> Tensor:
        """Return `x_TI @ weight.T + bias`, shape `[T, O]`, in the dtype of `x_TI`."""
        ...


def dequantise_int8(weight: Int8Weight, rows: slice, dtype: torch.dtype) -> Tensor:
    """Return some rows as floats, `[rows, I]`."""
    return (weight.value_OI[rows].float() * weight.scale_O[rows, None]).to(dtype)


def dequantise_int4(weight: Int4Weight, rows: slice, dtype: torch.dtype) -> Tensor:
    """Return some rows as floats, `[rows, I]`."""
    packed = weight.packed[rows]
    nibble = torch.stack((packed & 15, packed >> 4), dim=-1).view(packed.shape[0], -1, weight.group)
    value = (nibble.float() - 8) * weight.scale[rows, :, None].float() + weight.zero[rows, :, None].float()
    return value.view(packed.shape[0], -1).to(dtype)


class DequantisedLinear:
    """The reference: a strip of rows at a time becomes floats and is multiplied. Right on every device and dtype.

    The weights' rounding is the only error; activations keep their dtype.
    """

    def __init__(self, weight: Int8Weight | Int4Weight, bias_O: Tensor | None) -> None:
        self._weight = weight
        self._bias_O = bias_O
        self._rows = int(weight[0].shape[0])
        cols = int(weight[0].shape[1]) * (2 if isinstance(weight, Int4Weight) else 1)
        self._strip = max(1, DEQUANTISE_BYTES // (4 * cols))
        self.num_bytes = sum_bytes(*weight, bias_O)

    def apply(self, x_TI: Tensor) -> Tensor:
        """Return the product, `[T, O]`."""
        result_TO = torch.empty(x_TI.shape[0], self._rows, dtype=x_TI.dtype, device=x_TI.device)
        for first in range(0, self._rows, self._strip):
            rows = slice(first, min(first + self._strip, self._rows))
            result_TO[:, rows] = functional.linear(x_TI, self._dequantise(rows, x_TI.dtype))
        return result_TO if self._bias_O is None else result_TO.add_(self._bias_O)

    def _dequantise(self, rows: slice, dtype: torch.dtype) -> Tensor:
        if isinstance(self._weight, Int4Weight):
            return dequantise_int4(self._weight, rows, dtype)
        return dequantise_int8(self._weight, rows, dtype)


def quantise_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Return (int8 `[T, I]`, largest magnitude of each row `[T, 1]`): x is about `int8 * ACTIVATION_STEP * magnitude`.

    Each row is first divided by its own largest magnitude, so rows don't disturb each other and a row gives the same
    bits alone and in a batch. |error| <= magnitude / 255 for each input. The rounding is fbgemm's, to the bit: a fused
    multiply-add of 1 / step and the zero point 128 in float32, then to the nearest, ties to even. (Double precision
    holds that product exactly; rounding the sum to float32 once is what a fused multiply-add does.)
    """
    most_T1 = largest_of_rows(x_TI)
    quantised_TI = torch.empty(x_TI.shape, dtype=torch.int8, device=x_TI.device)
    for rows in strips(x_TI.shape[0], x_TI.shape[1]):
        shifted = torch.div(x_TI[rows], most_T1[rows]).double().mul_(1.0 / ACTIVATION_STEP).add_(128.0).float()
        quantised_TI[rows] = shifted.round_().sub_(128.0).clamp_(-128, 127)
    return quantised_TI, most_T1


def largest_of_rows(x_TI: Tensor) -> Tensor:
    """Return the largest magnitude of each row, float32 `[T, 1]`; never zero."""
    low_T, high_T = x_TI.aminmax(dim=1, keepdim=True)
    return torch.maximum(low_T.neg_(), high_T).float().clamp_(min=1e-30)


def strips(count: int, width: int) -> Iterator[slice]:
    """Cut `count` rows of `width` values into strips of about STRIP_VALUES."""
    step = max(1, STRIP_VALUES // max(1, width))
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


class Int8Integer:
    """Integer products of quantised rows and int8 weights as they lie in memory, so a streamed block can use it.

    Activations carry 8 bits (see `quantise_rows`); the sums are exact integers, so the result has the same bits on
    every device, and the same as `Int8Dynamic`.
    """

    def __init__(self, weight: Int8Weight, bias_O: Tensor | None) -> None:
        self._value_OI = weight.value_OI
        self._step_O = weight.scale_O * _step(weight.scale_O.device)
        self._bias_O = bias_O
        self.num_bytes = sum_bytes(*weight, bias_O)

    def apply(self, x_TI: Tensor) -> Tensor:
        """Return the product, `[T, O]`."""
        quantised_TI, most_T1 = quantise_rows(x_TI)
        result_TO = torch.empty(x_TI.shape[0], self._value_OI.shape[0], dtype=x_TI.dtype, device=x_TI.device)
        for rows in strips(result_TO.shape[1], result_TO.shape[0]):
            sums_TR = integer_products(quantised_TI, self._value_OI[rows])
            result_TO[:, rows] = sums_TR.mul_(self._step_O[rows]).mul_(most_T1)
        return result_TO if self._bias_O is None else result_TO.add_(self._bias_O)


def integer_products(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Return the exact sums of products of int8, `[T, O]`, as float32 of the int32 sums."""
    if x_TI.device.type == "cpu":
        return torch._int_mm(x_TI, weight_OI.t()).float()
    # 128 x 127 x 1024 is less than 2^24: partial sums of 1024 inputs are exact in float32 whatever the device.
    sums_TO = torch.zeros(x_TI.shape[0], weight_OI.shape[0], dtype=torch.int32, device=x_TI.device)
    for first in range(0, x_TI.shape[1], 1024):
        columns = slice(first, first + 1024)
        sums_TO += functional.linear(x_TI[:, columns].float(), weight_OI[:, columns].float()).int()
    return sums_TO.float()


class Int8Dynamic:
    """The same arithmetic through fbgemm's prepacked weights: the fastest on x86 at every batch size.

    A sentinel row of +1 and -1 pins the range that fbgemm measures, so its step is ACTIVATION_STEP whatever the batch.
    Only right where the processor adds 8-bit products without saturating (VNNI): `runtime.kernels` compares first.
    """

    def __init__(self, weight: Int8Weight, bias_O: Tensor | None) -> None:
        zeros = torch.zeros(weight.value_OI.shape[0], dtype=torch.long)
        with warnings.catch_warnings():
            # torch announces the end of quantised tensor types (its issue 184982), not of this operator.
            warnings.simplefilter("ignore", UserWarning)
            quantised = torch._make_per_channel_quantized_tensor(weight.value_OI, weight.scale_O.double(), zeros, 0)
            self._packed = torch.ops.quantized.linear_prepack(quantised, None)
        self._bias_O = bias_O
        self._num_outputs = int(weight.value_OI.shape[0])
        self.num_bytes = sum_bytes(*weight, bias_O)

    def apply(self, x_TI: Tensor) -> Tensor:
        """Return the product, `[T, O]`."""
        rows = x_TI.shape[0]
        if rows * self._num_outputs <= STRIP_VALUES:
            return self._products(x_TI)
        result_TO = torch.empty(rows, self._num_outputs, dtype=x_TI.dtype)
        for strip in strips(rows, self._num_outputs):
            result_TO[strip] = self._products(x_TI[strip])
        return result_TO

    def _products(self, x_TI: Tensor) -> Tensor:
        """Return the product of some rows; takes 8 bytes for each of its values."""
        rows = x_TI.shape[0]
        most_T1 = largest_of_rows(x_TI)
        scaled = torch.empty(rows + 1, x_TI.shape[1], dtype=torch.float32)
        torch.div(x_TI, most_T1, out=scaled[:rows])
        scaled[rows].fill_(1.0)[0] = -1.0
        product = torch.ops.quantized.linear_dynamic(scaled, self._packed, False)
        result_TO: Tensor = product[:rows].mul_(most_T1).to(x_TI.dtype)
        return result_TO if self._bias_O is None else result_TO.add_(self._bias_O)


class ByRows:
    """Two kernels over the same memory: one for few rows, one for many."""

    def __init__(self, few: QuantisedLinear, many: QuantisedLinear, *, few_rows: int) -> None:
        self._few = few
        self._many = many
        self._few_rows = few_rows
        self.num_bytes = few.num_bytes

    def apply(self, x_TI: Tensor) -> Tensor:
        """Return the product, `[T, O]`."""
        return (self._few if x_TI.shape[0] <= self._few_rows else self._many).apply(x_TI)


def _step(device: torch.device) -> Tensor:
    return torch.tensor(ACTIVATION_STEP, dtype=torch.float32, device=device)


def sum_bytes(*tensors: Tensor | None) -> int:
    """Return the bytes of those tensors that are there."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return |found - wanted| / |wanted| (Frobenius)."""
    return math.sqrt(
        float((found.double() - wanted.double()).square().sum()) / max(float(wanted.double().square().sum()), 1e-300)
    )

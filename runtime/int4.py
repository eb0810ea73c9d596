"""int4 as torch multiplies it: its own order of nibbles, its product for few rows, and floats made from it for many.

Knows nothing of layers or of which kernel is faster here: `runtime.kernels` tries them and chooses.

Shapes: T rows of a batch, I input features, O output features, g columns a group.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from runtime.quantised import Int4Weight, sum_bytes

PACKED_STRIP = 64
PACK_ROWS = 256  # torch packs int4 in strips of 64 rows (32 without AVX-512); whole strips can be packed one by one
STRIP_WEIGHTS = 1 << 19  # of int4 that become floats at a time, in 7 bytes each
SCRATCH_DTYPES = (torch.int8, torch.float32, torch.bfloat16)


class _Scratch(threading.local):
    """The memory for a strip, one for each thread that computes."""

    num_values = 0
    tensors: tuple[Tensor, ...] = ()


_own = _Scratch()


class Int4Packed:
    """torch's int4 product on its own packing, for few rows; activations and result in bfloat16.

    `packed` is `pack_int4` of the nibbles: a plain tensor, so a streamed block can hold it.
    """

    def __init__(self, packed: Tensor, scales_and_zeros: Tensor, group: int, bias_O: Tensor | None) -> None:
        self._packed = packed
        self._scales_and_zeros = scales_and_zeros
        self._group = group
        self._bias_O = bias_O
        self.num_bytes = sum_bytes(packed, scales_and_zeros, bias_O)

    def apply(self, x_TI: Tensor) -> Tensor:
        """Return the product, `[T, O]`."""
        result_TO: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_TI.to(torch.bfloat16), self._packed, self._group, self._scales_and_zeros
        ).to(x_TI.dtype)
        return result_TO if self._bias_O is None else result_TO.add_(self._bias_O)


class Int4Unpacked:
    """The same packed nibbles for many rows: a strip at a time becomes floats and is multiplied."""

    def __init__(self, packed: Tensor, scales_and_zeros: Tensor, group: int, bias_O: Tensor | None) -> None:
        self._packed = packed
        self._scales_and_zeros = scales_and_zeros
        self._group = group
        self._bias_O = bias_O
        inputs = 2 * packed.shape[1]
        self._strip = max(PACKED_STRIP, min(PACK_ROWS, STRIP_WEIGHTS // inputs // PACKED_STRIP * PACKED_STRIP))
        self.num_bytes = sum_bytes(packed, scales_and_zeros, bias_O)

    def apply(self, x_TI: Tensor) -> Tensor:
        """Return the product, `[T, O]`."""
        rows = self._packed.shape[0]
        result_TO = torch.empty(x_TI.shape[0], rows, dtype=x_TI.dtype)
        for first in range(0, rows, self._strip):
            strip = slice(first, min(first + self._strip, rows))
            result_TO[:, strip] = x_TI @ self._floats(strip, x_TI.dtype)
        return result_TO if self._bias_O is None else result_TO.add_(self._bias_O)

    def _floats(self, strip: slice, dtype: torch.dtype) -> Tensor:
        """Return some rows as floats, transposed: `[I, rows]`; valid until the next call."""
        packed = self._packed[strip]
        rows, inputs = packed.shape[0], 2 * packed.shape[1]
        shape = (inputs // self._group, self._group, rows)
        value, weight, rounded = _scratch(rows * inputs)
        if rows % PACKED_STRIP:
            value.view(inputs, rows).copy_(unpack_int4(packed))
        else:
            _unpack_strips(packed, value)
        weight.copy_(value.sub_(8))
        scale = self._scales_and_zeros[:, None, strip, 0].float()
        zero = self._scales_and_zeros[:, None, strip, 1].float()
        torch.addcmul(zero, weight.view(shape), scale, out=weight.view(shape))
        if dtype is torch.float32:
            return weight.view(inputs, rows)
        if dtype is torch.bfloat16:
            return rounded.copy_(weight).view(inputs, rows)
        return weight.view(inputs, rows).to(dtype)


def can_pack_int4(rows: int, cols: int, group: int) -> bool:
    """Say whether torch's int4 product takes this shape."""
    return rows % 16 == 0 and group in (32, 64, 128, 256) and cols % group == 0


def pack_int4(weight: Int4Weight) -> tuple[Tensor, Tensor]:
    """Return (packed `[O, I/2]`, scales and zeros `[I/g, O, 2]`) for `Int4Packed`."""
    packed = torch.empty_like(weight.packed)
    for first in range(0, packed.shape[0], PACK_ROWS):
        strip = weight.packed[first : first + PACK_ROWS]
        nibble = torch.stack((strip & 15, strip >> 4), dim=-1).view(strip.shape[0], -1)
        packed[first : first + PACK_ROWS] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibble.int(), 1)
    return packed, torch.stack((weight.scale, weight.zero), dim=-1).transpose(0, 1).contiguous()


def unpack_int4(packed: Tensor) -> Tensor:
    """Return the nibbles of whole strips that `pack_int4` packed, transposed: uint8 `[I, O]`.

    torch's layout (ATen/native/cpu/int4mm_kernel.cpp), which `runtime.kernels` proves before it is relied on: for each
    64 rows and each column 32 bytes, the low halves rows 0 to 31, the high halves rows 32 to 63; in a shorter last
    strip neighbouring rows share a byte.
    """
    rows, half = packed.shape
    full = rows // PACKED_STRIP * PACKED_STRIP
    body = packed[:full].reshape(-1, 2 * half, PACKED_STRIP // 2)
    pieces = [torch.cat((body & 15, body >> 4), dim=-1).permute(1, 0, 2).reshape(2 * half, full)]
    if full < rows:
        tail = packed[full:].reshape(2 * half, (rows - full) // 2)
        pieces.append(torch.stack((tail & 15, tail >> 4), dim=-1).view(2 * half, rows - full))
    return torch.cat(pieces, dim=1)


def _unpack_strips(packed: Tensor, value: Tensor) -> None:
    """Write what `unpack_int4` returns for whole strips into `value`, int8 of `[I * O]`.

    Two bytes at a time: torch has no fast `&` of single bytes, and no pass here touches memory beyond the cache.
    """
    strips, inputs = packed.shape[0] // PACKED_STRIP, 2 * packed.shape[1]
    pairs = packed.view(torch.int16).view(strips, inputs, PACKED_STRIP // 4)
    halves = value.view(torch.int16).view(inputs, strips, 2, PACKED_STRIP // 4)
    halves[:, :, 0] = (pairs & 0x0F0F).transpose(0, 1)
    halves[:, :, 1] = (pairs >> 4).bitwise_and_(0x0F0F).transpose(0, 1)


def _scratch(num_values: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory of this thread for a strip, as int8, float32 and bfloat16: fresh pages cost more than math."""
    if _own.num_values < num_values:
        _own.num_values = num_values
        with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
            _own.tensors = tuple(torch.empty(num_values, dtype=dtype) for dtype in SCRATCH_DTYPES)
    value, weight, rounded = (tensor[:num_values] for tensor in _own.tensors)
    return value, weight, rounded

"""The arithmetic of a star: add the members' parts in a fixed order, and carry hidden states as bytes.

Knows nothing of sockets or of who the members are. A fixed order and one broadcast result keep all members
bit-identical.

What is small enough to be added again and again, between two sums of a decoding step, is added in numpy and in memory
that stays (`Room`, `Adder`): an operation of torch on a few KiB takes ten times as long there. The same additions in
the same order give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from protocol.errors import FrameMalformed, StepFailed
from protocol.specs import ActivationFormat
from runtime.tensors import as_bytes, as_tensor, dtype_of

ALIGNMENT: Final = 64  # of the tensors that torch makes; kernels may add in another order elsewhere
_F32, _U16 = np.dtype(np.float32), np.dtype(np.uint16)


@torch.inference_mode()
def sum_partials(parts: Sequence[Tensor | None], activations: ActivationFormat) -> Tensor:
    """Add the parts in rank order in fp32 and cast once at the end; None is a member without a part.

    The parts are left as they are. Raises StepFailed when there is none, or their shapes differ.
    """
    present = [part for part in parts if part is not None]
    if not present:
        raise StepFailed(f"none of {len(parts)} members holds a part of this sum")
    if any(part.shape != present[0].shape for part in present):
        raise StepFailed(f"parts of one sum have shapes {[list(part.shape) for part in present]}")
    if len(present) == 1:
        return present[0].to(dtype_of(activations))
    total = torch.add(present[0].float(), present[1])
    for part in present[2:]:
        total += part
    return total.to(dtype_of(activations))


class Room:
    """Where a member's part and the sum of one shape lie, one operation after the other: as tensors and as bytes."""

    def __init__(
        self, num_rows: int, hidden: int, wire: ActivationFormat, before_part: int = 0, before_total: int = 0
    ) -> None:
        """`before_part`, `before_total`: bytes for the headers in front of both, in `part_frame` and `total_frame`."""
        self.part_frame, self.part, self.part_TD = _lay_out(num_rows, hidden, wire, before_part)
        self.total_frame, self.total, self.total_TD = _lay_out(num_rows, hidden, wire, before_total)


class Adder:
    """Adds parts into a hub's room: each is laid in its row first, as it comes.

    bf16 is widened to fp32 by its bits, in numpy too; only the rounding of the sum is left to torch.
    """

    def __init__(self, room: Room, num_parts: int) -> None:
        """Take memory for at least one part."""
        self._room = room
        num_values = room.part_TD.numel()
        self._is_wide = room.part_TD.dtype is torch.float32
        parts = np.zeros((num_parts, num_values), _F32 if self._is_wide else _U16)
        self.rows = tuple(part.data.cast("B") for part in parts)
        """Where the parts are laid, in the order in which they are added."""
        if self._is_wide:
            self._sum = np.frombuffer(room.total, _F32)
            self._values = tuple(parts)
        else:
            self._sum = np.zeros(num_values, _F32)
            self._sum_TD = torch.from_numpy(self._sum).view(room.total_TD.shape)
            wide = np.zeros((num_parts, num_values), _F32)
            self._values = tuple(wide)
            self._parts, self._upper_halves = parts, wide.view(_U16)[:, 1::2]  # little-endian

    def add(self) -> None:
        """Let the room's total be what `sum_partials` makes of the parts in the rows."""
        total, values = self._sum, self._values
        if not self._is_wide:
            self._upper_halves[:] = self._parts
        if len(values) == 1:
            total[:] = values[0]
        else:
            np.add(values[0], values[1], total)
            for part in values[2:]:
                np.add(total, part, total)
        if not self._is_wide:
            self._room.total_TD.copy_(self._sum_TD)


def _lay_out(num_rows: int, hidden: int, wire: ActivationFormat, before: int) -> tuple[memoryview, memoryview, Tensor]:
    """Return memory for a header and values: both together, the values as bytes, and as a tensor aligned as torch's."""
    num_bytes = before + num_rows * hidden * dtype_of(wire).itemsize
    raw = np.zeros(num_bytes + ALIGNMENT, np.uint8)
    skip = -(raw.ctypes.data + before) % ALIGNMENT
    octets = raw[skip : skip + num_bytes]
    values_TD = torch.from_numpy(octets[before:]).view(dtype_of(wire)).view(num_rows, hidden)
    return octets.data, octets.data[before:], values_TD


def add_parts(parts: Sequence[memoryview], wire: ActivationFormat, shape: tuple[int, int]) -> memoryview:
    """Return the bytes of `sum_partials` in the wire's format; every part must have the length of the shape.

    Raises StepFailed when there is none.
    """
    return to_wire(sum_partials([from_wire(part, wire, shape) for part in parts], wire), wire)


def to_wire(tensor: Tensor, activations: ActivationFormat) -> memoryview:
    """Return the values, row-major, in the wire's format; shares memory when no cast, move or reorder is needed."""
    if activations is ActivationFormat.FLOAT32 and tensor.dtype is torch.float32:
        return as_bytes(tensor)
    return as_bytes(tensor.to(dtype_of(activations)))


def from_wire(buffer: memoryview | bytes, activations: ActivationFormat, shape: tuple[int, ...]) -> Tensor:
    """View a frame as a tensor that must not be written to; raises FrameMalformed when its length is wrong."""
    try:
        return as_tensor(buffer, dtype_of(activations), shape)
    except ValueError as error:
        raise FrameMalformed(f"tensor frame: {error}") from error

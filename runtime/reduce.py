"""The arithmetic of a star: add the members' parts in a fixed order, and carry hidden states as bytes.

Knows nothing of sockets or of who the members are. A fixed order and one broadcast result keep all members
bit-identical.

fp32 is added in numpy, straight from the frames: the same additions in the same order give the same bits, and of the
few KiB of a decoding step an operation in torch takes ten times as long as in numpy, again between any two sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from protocol.errors import FrameMalformed, StepFailed
from protocol.specs import ActivationFormat
from runtime.tensors import as_bytes, as_tensor, dtype_of

_F32 = np.dtype(np.float32)
_Values = np.ndarray[tuple[int, int], np.dtype[np.float32]]


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


class Total:
    """Where fp32 sums of one shape lie, one after the other: the same memory as a tensor, as numbers and as bytes."""

    __slots__ = ("octets", "total_TD", "values_TD")

    def __init__(self, num_rows: int, hidden: int) -> None:
        self.values_TD: _Values = np.empty((num_rows, hidden), _F32)
        self.total_TD = torch.from_numpy(self.values_TD)
        self.octets = self.values_TD.data.cast("B")


def add_parts(
    parts: Sequence[memoryview], wire: ActivationFormat, shape: tuple[int, int], into: Total | None = None
) -> memoryview:
    """Return the bytes of `sum_partials` in the wire's format; the parts are only read, and are added as given.

    `into`: where an fp32 sum is to lie, with its bytes. Every part must have the length of the shape. Raises StepFailed
    when there is none.
    """
    if wire is not ActivationFormat.FLOAT32 or len(parts) < 2:
        payload = to_wire(sum_partials([from_wire(part, wire, shape) for part in parts], wire), wire)
        if into is None:
            return payload
        into.octets[:] = payload
        return into.octets
    values: list[_Values] = [np.ndarray(shape, _F32, part) for part in parts]
    total: _Values = np.add(values[0], values[1], into.values_TD if into is not None else None)
    for part in values[2:]:
        np.add(total, part, total)
    return into.octets if into is not None else total.data.cast("B")


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

"""Turns bytes into torch tensors and back, sharing memory where that is possible.

Knows nothing of models: it is told a dtype's name and a shape. A tensor made here must not be written to, for its
memory may belong to a frame or to a mapped file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protocol.errors import CheckpointInvalid, ModelUnsupported
from protocol.specs import ActivationFormat, ModelSpec
from protocol.tiles import TileId, tile_bytes, tile_parts

TileSource = Callable[[TileId], memoryview]
"""Returns a tile's bytes; the view needs to live only until the next call."""

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}
_F32 = np.dtype(np.float32)


class _Memory:
    """Presents a buffer to numpy as writable, so that torch takes it without a copy and without a warning."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, flat: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self.owner = flat  # numpy keeps this object, this object keeps the buffer
        self.__array_interface__ = {
            "version": 3,
            "shape": flat.shape,
            "typestr": "|u1",
            "data": (flat.__array_interface__["data"][0], False),
        }


def dtype_named(name: str) -> torch.dtype:
    """Return the torch dtype of a name in `protocol.tiles`; raises ModelUnsupported for another name."""
    try:
        return DTYPES[name]
    except KeyError:
        raise ModelUnsupported(f"dtype {name!r:.40} is not one of {', '.join(DTYPES)}") from None


def dtype_of(activations: ActivationFormat) -> torch.dtype:
    """Return the torch dtype of hidden states."""
    return DTYPES[activations.value]


def as_tensor(buffer: memoryview | bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """View a C-contiguous buffer as a CPU tensor; copies only when the buffer is not aligned to its items.

    Raises ValueError when the length is not that of the shape.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    view = memoryview(buffer)
    if dtype is torch.float32 and num_bytes == view.nbytes > 0 and not view.readonly:
        values: np.ndarray[Any, np.dtype[np.float32]] = np.ndarray(shape, _F32, view)
        return torch.from_numpy(values if values.flags.aligned else values.copy())
    flat = np.frombuffer(buffer, dtype=np.uint8)
    if flat.size != num_bytes:
        raise ValueError(
            f"{flat.size} bytes are not the {num_bytes} of {list(shape)} {str(dtype).removeprefix('torch.')}"
        )
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    if flat.ctypes.data % dtype.itemsize:
        flat = flat.copy()
    return torch.from_numpy(np.asarray(_Memory(flat))).view(dtype).view(shape)


def as_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's values, row-major, as flat bytes; shares memory with a contiguous CPU tensor."""
    if tensor.dtype is torch.float32:  # every sum of a step comes by here, so it is tried before anything is asked
        try:
            return tensor.numpy().data.cast("B")
        except (TypeError, RuntimeError):  # on another device, not contiguous, empty, or with a gradient
            pass
    if not tensor.numel():
        return memoryview(b"")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    octets: np.ndarray[Any, np.dtype[np.uint8]] = flat.view(torch.uint8).numpy()
    return octets.data


def tile_tensors(spec: ModelSpec, tile: TileId, buffer: memoryview | bytes) -> dict[str, Tensor]:
    """View the parts of a tile by name, `[rows, cols]` or `[rows]`; raises CheckpointInvalid for a wrong length."""
    view = memoryview(buffer).cast("B")
    if len(view) != tile_bytes(spec, tile):
        raise CheckpointInvalid(f"{tile} has {len(view)} bytes instead of {tile_bytes(spec, tile)}")
    return {
        part.name: as_tensor(
            view[part.offset : part.offset + part.num_bytes],
            dtype_named(part.dtype),
            (part.rows, part.cols) if part.cols else (part.rows,),
        )
        for part in tile_parts(spec, tile)
    }

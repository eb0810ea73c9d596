"""Reads and proves the header of a safetensors file: which tensor lies where.

Knows nothing of models. The format: 8 bytes little-endian length of a JSON object, the object, then the tensors' bytes
without a hole (github.com/huggingface/safetensors, README "Format"). Every promise of the header is checked before use.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from coordinator.json_file import parse_json_object
from protocol.errors import CheckpointInvalid

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 32

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip


class StoredTensor(NamedTuple):
    """One tensor of one file: `offset` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def header_length(prefix: bytes, file_bytes: int, where: str) -> int:
    """Return the length of the JSON that follows the first 8 bytes; `file_bytes` is the whole file's size."""
    if len(prefix) < LENGTH_BYTES:
        raise CheckpointInvalid(f"{where} is truncated: {file_bytes} bytes hold no safetensors header")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise CheckpointInvalid(f"{where} is no safetensors file: a header of {length} bytes")
    if LENGTH_BYTES + length > file_bytes:
        raise CheckpointInvalid(f"{where} is truncated: its header ends at {LENGTH_BYTES + length}, it at {file_bytes}")
    return length


def parse_header(header: bytes, file_bytes: int, where: str) -> dict[str, StoredTensor]:
    """Return the tensors by name; raises CheckpointInvalid unless they fill the rest of the file exactly."""
    if not header.startswith(b"{"):
        raise CheckpointInvalid(f"{where} is no safetensors file: its header doesn't start with an object")
    values = parse_json_object(header, f"the header of {where}")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointInvalid(f"{where}: __metadata__ is not an object of strings")
    base = LENGTH_BYTES + len(header)
    tensors = {name: _stored(entry, base, f"{where}, tensor {name!r:.200}") for name, entry in values.items()}
    position = base
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.offset != position:
            raise CheckpointInvalid(f"{where}, tensor {name!r:.200} starts at {tensor.offset}, expected {position}")
        position += tensor.num_bytes
    if position != file_bytes:
        what = "is truncated" if position > file_bytes else "has bytes of no tensor"
        raise CheckpointInvalid(f"{where} {what}: its header promises {position} bytes, it has {file_bytes}")
    return tensors


def _stored(entry: Any, base: int, where: str) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointInvalid(f"{where}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointInvalid(f"{where}: {dtype!r:.40} is no dtype of safetensors")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointInvalid(f"{where}: {shape!r:.80} is no shape")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointInvalid(f"{where}: {offsets!r:.80} are no offsets")
    num_bytes = offsets[1] - offsets[0]
    if math.prod(shape) * DTYPE_BITS[dtype] != num_bytes * 8:
        raise CheckpointInvalid(f"{where}: shape {shape!r:.80} of {dtype} doesn't take {num_bytes} bytes")
    return StoredTensor(dtype, tuple(shape), base + offsets[0], num_bytes)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**53 for value in values)

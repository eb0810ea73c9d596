"""Reads rows and columns of a safetensors checkpoint, one file or sharded, without holding it in memory.

Knows nothing of tiles' bytes or torch. Plain positioned reads into own buffers: no mapping counts as resident, and a
file that shrinks is an error instead of a SIGBUS.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from coordinator.json_file import read_json_object
from coordinator.number_formats import RESULT_AS, STORED_AS, Array, FloatName, convert_into, is_exact_copy
from coordinator.safetensors_header import LENGTH_BYTES, StoredTensor, header_length, parse_header
from protocol.errors import CheckpointInvalid, ModelUnsupported
from protocol.specs import ModelSpec, Span, WeightFormat
from protocol.tiles import all_tiles, tile_parts, tile_slices

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PREFIX = "model."

GATHER_BYTES = 4 << 20  # rows read at once when only some of their columns are wanted


class FileMark(NamedTuple):
    """What tells one state of a file from another: part of a checkpoint's fingerprint."""

    name: str
    num_bytes: int
    mtime_ns: int


class _File:
    """One open safetensors file that must not change while it is served."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointInvalid(f"can't open {path}: {error.strerror or error}") from error
        try:
            self.mark = self._current_mark()
            size = self.mark.num_bytes
            prefix = bytearray(min(LENGTH_BYTES, size))
            self.read_into(memoryview(prefix), 0)
            header = bytearray(header_length(bytes(prefix), size, str(path)))
            self.read_into(memoryview(header), LENGTH_BYTES)
            self.tensors = parse_header(bytes(header), size, str(path))
        except BaseException:
            os.close(self.descriptor)
            raise

    def _current_mark(self) -> FileMark:
        status = os.fstat(self.descriptor)
        return FileMark(self.path.name, status.st_size, status.st_mtime_ns)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` on; safe from several threads at once."""
        position = 0
        while position < len(buffer):
            try:
                count = os.preadv(self.descriptor, [buffer[position:]], offset + position)
            except OSError as error:
                raise CheckpointInvalid(f"can't read {self.path}: {error.strerror or error}") from error
            if count == 0:
                raise CheckpointInvalid(f"{self.path} is truncated: no bytes at {offset + position}")
            position += count

    def require_unchanged(self) -> None:
        """Raise CheckpointInvalid when size or modification time differ from those at opening."""
        if self._current_mark() != self.mark:
            raise CheckpointInvalid(
                f"{self.path} was altered while it was served",
                remedy="put the model's files back, or start the coordinator again to serve the new ones",
            )

    def close(self) -> None:
        os.close(self.descriptor)


class Checkpoint:
    """All tensors of a model folder. Close it, or use it as a context manager; reads are safe from several threads."""

    def __init__(self, folder: Path, files: list[_File], tensors: dict[str, tuple[_File, StoredTensor]]) -> None:
        self.folder = folder
        self._files = files
        self._tensors = tensors

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open the files of `folder` and prove their headers; raises CheckpointInvalid naming the file."""
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        if not single.exists() and not index.exists():
            raise CheckpointInvalid(
                f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}",
                remedy="give a model folder with safetensors weights; convert pickled ones first",
            )
        weight_map = None if single.exists() else _read_weight_map(index)
        names = [SINGLE_FILE] if weight_map is None else sorted(set(weight_map.values()))
        files: dict[str, _File] = {}
        try:
            for name in names:
                files[name] = _File(folder / name)
            if weight_map is None:
                weight_map = dict.fromkeys(files[SINGLE_FILE].tensors, SINGLE_FILE)
            tensors = {}
            for tensor, name in weight_map.items():
                if tensor not in files[name].tensors:
                    raise CheckpointInvalid(f"{folder / name} lacks the tensor {tensor!r:.200} that {index} promises")
                tensors[tensor] = (files[name], files[name].tensors[tensor])
        except BaseException:
            for file in files.values():
                file.close()
            raise
        return cls(folder, list(files.values()), tensors)

    def close(self) -> None:
        """Close the files; a second call does nothing, a read after it raises CheckpointInvalid."""
        files, self._files, self._tensors = self._files, [], {}
        for file in files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def names(self) -> list[str]:
        """Names of all tensors, as in the files."""
        return list(self._tensors)

    def fingerprint(self) -> tuple[FileMark, ...]:
        """Names, sizes and modification times of the weight files, sorted by name."""
        return tuple(sorted(file.mark for file in self._files))

    def require_unchanged(self) -> None:
        """Raise CheckpointInvalid naming the first file that was altered since `open`."""
        for file in self._files:
            file.require_unchanged()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; raises CheckpointInvalid when there is none of this name."""
        return self._find(name)[1].shape

    def _find(self, name: str) -> tuple[_File, StoredTensor]:
        """Look up a tensor, with or without the leading `model.` that bare decoders lack."""
        found = self._tensors.get(name) or self._tensors.get(name.removeprefix(PREFIX))
        if found is None:
            raise CheckpointInvalid(f"{self.folder} has no tensor {name!r:.200}")
        return found

    def read(
        self, name: str, rows: Span | None = None, cols: Span | None = None, dtype: FloatName = "float32"
    ) -> Array:
        """Return a tensor's rows and columns (None: all) as "float32", or "bfloat16" as uint16 bit patterns.

        Shape `[rows, cols]`, or `[rows]` of a one-dimensional tensor; the caller owns the array. Rows are one read;
        columns are gathered from whole rows, a few MiB at a time. Raises CheckpointInvalid for a missing tensor, a span
        outside it, and a truncated or altered file; ModelUnsupported for a tensor that holds no F32, BF16 or F16.
        """
        file, stored = self._find(name)
        where = f"{file.path}, tensor {name!r}"
        if stored.dtype not in STORED_AS:
            raise ModelUnsupported(f"{where} holds {stored.dtype}, none of {', '.join(STORED_AS)}")
        if len(stored.shape) not in (1, 2) or (cols is not None and len(stored.shape) == 1):
            raise CheckpointInvalid(f"{where} has the shape {stored.shape}, expected a vector or a matrix")
        whole = Span(0, stored.shape[1] if len(stored.shape) == 2 else 1)
        rows = Span(0, stored.shape[0]) if rows is None else rows
        cols = whole if cols is None else cols
        if rows.end > stored.shape[0] or cols.end > whole.end:
            raise CheckpointInvalid(f"{where} has the shape {stored.shape}, but rows {rows}, columns {cols} were asked")
        result = np.empty((len(rows), len(cols)), RESULT_AS[dtype])
        if cols == whole and is_exact_copy(stored.dtype, dtype):
            row_bytes = whole.end * result.itemsize
            file.read_into(_bytes_of(result), stored.offset + rows.start * row_bytes)
        else:
            _gather(file, stored, rows, cols, result)
        file.require_unchanged()
        return result.reshape(-1) if len(stored.shape) == 1 else result

    def verify(self, spec: ModelSpec) -> None:
        """Raise CheckpointInvalid unless every tensor that the tiles of `spec` come from is there, in its shape."""
        for name, expected in expected_shapes(spec).items():
            file, stored = self._find(name)
            if stored.shape != expected:
                raise CheckpointInvalid(
                    f"{file.path}: tensor {name!r} has the shape {stored.shape}, config.json asks for {expected}"
                )
            if stored.dtype not in STORED_AS:
                raise ModelUnsupported(
                    f"{file.path}: tensor {name!r} holds {stored.dtype}: {', '.join(STORED_AS)} only"
                )


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The tensors that the tiles of `spec` come from, with their whole shapes."""
    plain = replace(spec, weights=WeightFormat.FLOAT32)  # parts then have the checkpoint's own rows and columns
    shapes: dict[str, tuple[int, ...]] = {}
    for tile in all_tiles(plain):
        parts = {part.name: part for part in tile_parts(plain, tile)}
        for piece in tile_slices(plain, tile):
            part = parts[piece.part]
            rows = piece.rows.end if piece.rows is not None else part.rows
            cols = piece.cols.end if piece.cols is not None else part.cols
            seen = shapes.get(piece.tensor, (0, 0))
            shapes[piece.tensor] = (max(rows, seen[0]),) if cols == 0 else (max(rows, seen[0]), max(cols, seen[-1]))
    return shapes


def _gather(file: _File, stored: StoredTensor, rows: Span, cols: Span, result: Array) -> None:
    """Fill `result` [rows, cols] from whole rows, `GATHER_BYTES` of them at a time."""
    source, target = STORED_AS[stored.dtype], "float32" if result.dtype == RESULT_AS["float32"] else "bfloat16"
    num_cols = stored.shape[1] if len(stored.shape) == 2 else 1
    row_bytes = num_cols * source.itemsize
    step = max(1, GATHER_BYTES // max(row_bytes, 1))
    buffer = np.empty((min(step, len(rows)), num_cols), source)
    for start in range(rows.start, rows.end, step):
        values = buffer[: min(step, rows.end - start)]
        file.read_into(_bytes_of(values), stored.offset + start * row_bytes)
        at = start - rows.start
        convert_into(result[at : at + len(values)], target, values[:, cols.start : cols.end], stored.dtype)


def _bytes_of(values: Array) -> memoryview:
    return memoryview(values.reshape(-1).view(np.uint8).data)


def _read_weight_map(index: Path) -> dict[str, str]:
    """Return tensor name -> file name of a sharded checkpoint; the files must lie beside the index."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointInvalid(f"{index} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or "/" in name or "\\" in name:
            raise CheckpointInvalid(f"{index}: {name!r:.200} of {tensor!r:.200} is no safetensors file in this folder")
    return weight_map

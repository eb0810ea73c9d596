"""Cuts one tile's bytes out of a checkpoint, laid out as `protocol.tiles` says.

Knows nothing of hashes, caches or sockets.
"""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np

from coordinator.number_formats import RESULT_AS, Array, FloatName
from protocol.errors import InvariantBroken, ModelUnsupported
from protocol.specs import ActivationFormat, ModelSpec, Span, WeightFormat
from protocol.tiles import Part, Slice, TileId, tile_parts, tile_slices

# Parts held in the spec's weight format; all others (norms, biases, vocabulary rows) follow the activations.
MATRICES = frozenset({"q", "k", "v", "o", "gate", "up", "down"})


class MatrixSource(Protocol):
    """Where tensors are read from: a `Checkpoint`, or something in front of one."""

    def read(self, name: str, rows: Span | None, cols: Span | None, dtype: FloatName) -> Array:
        """Return `[rows, cols]` of a tensor, as `Checkpoint.read` does."""


class WholeMatrices:
    """Reads a matrix once, whole, when columns of it are wanted, and cuts the columns of every tile from that copy.

    Lives as long as the tiles of one block of one layer are cut; holds o_proj or down_proj of that layer. Thread-safe.
    """

    def __init__(self, source: MatrixSource) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._matrices: dict[tuple[str, FloatName], Array] = {}

    def read(self, name: str, rows: Span | None, cols: Span | None, dtype: FloatName) -> Array:
        """Return `[rows, cols]`; with columns a view on the copy, which the caller must not write."""
        if cols is None:
            return self._source.read(name, rows, None, dtype)
        with self._lock:
            matrix = self._matrices.get((name, dtype))
            if matrix is None:
                matrix = self._matrices[name, dtype] = self._source.read(name, None, None, dtype)
        chosen = matrix if rows is None else matrix[rows.start : rows.end]
        return chosen[:, cols.start : cols.end]


def cut_tile(spec: ModelSpec, tile: TileId, source: MatrixSource) -> bytearray:
    """Return the bytes of one tile; raises what `source` raises, and ModelUnsupported for a format not cut yet."""
    parts = {part.name: part for part in tile_parts(spec, tile)}
    last = max(parts.values(), key=lambda part: part.offset)
    data = bytearray(last.offset + last.num_bytes)
    plain: FloatName = "float32" if spec.activations is ActivationFormat.FLOAT32 else "bfloat16"
    for piece in tile_slices(spec, tile):
        if piece.part in MATRICES:
            arrays = cut_matrix(source, spec.weights, piece)
        else:
            arrays = {piece.part: source.read(piece.tensor, piece.rows, piece.cols, plain)}
        for name, array in arrays.items():
            _place(data, parts[name], array, f"{tile}, part {name}")
    return data


def cut_matrix(source: MatrixSource, weights: WeightFormat, piece: Slice) -> dict[str, Array]:
    """Return the parts of one weight matrix by name: alone, or with its scales in a quantised format.

    A quantised format needs whole rows of the checkpoint for its scales; `source` gives those with `cols` None.
    """
    require_cuttable(weights)
    dtype: FloatName = "float32" if weights is WeightFormat.FLOAT32 else "bfloat16"
    return {piece.part: source.read(piece.tensor, piece.rows, piece.cols, dtype)}


def require_cuttable(weights: WeightFormat) -> None:
    """Raise ModelUnsupported for a weight format that can't be cut yet."""
    if weights not in (WeightFormat.FLOAT32, WeightFormat.BFLOAT16):
        raise ModelUnsupported(
            f"weights in {weights} come in a later version",
            remedy="use --dtype float32 or --dtype bfloat16",
        )


def _place(data: bytearray, part: Part, array: Array, where: str) -> None:
    """Copy `array`, which may be strided, to its place in the tile."""
    shape = (part.rows, part.cols) if part.cols else (part.rows,)
    if array.shape != shape or array.itemsize * array.size != part.num_bytes:
        raise InvariantBroken(f"{where}: cut as {array.shape} of {array.dtype}, laid out as {shape} of {part.dtype}")
    dtype = RESULT_AS.get(part.dtype, array.dtype)
    np.frombuffer(data, dtype, array.size, part.offset).reshape(shape)[...] = array

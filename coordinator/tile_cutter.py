"""Cuts one tile's bytes out of a checkpoint, laid out as `protocol.tiles` says.

Knows nothing of hashes, caches or sockets.
"""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np

from coordinator.number_formats import RESULT_AS, Array, FloatName
from coordinator.quantise import int8_scales, quantise_int4, quantise_int8
from protocol.errors import InvariantBroken
from protocol.specs import INT4_GROUP, ActivationFormat, ModelSpec, Span, WeightFormat
from protocol.tiles import Part, Slice, TileId, tile_parts, tile_slices, vocab_format

# Parts held in the spec's weight format; norms and biases follow the activations.
MATRICES = frozenset({"q", "k", "v", "o", "gate", "up", "down", "rows"})


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
        with self._lock:
            matrix = self._matrices.get((name, dtype))
            if matrix is None and cols is None:
                return self._source.read(name, rows, None, dtype)
            if matrix is None:
                matrix = self._matrices[name, dtype] = self._source.read(name, None, None, dtype)
        chosen = matrix if rows is None else matrix[rows.start : rows.end]
        return chosen if cols is None else chosen[:, cols.start : cols.end]


def cut_tile(spec: ModelSpec, tile: TileId, source: MatrixSource) -> bytearray:
    """Return the bytes of one tile; raises what `source` raises."""
    parts = {part.name: part for part in tile_parts(spec, tile)}
    last = max(parts.values(), key=lambda part: part.offset)
    data = bytearray(last.offset + last.num_bytes)
    plain: FloatName = "float32" if spec.activations is ActivationFormat.FLOAT32 else "bfloat16"
    for piece in tile_slices(spec, tile):
        if piece.part in MATRICES:
            weights = vocab_format(spec.weights) if piece.part == "rows" else spec.weights
            arrays = cut_matrix(source, weights, piece)
        else:
            arrays = {piece.part: source.read(piece.tensor, piece.rows, piece.cols, plain)}
        for name, array in arrays.items():
            _place(data, parts[name], array, f"{tile}, part {name}")
    return data


def cut_matrix(source: MatrixSource, weights: WeightFormat, piece: Slice) -> dict[str, Array]:
    """Return the parts of one weight matrix by name: alone, or with its scales in a quantised format."""
    name = piece.part
    if weights is WeightFormat.INT8:
        values = source.read(piece.tensor, piece.rows, piece.cols, "float32")
        # The scale is that of the whole row of the checkpoint, however few of its columns this tile holds.
        whole = values if piece.cols is None else source.read(piece.tensor, piece.rows, None, "float32")
        int8 = quantise_int8(values, int8_scales(whole))
        return {name: int8.value_OI, f"{name}.scale": int8.scale_O}
    if weights is WeightFormat.INT4:
        int4 = quantise_int4(source.read(piece.tensor, piece.rows, piece.cols, "float32"), INT4_GROUP)
        return {name: int4.packed, f"{name}.scale": int4.scale, f"{name}.zero": int4.zero}
    dtype: FloatName = "float32" if weights is WeightFormat.FLOAT32 else "bfloat16"
    return {name: source.read(piece.tensor, piece.rows, piece.cols, dtype)}


def _place(data: bytearray, part: Part, array: Array, where: str) -> None:
    """Copy `array`, which may be strided, to its place in the tile."""
    shape = (part.rows, part.cols) if part.cols else (part.rows,)
    if array.shape != shape or array.itemsize * array.size != part.num_bytes:
        raise InvariantBroken(f"{where}: cut as {array.shape} of {array.dtype}, laid out as {shape} of {part.dtype}")
    dtype = RESULT_AS.get(part.dtype, array.dtype)
    np.frombuffer(data, dtype, array.size, part.offset).reshape(shape)[...] = array

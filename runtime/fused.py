"""How a block lies in memory and on disk: which fused matrices it has, and how tiles are copied into them.

Knows nothing of kernels and nothing of files. The layout depends on the spec, the share and the
operation alone, so a block that was written once can be read straight into a slot.

Shapes: D hidden, G KV-head groups held, w their query width in columns, d head_dim, F FFN columns held.

    attention   qkv [G w + 2 G d, D]: all query rows, all key rows, all value rows;  o [D, G w]
    FFN         gate_up [2 F, D]: the gate rows, the up rows;                         down [D, F]
    lm_head     rows [V, D]: the vocabulary rows of a few tiles
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from protocol.specs import INT4_GROUP, ModelSpec, Span, WeightFormat
from protocol.tiles import HEAD_LAYER, Layout, Part, TileId, TileKind, ffn_span, lm_head_span, vocab_format
from runtime.shares import StageShare, holds_nothing, vocab_tiles
from runtime.tensors import TileSource, as_tensor, dtype_named, tile_tensors

Tensors = dict[str, Tensor]


class Piece(NamedTuple):
    """Where a tile's matrix goes: the fused matrix, its first row, its first column."""

    name: str
    fused: str
    row: int
    col: int


def block_parts(spec: ModelSpec, share: StageShare, op: int) -> tuple[Part, ...]:
    """Return the tensors of a block with their places; the block ends where the last part ends."""
    layout, plain = Layout(), spec.activations.value
    biases: dict[str, int] = {}
    if op >= 2 * spec.layers:
        layout.add_matrix("rows", vocab_format(spec.weights), len(_vocab_rows(spec, op)), spec.hidden)
    elif op % 2:
        width = _ffn_columns(spec, share.ffn)
        _add(layout, spec, "gate_up", 2 * len(width), spec.hidden)
        _add(layout, spec, "down", spec.hidden, len(width))
        biases = {"gate_up.bias": 2 * len(width)} if spec.mlp_bias else {}
        # down.bias stands only in tile 0, so that the sum over members adds it once.
        biases |= {"down.bias": spec.hidden} if spec.mlp_bias and share.ffn.start == 0 else {}
    else:
        rows, width_o = _qkv_rows(spec, share), len(share.groups) * _query_width(spec)
        _add(layout, spec, "qkv", rows, spec.hidden)
        _add(layout, spec, "o", spec.hidden, width_o)
        biases = {"qkv.bias": rows} if spec.qkv_bias else {}
        biases |= {"o.bias": spec.hidden} if spec.o_bias and share.groups.start == 0 else {}
        biases |= {"q_norm": spec.head_dim, "k_norm": spec.head_dim} if spec.qk_norm else {}
    for name, size in biases.items():
        layout.add(name, plain, size)
    return tuple(layout.parts)


def block_bytes(spec: ModelSpec, share: StageShare, op: int) -> int:
    """Return the length of a block in bytes; 0 when the share has no tile of it."""
    if op < 2 * spec.layers and holds_nothing(share, op):
        return 0
    last = block_parts(spec, share, op)[-1]
    return last.offset + last.num_bytes


def view_block(spec: ModelSpec, share: StageShare, op: int, buffer: memoryview) -> Tensors:
    """View a block's tensors in CPU memory by name."""
    return {
        part.name: as_tensor(
            buffer[part.offset : part.offset + part.num_bytes],
            dtype_named(part.dtype),
            (part.rows, part.cols) if part.cols else (part.rows,),
        )
        for part in block_parts(spec, share, op)
    }


def allocate_block(spec: ModelSpec, share: StageShare, op: int, device: torch.device) -> Tensors:
    """Return uninitialised tensors of a block, each with memory of its own."""
    return {
        part.name: torch.empty(
            (part.rows, part.cols) if part.cols else (part.rows,), dtype=dtype_named(part.dtype), device=device
        )
        for part in block_parts(spec, share, op)
    }


def fill_block(spec: ModelSpec, share: StageShare, op: int, into: Tensors, source: TileSource) -> None:
    """Copy the tiles of a block into its tensors, one tile at a time; raises CheckpointInvalid for a wrong length."""
    for tile in block_tiles(spec, share, op):
        parts = tile_tensors(spec, tile, source(tile))
        for piece in _pieces(spec, share, tile, op):
            _place(parts, piece, into)
        for name in ("o.bias", "down.bias", "q_norm", "k_norm"):
            if name in parts:
                into[name].copy_(parts[name])


def block_tiles(spec: ModelSpec, share: StageShare, op: int) -> list[TileId]:
    """Return the tiles that a block is made of."""
    if op >= 2 * spec.layers:
        kind = TileKind.EMBEDDING if spec.tied_embeddings else TileKind.LM_HEAD
        return [TileId(HEAD_LAYER, kind, index) for index in vocab_tiles(spec, op)]
    layer, is_ffn = divmod(op, 2)
    kind, span = (TileKind.FFN, share.ffn) if is_ffn else (TileKind.ATTENTION, share.groups)
    return [TileId(layer, kind, index) for index in span]


def _add(layout: Layout, spec: ModelSpec, name: str, rows: int, cols: int) -> None:
    """A fused matrix; int4 scales and zeros lie side by side, a group of all rows after the other."""
    if spec.weights is WeightFormat.INT4:
        layout.add(name, "uint8", rows, cols // 2)
        layout.add(f"{name}.steps", "bfloat16", cols // INT4_GROUP, 2 * rows)
    else:
        layout.add_matrix(name, spec.weights, rows, cols)


def _pieces(spec: ModelSpec, share: StageShare, tile: TileId, op: int) -> Iterator[Piece]:
    if op >= 2 * spec.layers:
        yield Piece("rows", "rows", lm_head_span(spec, tile.index).start - _vocab_rows(spec, op).start, 0)
        return
    if tile.kind is TileKind.FFN:
        held, own = _ffn_columns(spec, share.ffn), ffn_span(spec, tile.index)
        first = own.start - held.start
        yield Piece("gate", "gate_up", first, 0)
        yield Piece("up", "gate_up", len(held) + first, 0)
        yield Piece("down", "down", 0, first)
        return
    number, width, dim = tile.index - share.groups.start, _query_width(spec), spec.head_dim
    queries, groups = len(share.groups) * width, len(share.groups)
    yield Piece("q", "qkv", number * width, 0)
    yield Piece("k", "qkv", queries + number * dim, 0)
    yield Piece("v", "qkv", queries + groups * dim + number * dim, 0)
    yield Piece("o", "o", 0, number * width)


def _place(parts: Tensors, piece: Piece, into: Tensors) -> None:
    """Copy one matrix of a tile, with its scales and its bias, to its rows and columns of a fused one."""
    matrix = parts[piece.name]
    rows = slice(piece.row, piece.row + matrix.shape[0])
    steps, scale, bias = f"{piece.fused}.steps", f"{piece.name}.scale", f"{piece.name}.bias"
    col = piece.col // 2 if steps in into else piece.col
    into[piece.fused][rows, col : col + matrix.shape[1]] = matrix
    if steps in into:  # int4: scale and zero of a row lie side by side
        groups = slice(piece.col // INT4_GROUP, piece.col // INT4_GROUP + parts[scale].shape[1])
        both = into[steps].view(into[steps].shape[0], -1, 2)
        both[groups, rows, 0], both[groups, rows, 1] = parts[scale].t(), parts[f"{piece.name}.zero"].t()
    elif scale in parts:  # int8: one scale a row, the same in every tile that has columns of it
        into[f"{piece.fused}.scale"][rows] = parts[scale]
    if bias in parts and f"{piece.fused}.bias" in into and bias not in into:
        into[f"{piece.fused}.bias"][rows] = parts[bias]


def _vocab_rows(spec: ModelSpec, op: int) -> Span:
    tiles = vocab_tiles(spec, op)
    return Span(lm_head_span(spec, tiles.start).start, lm_head_span(spec, tiles.end - 1).end)


def _query_width(spec: ModelSpec) -> int:
    return spec.queries_per_group * spec.head_dim


def _qkv_rows(spec: ModelSpec, share: StageShare) -> int:
    return len(share.groups) * (_query_width(spec) + 2 * spec.head_dim)


def _ffn_columns(spec: ModelSpec, tiles: Span) -> Span:
    return Span(ffn_span(spec, tiles.start).start, ffn_span(spec, tiles.end - 1).end)

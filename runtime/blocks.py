"""Blocks: all tiles of one layer's attention, or of its FFN, that a worker holds, fused into few matrices.

Knows nothing of links or of the other members: `partial` is this worker's part of a sum. Fused tensors are allocated
first and filled tile by tile, so building a block takes its own memory and one tile; where matrices are packed, up to
one block more until it is done.

Shapes: T rows, D hidden, G KV-head groups held, R query heads a group, d head_dim, F FFN columns held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from protocol.errors import ModelUnsupported
from protocol.specs import ModelSpec, Span, WeightFormat
from protocol.tiles import TileId, TileKind, ffn_span
from runtime.attention import Place, Step, attend
from runtime.linear import Linear, make_linear
from runtime.rope import rotate
from runtime.tensors import TileSource, dtype_of, tile_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class StageShare:
    """What one member computes: its stage's layers, and its KV-head groups and FFN tiles in each of them."""

    layers: Span
    groups: Span
    ffn: Span


class Block(Protocol):
    """One operand of the star: turns normalised hidden states into this worker's part of the sum."""

    num_bytes: int

    def partial(self, x_TD: Tensor, step: Step) -> Tensor:
        """Return this worker's part, `[T, D]`, in the dtype of `x_TD`."""
        ...


class BlockSource(Protocol):
    """Lends blocks by operation number: `2 * layer` is the attention of a layer, `2 * layer + 1` its FFN."""

    def acquire(self, op: int) -> Block | None:
        """Return a block that stays valid until its release; None where this worker holds no tile of it."""
        ...

    def release(self, op: int) -> None:
        """Give the block of `op` back."""
        ...


class AttentionBlock:
    """Attention of one layer over the held groups; adds its rows to the step's caches.

    `qkv` stacks all query rows, then all key rows, then all value rows; `o` lays the output columns side by side.
    """

    def __init__(
        self, spec: ModelSpec, *, layer: int, cache_layer: int, qkv: Linear, o: Linear, qk_norm: Tensor | None
    ) -> None:
        self._place = Place(cache_layer, spec.window_of(layer))
        self._queries = spec.queries_per_group
        self._dim = spec.head_dim
        self._eps = spec.norm_eps
        self._qkv = qkv
        self._o = o
        self._qk_norm_Hd = qk_norm
        self.num_bytes = qkv.num_bytes + o.num_bytes + (qk_norm.nbytes if qk_norm is not None else 0)

    def partial(self, x_TD: Tensor, step: Step) -> Tensor:
        """Return the attention output of the held groups, projected to `[T, D]`."""
        qkv_TO = self._qkv.apply(x_TD)
        heads_THd = qkv_TO.view(qkv_TO.shape[0], -1, self._dim)
        groups = heads_THd.shape[1] // (self._queries + 2)
        num_queries = groups * self._queries
        turning_THd, values_TGd = heads_THd[:, :-groups], heads_THd[:, -groups:]
        if self._qk_norm_Hd is not None:
            turning_THd = functional.rms_norm(turning_THd, (self._dim,), None, self._eps) * self._qk_norm_Hd
        turned_THd = rotate(turning_THd, step.angles)
        query_TGRd = turned_THd[:, :num_queries].view(-1, groups, self._queries, self._dim)
        keys_values = (turned_THd[:, num_queries:], values_TGd)
        return self._o.apply(attend(step, self._place, query_TGRd, keys_values))


class FfnBlock:
    """The gated FFN of one layer over the held columns; `gate_up` stacks the gate rows, then the up rows."""

    def __init__(self, *, gate_up: Linear, down: Linear) -> None:
        self._gate_up = gate_up
        self._down = down
        self.num_bytes = gate_up.num_bytes + down.num_bytes

    def partial(self, x_TD: Tensor, step: Step) -> Tensor:
        """Return `down(silu(gate(x)) * up(x))` of the held columns, `[T, D]`."""
        gate_TF, up_TF = self._gate_up.apply(x_TD).chunk(2, dim=-1)
        return self._down.apply(functional.silu(gate_TF).mul_(up_TF))


class PinnedBlocks:
    """A block source that holds every block of a share in memory all the time."""

    def __init__(self, blocks: dict[int, Block | None]) -> None:
        self._blocks = blocks

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.num_bytes for block in self._blocks.values() if block is not None)

    def acquire(self, op: int) -> Block | None:
        """Return the block; raises KeyError for an operation outside the share."""
        return self._blocks[op]

    def release(self, op: int) -> None:
        """Keep the block."""


def load_pinned(spec: ModelSpec, share: StageShare, source: TileSource, device: torch.device) -> PinnedBlocks:
    """Build every block of a share, layer by layer."""
    blocks: dict[int, Block | None] = {}
    for layer in share.layers:
        for op in (2 * layer, 2 * layer + 1):
            blocks[op] = load_block(spec, share, op, source, device)
    return PinnedBlocks(blocks)


def load_block(spec: ModelSpec, share: StageShare, op: int, source: TileSource, device: torch.device) -> Block | None:
    """Build the block of one operation from its tiles; None when the share holds none of them.

    Raises ModelUnsupported for a weight format that has no kernel here, CheckpointInvalid for a tile of wrong length.
    """
    if spec.weights not in (WeightFormat.FLOAT32, WeightFormat.BFLOAT16):
        raise ModelUnsupported(
            f"weights in {spec.weights} have no kernel here", remedy="use --dtype float32 or bfloat16"
        )
    layer, is_ffn = divmod(op, 2)
    if is_ffn:
        return _load_ffn(spec, layer, share.ffn, source, device) if len(share.ffn) else None
    return _load_attention(spec, layer, share, source, device) if len(share.groups) else None


def _load_attention(
    spec: ModelSpec, layer: int, share: StageShare, source: TileSource, device: torch.device
) -> AttentionBlock:
    dtype, dim, width = dtype_of(spec.activations), spec.head_dim, spec.queries_per_group * spec.head_dim
    groups = len(share.groups)
    first_row = {"q": 0, "k": groups * width, "v": groups * (width + dim)}
    rows_of = {"q": width, "k": dim, "v": dim}
    num_rows = groups * (width + 2 * dim)
    qkv = torch.empty((num_rows, spec.hidden), dtype=dtype, device=device)
    qkv_bias = torch.empty(num_rows, dtype=dtype, device=device) if spec.qkv_bias else None
    o = torch.empty((spec.hidden, groups * width), dtype=dtype, device=device)
    o_bias = qk_norm = None
    for number, index in enumerate(share.groups):
        tile = TileId(layer, TileKind.ATTENTION, index)
        parts = tile_tensors(spec, tile, source(tile))
        for name, first in first_row.items():
            rows = slice(first + number * rows_of[name], first + (number + 1) * rows_of[name])
            qkv[rows] = parts[name]
            if qkv_bias is not None:
                qkv_bias[rows] = parts[f"{name}.bias"]
        o[:, number * width : (number + 1) * width] = parts["o"]
        if "o.bias" in parts:  # only in tile 0, so that the sum over members adds it once
            o_bias = parts["o.bias"].to(device, dtype, copy=True)
        if spec.qk_norm and qk_norm is None:
            counts = torch.tensor([groups * spec.queries_per_group, groups])
            both = torch.stack((parts["q_norm"], parts["k_norm"]))
            qk_norm = both.repeat_interleave(counts, dim=0).to(device, dtype)
    fused = make_linear(qkv, qkv_bias)
    del qkv  # before the next matrix is packed
    return AttentionBlock(
        spec,
        layer=layer,
        cache_layer=layer - share.layers.start,
        qkv=fused,
        o=make_linear(o, o_bias),
        qk_norm=qk_norm,
    )


def _load_ffn(spec: ModelSpec, layer: int, tiles: Span, source: TileSource, device: torch.device) -> FfnBlock:
    dtype = dtype_of(spec.activations)
    start = ffn_span(spec, tiles.start).start
    width = ffn_span(spec, tiles.end - 1).end - start
    gate_up = torch.empty((2 * width, spec.hidden), dtype=dtype, device=device)
    gate_up_bias = torch.empty(2 * width, dtype=dtype, device=device) if spec.mlp_bias else None
    down = torch.empty((spec.hidden, width), dtype=dtype, device=device)
    down_bias = None
    for index in tiles:
        tile = TileId(layer, TileKind.FFN, index)
        parts = tile_tensors(spec, tile, source(tile))
        columns = ffn_span(spec, index)
        for name, first in (("gate", -start), ("up", width - start)):
            rows = slice(first + columns.start, first + columns.end)
            gate_up[rows] = parts[name]
            if gate_up_bias is not None:
                gate_up_bias[rows] = parts[f"{name}.bias"]
        down[:, columns.start - start : columns.end - start] = parts["down"]
        if "down.bias" in parts:  # only in tile 0, so that the sum over members adds it once
            down_bias = parts["down.bias"].to(device, dtype, copy=True)
    fused = make_linear(gate_up, gate_up_bias)
    del gate_up  # before the next matrix is packed
    return FfnBlock(gate_up=fused, down=make_linear(down, down_bias))

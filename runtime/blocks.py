"""Blocks: all tiles of one layer's attention, or of its FFN, that a worker holds, fused into few matrices.

Knows nothing of links or of the other members: `partial` is this worker's part of a sum. Fused tensors are allocated
first and filled tile by tile, so building a block takes its own memory and one tile; where matrices are packed, up to
one block more until it is done.

Shapes: T rows, D hidden, G KV-head groups held, R query heads a group, d head_dim, F FFN columns held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from protocol.specs import ModelSpec
from runtime.attention import Place, Step, attend
from runtime.fused import Tensors
from runtime.linear import Linear, project
from runtime.rope import rotate
from runtime.shares import StageShare
from runtime.stream import StreamCounts

MakeMatrix = Callable[[Tensors, str], Linear]
"""Makes the matrix of this name from a block's tensors."""


class Block(Protocol):
    """One operand of the star: turns normalised hidden states into this worker's part of the sum."""

    num_bytes: int

    def partial(self, x_TD: Tensor, step: Step, into_TD: Tensor | None = None) -> Tensor:
        """Return this worker's part, `[T, D]`, in the dtype of `x_TD`; it may be written into `into_TD`."""
        ...


class AttentionBlock:
    """Attention of one layer over the held groups; adds its rows to the step's caches.

    `qkv` stacks all query rows, then all key rows, then all value rows; `o` lays the output columns side by side.
    """

    def __init__(self, spec: ModelSpec, *, layer: int, qkv: Linear, o: Linear, qk_norm: Tensor | None) -> None:
        self._place = Place(layer, spec.window_of(layer))
        self._queries = spec.queries_per_group
        self._dim = spec.head_dim
        self._eps = spec.norm_eps
        self._qkv = qkv
        self._o = o
        self._qk_norm_Hd = qk_norm
        self.num_bytes = qkv.num_bytes + o.num_bytes + (qk_norm.nbytes if qk_norm is not None else 0)

    def partial(self, x_TD: Tensor, step: Step, into_TD: Tensor | None = None) -> Tensor:
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
        return project(self._o, attend(step, self._place, query_TGRd, keys_values), into_TD)


class FfnBlock:
    """The gated FFN of one layer over the held columns; `gate_up` stacks the gate rows, then the up rows."""

    def __init__(self, *, gate_up: Linear, down: Linear) -> None:
        self._gate_up = gate_up
        self._down = down
        self.num_bytes = gate_up.num_bytes + down.num_bytes

    def partial(self, x_TD: Tensor, step: Step, into_TD: Tensor | None = None) -> Tensor:
        """Return `down(silu(gate(x)) * up(x))` of the held columns, `[T, D]`."""
        return project(self._down, self._gated(x_TD), into_TD)

    def _gated(self, x_TD: Tensor) -> Tensor:
        """Return `silu(gate(x)) * up(x)`, `[T, F]`; apart, so that gate and up are free before the next product."""
        gate_TF, up_TF = self._gate_up.apply(x_TD).chunk(2, dim=-1)
        return functional.silu(gate_TF).mul_(up_TF)


class VocabBlock:
    """Some rows of the lm_head."""

    def __init__(self, rows: Linear) -> None:
        self._rows = rows
        self.num_bytes = rows.num_bytes

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return the logits of these rows in fp32, `[N, V]`."""
        return self._rows.apply(x_ND).float()


class BlockSource(Protocol):
    """Lends blocks by operation number (`runtime.shares`), one at a time, in the order of a step."""

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that stay in memory, and of slots."""
        ...

    def acquire(self, op: int) -> Block | None:
        """Return a block that stays valid until its release; None where this worker holds no tile of it."""
        ...

    def acquire_vocab(self, op: int) -> VocabBlock:
        """The same for an operation of the lm_head."""
        ...

    def release(self, op: int) -> None:
        """Give the block of `op` back."""
        ...

    def counts(self) -> StreamCounts:
        """Return what has been streamed so far; may be called from any thread."""
        ...

    def restart(self) -> None:
        """A new plan begins: count anew what is streamed."""
        ...

    def close(self) -> None:
        """End what works behind the scenes."""
        ...


def make_block(spec: ModelSpec, share: StageShare, op: int, tensors: Tensors, make: MakeMatrix) -> Block | VocabBlock:
    """Put a block together from its tensors."""
    if op >= 2 * spec.layers:
        return VocabBlock(make(tensors, "rows"))
    if op % 2:
        return FfnBlock(gate_up=make(tensors, "gate_up"), down=make(tensors, "down"))
    layer = op // 2
    return AttentionBlock(
        spec,
        layer=layer,
        qkv=make(tensors, "qkv"),
        o=make(tensors, "o"),
        qk_norm=_qk_norm(spec, share, tensors),
    )


def _qk_norm(spec: ModelSpec, share: StageShare, tensors: Tensors) -> Tensor | None:
    """Repeat the norms of queries and keys for every head that is turned, `[H, d]`."""
    if not spec.qk_norm:
        return None
    groups = len(share.groups)
    counts = torch.tensor([groups * spec.queries_per_group, groups], device=tensors["q_norm"].device)
    return torch.stack((tensors["q_norm"], tensors["k_norm"])).repeat_interleave(counts, dim=0)

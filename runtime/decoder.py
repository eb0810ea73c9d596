"""The layers of one stage, as one member computes them: norm, own part, sum, residual, twice a layer.

Knows nothing of how the members' parts are added: `reduce` does that, over whatever link. Opens no socket.

Shapes: T rows of a batch, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from protocol.batches import SessionRows, num_rows
from protocol.errors import StepFailed
from protocol.ids import SessionId
from protocol.specs import ModelSpec, Span
from protocol.tiles import TileId, TileKind
from runtime.attention import Step
from runtime.blocks import BlockSource
from runtime.kv import KvCache
from runtime.rope import inverse_frequencies
from runtime.shares import StageShare, layer_ops
from runtime.tensors import TileSource, dtype_of, tile_tensors

Reduce = Callable[[int, Tensor | None], Tensor]
"""Given an operation's number and this member's part (None: it has none), returns the sum of all members, `[T, D]`."""

Norms = dict[int, Tensor]
"""The norm weight `[D]` before each operation, by its number."""


def load_norms(spec: ModelSpec, layers: Span, source: TileSource, device: torch.device) -> Norms:
    """Read the norms of these layers; they are tiny and always stay in memory."""
    norms: Norms = {}
    for layer in layers:
        tile = TileId(layer, TileKind.NORMS, 0)
        parts = tile_tensors(spec, tile, source(tile))
        norms[2 * layer] = parts["attention_norm"].to(device, copy=True)
        norms[2 * layer + 1] = parts["ffn_norm"].to(device, copy=True)
    return norms


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalise each row in fp32, cast back, then scale: the order in which Llama does it."""
    return functional.rms_norm(x_TD, (x_TD.shape[-1],), None, eps) * weight_D


class StageModel:
    """One member's share of a stage's layers, with the KV cache of its sessions."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        share: StageShare,
        blocks: BlockSource,
        norms: Norms,
        kv: KvCache,
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.share = share
        self.kv = kv
        self._blocks = blocks
        self._norms = norms
        self._frequencies = inverse_frequencies(spec.rope, spec.head_dim).to(device)
        self._device = device
        self._dtype = dtype_of(spec.activations)

    @torch.inference_mode()
    def forward(
        self,
        hidden_TD: Tensor,
        rows: tuple[SessionRows, ...],
        reduce: Reduce,
        layers: Span | None = None,
        part_TD: Tensor | None = None,
    ) -> Tensor:
        """Pass a ragged batch through the stage's layers, or those that are in `layers`; the input is left as it is.

        `part_TD`: where the parts that `reduce` is given may be written, one after the other.
        Rows count as cached only when all layers are done, so a step whose `reduce` raised can be repeated.
        Raises StepFailed for a misshapen input, SessionLost and Overloaded as `KvCache.begin` does, and whatever
        `reduce` raises.
        """
        self._check(hidden_TD, rows)
        hidden_TD = hidden_TD.to(self._device)
        step = Step(rows, self.kv.begin(rows, layers), self._frequencies, self._dtype)
        for op in layer_ops(self.share, layers):
            hidden_TD = hidden_TD + reduce(op, self._partial(op, hidden_TD, step, part_TD))
        self.kv.commit(rows, layers)
        return hidden_TD

    def release(self, session: SessionId) -> None:
        """Free the session's cache."""
        self.kv.release(session)

    def _partial(self, op: int, hidden_TD: Tensor, step: Step, part_TD: Tensor | None) -> Tensor | None:
        block = self._blocks.acquire(op)
        try:
            if block is None:
                return None
            return block.partial(rms_norm(hidden_TD, self._norms[op], self.spec.norm_eps), step, part_TD)
        finally:
            self._blocks.release(op)

    def _check(self, hidden_TD: Tensor, rows: tuple[SessionRows, ...]) -> None:
        wanted = (num_rows(rows), self.spec.hidden)
        if not rows or tuple(hidden_TD.shape) != wanted or hidden_TD.dtype is not self._dtype:
            found = f"{list(hidden_TD.shape)} {hidden_TD.dtype}"
            raise StepFailed(f"hidden states are {found}, the step needs {list(wanted)} {self._dtype}")

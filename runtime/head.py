"""The head's arithmetic: token ids to hidden states at the start, hidden states to logits at the end.

Knows nothing of text, sampling or sessions' histories.

Shapes: T rows of a batch, N rows that are sampled, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from protocol.batches import SessionRows, num_rows
from protocol.errors import RequestInvalid, StepFailed
from protocol.specs import ModelSpec
from protocol.tiles import HEAD_LAYER, LM_HEAD_ROWS, Part, TileId, TileKind, tile_parts
from runtime.blocks import BlockSource
from runtime.decoder import rms_norm
from runtime.shares import vocab_ops
from runtime.tensors import TileSource, as_tensor, dtype_named, dtype_of, tile_tensors

RangeSource = Callable[[TileId, int, int], bytes]
"""Returns `length` bytes of a tile from `offset` on; the tile was verified when it was loaded."""


class Embedding:
    """Rows of the embedding, read one by one from the disk: the table is never in memory."""

    def __init__(self, spec: ModelSpec, read: RangeSource) -> None:
        self._spec = spec
        self._read = read
        self._dtype = dtype_of(spec.activations)

    def row(self, token: int) -> Tensor:
        """Return one row, `[D]`; raises RequestInvalid for an id outside the vocabulary."""
        if not 0 <= token < self._spec.vocab:
            raise RequestInvalid(f"token id {token} is outside [0, {self._spec.vocab})")
        index, number = divmod(token, LM_HEAD_ROWS)
        tile = TileId(HEAD_LAYER, TileKind.EMBEDDING, index)
        parts = {part.name: part for part in tile_parts(self._spec, tile)}
        row_D = self._read_row(tile, parts["rows"], number)
        if "rows.scale" in parts:
            row_D = row_D.float() * self._read_row(tile, parts["rows.scale"], number)
        return row_D.to(self._dtype)

    def _read_row(self, tile: TileId, part: Part, number: int) -> Tensor:
        dtype, cols = dtype_named(part.dtype), max(part.cols, 1)
        length = cols * dtype.itemsize
        return as_tensor(self._read(tile, part.offset + number * length, length), dtype, (cols,))


class Head:
    """Embedding, final norm and lm_head; held by the trusted worker alone."""

    def __init__(
        self, spec: ModelSpec, source: TileSource, read: RangeSource, blocks: BlockSource, device: torch.device
    ) -> None:
        self.spec = spec
        self._device = device
        self._dtype = dtype_of(spec.activations)
        self._blocks = blocks
        self._embedding = Embedding(spec, read)
        tile = TileId(HEAD_LAYER, TileKind.FINAL_NORM, 0)
        self._final_norm_D = tile_tensors(spec, tile, source(tile))["final_norm"].to(device, self._dtype, copy=True)

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """Return the embeddings, `[T, D]`; raises RequestInvalid naming an id outside the vocabulary."""
        rows = {token: self._embedding.row(token) for token in dict.fromkeys(token_ids)}
        if not rows:
            return torch.empty(0, self.spec.hidden, dtype=self._dtype, device=self._device)
        return torch.stack([rows[token] for token in token_ids]).to(self._device)

    @torch.inference_mode()
    def logits(self, hidden_TD: Tensor, rows: tuple[SessionRows, ...]) -> Tensor:
        """Return the fp32 logits of the last row of each session to be sampled, `[N, V]` in the order of `rows`.

        Raises StepFailed when the hidden states are not those of `rows`.
        """
        if tuple(hidden_TD.shape) != (num_rows(rows), self.spec.hidden):
            raise StepFailed(f"hidden states are {list(hidden_TD.shape)}, not {[num_rows(rows), self.spec.hidden]}")
        ends = itertools.accumulate(part.count for part in rows)
        sampled = [end - 1 for end, part in zip(ends, rows, strict=True) if part.sample]
        if len(sampled) != len(hidden_TD):
            hidden_TD = hidden_TD[sampled]
        x_ND = rms_norm(hidden_TD.to(self._device), self._final_norm_D, self.spec.norm_eps)
        pieces = [self._piece(op, x_ND) for op in vocab_ops(self.spec)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def _piece(self, op: int, x_ND: Tensor) -> Tensor:
        block = self._blocks.acquire_vocab(op)
        try:
            return block.logits(x_ND)
        finally:
            self._blocks.release(op)

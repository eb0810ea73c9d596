"""The head's arithmetic: token ids to hidden states at the start, hidden states to logits at the end.

Knows nothing of text, sampling or sessions' histories.

Shapes: T rows of a batch, N rows that are sampled, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from protocol.batches import SessionRows, num_rows
from protocol.errors import RequestInvalid, StepFailed
from protocol.specs import ModelSpec
from protocol.tiles import HEAD_LAYER, TileId, TileKind, lm_head_span, num_vocab_tiles
from runtime.decoder import rms_norm
from runtime.linear import Linear, PlainLinear, make_linear
from runtime.tensors import TileSource, dtype_of, tile_tensors

LM_HEAD_CHUNK = 4
"""lm_head tiles in one matrix: while it is packed, only this much stands in memory twice."""


class Head:
    """Embedding, final norm and lm_head; held by the trusted worker alone.

    A tied lm_head shares the embedding's memory and so stays unpacked.
    """

    def __init__(self, spec: ModelSpec, source: TileSource, device: torch.device) -> None:
        self.spec = spec
        self._device = device
        self._dtype = dtype_of(spec.activations)
        tiles = range(num_vocab_tiles(spec))
        self._embedding_VD = self._read_rows(TileKind.EMBEDDING, tiles, source)
        tile = TileId(HEAD_LAYER, TileKind.FINAL_NORM, 0)
        self._final_norm_D = tile_tensors(spec, tile, source(tile))["final_norm"].to(device, self._dtype, copy=True)
        self._lm_head: list[Linear] = (
            [PlainLinear(self._embedding_VD, None)]
            if spec.tied_embeddings
            else [
                make_linear(self._read_rows(TileKind.LM_HEAD, tiles[first : first + LM_HEAD_CHUNK], source))
                for first in tiles[::LM_HEAD_CHUNK]
            ]
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of weights held."""
        own = 0 if self.spec.tied_embeddings else sum(matrix.num_bytes for matrix in self._lm_head)
        return self._embedding_VD.nbytes + self._final_norm_D.nbytes + own

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """Return the embeddings, `[T, D]`; raises RequestInvalid naming an id outside the vocabulary."""
        for token in token_ids:
            if not 0 <= token < self.spec.vocab:
                raise RequestInvalid(f"token id {token} is outside [0, {self.spec.vocab})")
        return functional.embedding(torch.tensor(token_ids, dtype=torch.int64, device=self._device), self._embedding_VD)

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
        pieces = [matrix.apply(x_ND).float() for matrix in self._lm_head]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def _read_rows(self, kind: TileKind, tiles: range, source: TileSource) -> Tensor:
        first = lm_head_span(self.spec, tiles[0]).start
        last = lm_head_span(self.spec, tiles[-1]).end
        rows = torch.empty((last - first, self.spec.hidden), dtype=self._dtype, device=self._device)
        for index in tiles:
            tile, span = TileId(HEAD_LAYER, kind, index), lm_head_span(self.spec, index)
            rows[span.start - first : span.end - first] = tile_tensors(self.spec, tile, source(tile))["rows"]
        return rows

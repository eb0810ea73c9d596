"""Causal attention of a ragged batch: each session's new rows over its own cached keys and values.

Knows nothing of weights. All that layers of one step share (angles, masks, caches) is worked out once, in `Step`.

Shapes: T rows of the batch or of one session, S positions so far, G KV-head groups, R query heads a group, d head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from protocol.batches import SessionRows
from runtime.kv import SessionKv
from runtime.rope import Rotation, rotation

KeysValues = tuple[Tensor, Tensor]


class Place(NamedTuple):
    """Where a layer stands: its number in the model, and how many positions a row sees.

    The window counts the row itself; 0 means all.
    """

    layer: int
    window: int


class Step:
    """What the layers of one pass share: rows, their caches and angles, and masks as they are first needed."""

    def __init__(
        self, rows: tuple[SessionRows, ...], caches: tuple[SessionKv, ...], frequencies: Tensor, dtype: torch.dtype
    ) -> None:
        self.rows = rows
        self.caches = caches
        self.device = frequencies.device
        self.dtype = dtype
        self.angles: Rotation = rotation(frequencies, _positions(rows, self.device), dtype)
        self._masks: dict[tuple[int, int, int], Tensor] = {}

    def mask(self, start: int, count: int, window: int) -> Tensor:
        """Return 0 where a row may look and -inf elsewhere, `[T, S]` with S counted from `first_visible`.

        Layers of one window share it, and so do sessions of equal length.
        """
        key = (start, count, window)
        if key not in self._masks:
            query_T1 = torch.arange(start, start + count, device=self.device)[:, None]
            position_S = torch.arange(first_visible(start, window), start + count, device=self.device)
            hidden_TS = position_S > query_T1
            if window:
                hidden_TS |= position_S <= query_T1 - window
            mask_TS = torch.zeros(hidden_TS.shape, dtype=self.dtype, device=self.device)
            self._masks[key] = mask_TS.masked_fill_(hidden_TS, float("-inf"))
        return self._masks[key]


def first_visible(start: int, window: int) -> int:
    """Return the first position that any row from `start` on may look at; window 0 means all."""
    return max(0, start + 1 - window) if window else 0


def _positions(rows: tuple[SessionRows, ...], device: torch.device) -> Tensor:
    positions = [position for part in rows for position in range(part.start, part.start + part.count)]
    return torch.tensor(positions, device=device)


def attend(step: Step, place: Place, query_TGRd: Tensor, keys_values: KeysValues) -> Tensor:
    """Append the batch's keys and values (`[T, G, d]` each) to the caches and attend; returns `[T, G * R * d]`."""
    keys_TGd, values_TGd = keys_values
    if len(step.rows) == 1:
        return _attend_session(step, 0, place, query_TGRd, keys_values)
    outputs, first = [], 0
    for number, part in enumerate(step.rows):
        own = slice(first, first + part.count)
        own_keys_values = (keys_TGd[own], values_TGd[own])
        outputs.append(_attend_session(step, number, place, query_TGRd[own], own_keys_values))
        first += part.count
    return torch.cat(outputs)


def _attend_session(step: Step, number: int, place: Place, query_TGRd: Tensor, keys_values: KeysValues) -> Tensor:
    window = place.window
    start = step.rows[number].start
    count, groups, queries, dim = query_TGRd.shape
    keys_GSd, values_GSd = step.caches[number].extend(place.layer, start, *keys_values)
    if step.rows[number].alone:
        seen = [slice(first_visible(at, window), at + 1) for at in range(start, start + count)]
        return torch.cat(
            [
                _attend_row(query_TGRd[row : row + 1], keys_GSd[:, visible], values_GSd[:, visible])
                for row, visible in enumerate(seen)
            ]
        )
    first = first_visible(start, window)
    if first:
        keys_GSd, values_GSd = keys_GSd[:, first:], values_GSd[:, first:]
    if count == 1:
        return _attend_row(query_TGRd, keys_GSd, values_GSd)
    # A group is a batch entry and its keys are shared by its query heads through a stride of 0.
    shape = (groups, queries, keys_GSd.shape[1], dim)
    is_plain = start == 0 and (not window or count <= window)
    out_GRTd = functional.scaled_dot_product_attention(
        query_TGRd.permute(1, 2, 0, 3),
        keys_GSd[:, None].expand(shape),
        values_GSd[:, None].expand(shape),
        attn_mask=None if is_plain else step.mask(start, count, window),
        is_causal=is_plain,
    )
    return out_GRTd.permute(2, 0, 1, 3).reshape(count, groups * queries * dim)


def _attend_row(query_1GRd: Tensor, keys_GSd: Tensor, values_GSd: Tensor) -> Tensor:
    """One row sees every key: the query heads of a group become the rows, so no key is repeated for GQA."""
    out_1GRd = functional.scaled_dot_product_attention(query_1GRd, keys_GSd[None], values_GSd[None])
    return out_1GRd.reshape(1, -1)

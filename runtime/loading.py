"""Puts one worker's part of a model together: its blocks, its stage, and on the head the embedding and lm_head.

Knows nothing of plans, sockets or where tiles come from.
"""

from __future__ import annotations

from typing import NamedTuple

from runtime.blocks import BlockSource
from runtime.decoder import StageModel, load_norms
from runtime.head import Head, RangeSource
from runtime.kv import KvCache
from runtime.shelf import BlockShelf
from runtime.tensors import TileSource
from runtime.window import WindowPlan
from runtime.windowed import BlockFiles, BlockOrder, load_blocks


class LoadedPart(NamedTuple):
    """What a worker computes with; a head without layers has no stage. `close` the blocks, or their shelf, after."""

    stage: StageModel | None
    head: Head | None
    blocks: BlockSource
    window: WindowPlan


def load_part(
    order: BlockOrder,
    source: TileSource,
    read: RangeSource,
    files: BlockFiles,
    *,
    left_bytes: int,
    kv_positions: int,
    kv: KvCache | None = None,
    shelf: BlockShelf | None = None,
) -> LoadedPart:
    """Load everything; the blocks take at most `left_bytes`.

    `kv`: an arena that stays from the plan before. `shelf`: blocks that may stay; it then owns what is loaded.
    Raises BudgetTooSmall when not even a window fits, CheckpointInvalid for a tile of wrong length, and what the
    sources raise.
    """
    spec, share, device = order.spec, order.share, order.device
    blocks, window = load_blocks(order, source, files, left_bytes, shelf)
    head = Head(spec, source, read, blocks, device) if order.is_head else None
    if not len(share.layers):
        return LoadedPart(None, head, blocks, window)
    stage = StageModel(
        spec,
        share=share,
        blocks=blocks,
        norms=load_norms(spec, share.layers, source, device),
        kv=kv or KvCache(spec, layers=share.layers, groups=share.groups, positions=kv_positions, device=device),
        device=device,
    )
    return LoadedPart(stage, head, blocks, window)

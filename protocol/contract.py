"""The memory contract: what a worker's bytes go to under a plan, computed alike by the coordinator and the worker.

Knows nothing of tensors or processes. A contract has fixed parts (the process itself, the KV arena, one step's
temporaries) and the weights, which either all stay or flow through a window; it holds when the sum fits the budget.
"""

from __future__ import annotations

from functools import lru_cache

from protocol.ids import WorkerId
from protocol.plans import Plan
from protocol.specs import ModelSpec, Span, WeightFormat
from protocol.tiles import TileId, TileKind, head_tiles, layer_tiles, tile_bytes

FLOAT32_BYTES = 4
SLACK_BYTES = 32 << 20
"""What libraries load when a step first uses them (measured: 12 MB of code, 8 MB of data), Python objects of a plan,
ZeroMQ's queues, small sums, holes between what is allocated."""
HIDDEN_COPIES = 10  # hidden states, norms, q, k, v, partial, sum, and two frames on their way in and out
FFN_COPIES = 3  # gate, up, their product
LOGIT_COPIES = 2  # blocks of the lm_head, and their logits side by side
STRIP_BYTES = 16 << 20  # of a quantised product, which is computed in float32 strip by strip
SAMPLER_COPIES = 16  # of one session's logits while a token is chosen, most in float64
WINDOW_SLOTS = 2  # fewer can't read while they compute
VOCAB_CHUNK_TILES = 4  # lm_head tiles in one block of the window
RESIDENT_KINDS = frozenset({TileKind.NORMS, TileKind.FINAL_NORM})  # tiny, and used in every step


def workspace_bytes(
    spec: ModelSpec, *, ffn_tiles: int, is_head: bool, rows: int, samples: int, positions: int = 0
) -> int:
    """Return the bytes of one step's temporaries and frames: hidden states, this share of the FFN, the head's logits.

    `positions`: of the longest session (see `mask_bytes_per_position`).
    """
    width = spec.activations.num_bytes
    ffn_width = -(-spec.intermediate * ffn_tiles // spec.ffn_tiles)
    layers = rows * FFN_COPIES * ffn_width * width + positions * mask_bytes_per_position(spec, rows)
    logits = FLOAT32_BYTES * spec.vocab * (LOGIT_COPIES * samples + SAMPLER_COPIES) if is_head else 0
    strips = STRIP_BYTES if spec.weights in (WeightFormat.INT8, WeightFormat.INT4) else 0
    return SLACK_BYTES + rows * HIDDEN_COPIES * spec.hidden * width + strips + max(layers, logits)  # not both at once


def mask_bytes_per_position(spec: ModelSpec, rows: int) -> int:
    """Return what attention takes for each position that rows of a step look at: what they may see of it."""
    return rows * (spec.activations.num_bytes + 1)


@lru_cache(maxsize=4096)
def layer_blocks(spec: ModelSpec, groups: Span, ffn: Span) -> tuple[int, int, int]:
    """Return the bytes of one layer's norms, attention tiles and FFN tiles of a share; all layers are alike."""
    sums = {TileKind.NORMS: 0, TileKind.ATTENTION: 0, TileKind.FFN: 0}
    for tile in layer_tiles(0, groups, ffn):
        sums[tile.kind] += tile_bytes(spec, tile)
    return sums[TileKind.NORMS], sums[TileKind.ATTENTION], sums[TileKind.FFN]


@lru_cache(maxsize=256)
def head_blocks(spec: ModelSpec) -> tuple[int, ...]:
    """Return the bytes of the lm_head's blocks, in order; the embedding's own rows are read one by one."""
    kind = TileKind.EMBEDDING if spec.tied_embeddings else TileKind.LM_HEAD
    sizes = [tile_bytes(spec, tile) for tile in head_tiles(spec) if tile.kind is kind]
    return tuple(sum(sizes[at : at + VOCAB_CHUNK_TILES]) for at in range(0, len(sizes), VOCAB_CHUNK_TILES))


def resident_tile_bytes(spec: ModelSpec, tiles: tuple[TileId, ...]) -> int:
    """Return the bytes of the tiles that always stay in memory."""
    return sum(tile_bytes(spec, tile) for tile in tiles if tile.kind in RESIDENT_KINDS)


def window_blocks(plan: Plan, worker: WorkerId) -> tuple[int, ...]:
    """Return the bytes of a worker's blocks in the order in which a step uses them, the lm_head's last."""
    blocks: list[int] = []
    number = plan.stage_of(worker)
    if number is not None:
        stage = plan.stages[number]
        share = stage.members[stage.rank_of(worker)]
        _, attention, ffn = layer_blocks(plan.model, share.groups, share.ffn)
        blocks += [size for _ in stage.layers for size in (attention, ffn) if size]
    if worker == plan.head:
        blocks += head_blocks(plan.model)
    return tuple(blocks)


def floor_of_blocks(blocks: tuple[int, ...]) -> int:
    """Return the least bytes that can serve these blocks: all of them, or the slots of a window."""
    return min(sum(blocks), WINDOW_SLOTS * max(blocks, default=0))

"""What a share of the model costs its worker in memory.

Knows nothing of which worker gets what. A need is: tiles, keys and values of at least one context, and working space
for one step; the worker's owner bounds their sum by its budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from protocol.ids import WorkerId
from protocol.plans import Plan
from protocol.specs import ModelSpec, Span
from protocol.tiles import head_tiles, layer_tiles, tile_bytes

MIN_CONTEXT = 2048
HIDDEN_COPIES = 8  # hidden states, norms, q, k, v, partial and sum of a step that live at once
FFN_COPIES = 3  # gate, up, their product
FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBounds:
    """The largest step there can be: rows of hidden states, and rows of them that are sampled."""

    rows: int
    sampled: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes a worker must have under a plan; `kv_bytes_per_position` grows with the sessions it serves."""

    tile_bytes: int
    workspace_bytes: int
    kv_bytes_per_position: int
    min_positions: int

    @property
    def total_bytes(self) -> int:
        """Bytes with the keys and values of one context."""
        return self.fixed_bytes + self.kv_bytes_per_position * self.min_positions

    @property
    def fixed_bytes(self) -> int:
        """Bytes without any keys and values."""
        return self.tile_bytes + self.workspace_bytes

    def positions_in(self, budget_bytes: int) -> int | None:
        """Return how many positions of keys and values the budget holds; None when this worker holds none."""
        if not self.kv_bytes_per_position:
            return None
        return max(0, budget_bytes - self.fixed_bytes) // self.kv_bytes_per_position


def min_positions(spec: ModelSpec) -> int:
    """Return the context that every worker must have room for."""
    return min(spec.max_positions, MIN_CONTEXT)


@lru_cache(maxsize=256)
def head_bytes(spec: ModelSpec) -> int:
    """Return the bytes of the head's tiles."""
    return sum(tile_bytes(spec, tile) for tile in head_tiles(spec))


@lru_cache(maxsize=4096)
def layer_bytes(spec: ModelSpec, groups: Span, ffn: Span) -> int:
    """Return the bytes of these tiles of one layer; all layers are alike."""
    return sum(tile_bytes(spec, tile) for tile in layer_tiles(0, groups, ffn))


def workspace_bytes(spec: ModelSpec, *, ffn_tiles: int, is_head: bool, step: StepBounds) -> int:
    """Return the bytes of one step's temporaries: hidden states, this share of the FFN, and on the head logits."""
    ffn_width = -(-spec.intermediate * ffn_tiles // spec.ffn_tiles)
    values = step.rows * (HIDDEN_COPIES * spec.hidden + FFN_COPIES * ffn_width)
    logits = step.sampled * spec.vocab if is_head else 0
    return FLOAT32_BYTES * (values + logits)


def need_of(plan: Plan, worker: WorkerId, step: StepBounds) -> Need:
    """Return what `worker` must have under `plan`."""
    spec, is_head = plan.model, worker == plan.head
    tiles, kv, ffn_tiles = head_bytes(spec) if is_head else 0, 0, 0
    number = plan.stage_of(worker)
    if number is not None:
        stage = plan.stages[number]
        share = stage.members[stage.rank_of(worker)]
        tiles += layer_bytes(spec, share.groups, share.ffn) * len(stage.layers)
        kv = spec.kv_bytes_per_token(len(share.groups), len(stage.layers))
        ffn_tiles = len(share.ffn)
    return Need(
        tile_bytes=tiles,
        workspace_bytes=workspace_bytes(spec, ffn_tiles=ffn_tiles, is_head=is_head, step=step),
        kv_bytes_per_position=kv,
        min_positions=min_positions(spec),
    )


class KvRoom(NamedTuple):
    """How many positions of keys and values all sessions may have together, and the worker with the least room."""

    positions: int
    worker: WorkerId


def kv_room(plan: Plan, budgets: Mapping[WorkerId, int], step: StepBounds) -> KvRoom:
    """Return the room for sessions under a plan; a worker without a budget has none."""
    rooms = ((need_of(plan, worker, step).positions_in(budgets.get(worker, 0)), worker) for worker in plan.workers)
    return min(KvRoom(positions, worker) for positions, worker in rooms if positions is not None)


def bytes_text(num_bytes: int) -> str:
    """Write a number of bytes for people, in powers of 1000 and rounded up: 1.3 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            tenths = -(-num_bytes * 10 // size)
            return f"{tenths // 10}.{tenths % 10} {unit}"
    return f"{num_bytes} bytes"

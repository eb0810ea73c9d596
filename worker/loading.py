"""Loads a worker's part of a plan within its memory: the one place where the contract is kept on this device.

Knows nothing of commands, links or threads; tiles come from the store through `source`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import psutil
import torch

from protocol.contract import SLACK_BYTES, resident_tile_bytes, workspace_bytes
from protocol.errors import BudgetTooSmall, TileUnavailable
from protocol.ids import WorkerId
from protocol.plans import Plan
from protocol.tiles import TileEntry, TileId, TileKind
from runtime.allocator import give_back, hold
from runtime.kernels import Kernels
from runtime.kv import KvCache
from runtime.loading import LoadedPart, load_part
from runtime.shares import NO_SHARE, StageShare
from runtime.shelf import BlockShelf
from runtime.tensors import TileSource
from runtime.windowed import BlockOrder
from worker.block_cache import BlockCache
from worker.store import TileStore

DEFAULT_KV_POSITIONS: Final = 2048
DEFAULT_STEP: Final = (256, 16)  # rows and samples, for a coordinator that does not say


class Room(NamedTuple):
    """What a budget is spent on, in bytes, and what that leaves for blocks."""

    base_bytes: int
    kv_bytes: int
    workspace_bytes: int
    resident_bytes: int  # norms
    left_bytes: int


class WorkerPart(NamedTuple):
    """What was loaded, and what this process will hold at most."""

    part: LoadedPart
    room: Room
    pinned_bytes: int
    window_bytes: int
    weight_bytes: int

    @property
    def predicted_bytes(self) -> int:
        """The most this process will hold under this plan."""
        return sum(self.room[:4]) + self.pinned_bytes + self.window_bytes


def resident_bytes() -> int:
    """Return the resident set of this process, in bytes."""
    return int(psutil.Process(os.getpid()).memory_info().rss)


def peak_bytes() -> int:
    """Return the most this process ever held, in bytes, as the kernel counted it (0 where it does not)."""
    if (peak := _high_water_bytes()) is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _high_water_bytes() -> int | None:
    """Read Linux's own mark; None elsewhere. What `getrusage` says there begins with the peak of who started us."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s*(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def share_of(plan: Plan, own: WorkerId) -> StageShare:
    """Return what a worker computes under a plan; a head without layers has an empty share."""
    number = plan.stage_of(own)
    if number is None:
        return NO_SHARE
    stage = plan.stages[number]
    share = stage.members[stage.rank_of(own)]
    return StageShare(layers=stage.layers, groups=share.groups, ffn=share.ffn)


def kv_positions(plan: Plan) -> int:
    """Return the size of the KV arena in positions."""
    return plan.kv_positions or min(plan.model.max_positions, DEFAULT_KV_POSITIONS)


def room_of(plan: Plan, own: WorkerId, budget_bytes: int, base_bytes: int) -> Room:
    """Return how a budget is spent before any weights; raises BudgetTooSmall when it is spent already."""
    spec, share = plan.model, share_of(plan, own)
    rows, samples = (plan.step_rows, plan.step_samples) if plan.step_rows else DEFAULT_STEP
    kv_bytes = spec.kv_bytes_per_token(len(share.groups), len(share.layers)) * kv_positions(plan)
    workspace = workspace_bytes(
        spec,
        ffn_tiles=len(share.ffn),
        is_head=own == plan.head,
        rows=rows,
        samples=samples,
        positions=min(spec.max_positions, kv_positions(plan)) if kv_bytes else 0,
    )
    resident = resident_tile_bytes(spec, plan.tiles_of(own))
    spent = base_bytes + kv_bytes + workspace + resident
    if spent >= budget_bytes:
        raise BudgetTooSmall(
            f"the budget of {budget_bytes} bytes is spent before any weights: {base_bytes} on the process itself, "
            f"{kv_bytes} on keys and values, {workspace} on one step",
            node=own,
            phase="load",
        )
    return Room(base_bytes, kv_bytes, workspace, resident, budget_bytes - spent)


def load_worker(
    plan: Plan,
    own: WorkerId,
    *,
    source: TileSource,
    store: TileStore,
    entries: Mapping[TileId, TileEntry],
    kernels: Kernels,
    device: torch.device,
    budget_bytes: int,
    base_bytes: int,
    on_read: Callable[[int], None],
    kv: KvCache | None = None,
    shelf: BlockShelf | None = None,
) -> WorkerPart:
    """Load blocks, head and KV arena; `on_read` is told of bytes read beside those of `source`.

    `kv` and `shelf`: an arena, and blocks, that stay from the plan before.
    Raises BudgetTooSmall, StorageFull, StorageFailed, TileUnavailable.
    """
    room = room_of(plan, own, budget_bytes, base_bytes)
    give_back()  # what the plan before held for its steps
    order = BlockOrder(
        spec=plan.model, share=share_of(plan, own), is_head=own == plan.head, kernels=kernels, device=device
    )
    part = load_part(
        order,
        source,
        lambda tile, offset, length: store.read_range(entries[tile], offset, length),
        BlockCache(store, store.root / "blocks", order, entries, on_read),
        left_bytes=room.left_bytes,
        kv_positions=kv_positions(plan),
        kv=kv,
        shelf=shelf,
    )
    if order.is_head:
        try:
            _prove_embedding(store, entries, on_read)
        except TileUnavailable:
            part.blocks.close()
            raise
    give_back()
    if device.type == "cpu":
        _hold(room.workspace_bytes - SLACK_BYTES, own)
    window_bytes = part.window.ring_bytes
    weight_bytes = sum(entry.num_bytes for entry in entries.values())
    return WorkerPart(part, room, part.blocks.num_bytes - window_bytes, window_bytes, weight_bytes)


def _hold(num_bytes: int, own: WorkerId) -> None:
    """Take the memory of a step's temporaries and frames now: what has been promised can't be refused later."""
    try:
        hold(num_bytes)
    except MemoryError as error:
        raise BudgetTooSmall(f"no memory for the temporaries of a step: {error}", node=own, phase="load") from error


def _prove_embedding(store: TileStore, entries: Mapping[TileId, TileEntry], on_read: Callable[[int], None]) -> None:
    """Verify the tiles whose rows are read one by one in steps: no block that is loaded tells of them."""
    for tile, entry in entries.items():
        if tile.kind is TileKind.EMBEDDING:
            store.prove(entry)
            on_read(entry.num_bytes)

"""What a share of the model costs its worker in memory, and how much room that leaves for sessions.

Knows nothing of which worker gets what, nor of how bytes are counted (`protocol.contract`, which the workers share).

A budget holds for the whole process. A worker that may stream needs its weights' floor only: the slots of a window that
the blocks flow through. One that may not needs all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from protocol.contract import (
    floor_of_blocks,
    head_blocks,
    layer_blocks,
    mask_bytes_per_position,
    resident_tile_bytes,
    workspace_bytes,
)
from protocol.ids import WorkerId
from protocol.messages import DeviceProfile
from protocol.plans import Plan
from protocol.specs import ModelSpec, Span
from protocol.tiles import head_tiles

MIN_CONTEXT = 2048
DEFAULT_KV_POSITIONS = 8192
LEAST_PROMPT_ROWS = 32  # fewer at a time would make reading a prompt as slow as answering
HOST_DEVICE = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBounds:
    """The largest step there can be: rows of hidden states, and rows of them that are sampled."""

    rows: int
    sampled: int

    def smaller(self) -> Iterator[StepBounds]:
        """Yield this, then bounds with half as many rows of prompts each time, down to a few."""
        prompts = self.rows - self.sampled
        yield self
        while (prompts := prompts // 2) >= LEAST_PROMPT_ROWS:
            yield StepBounds(rows=self.sampled + prompts, sampled=self.sampled)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A worker that a plan may use: what its owner lets it take, and what the bare process takes of that.

    `can_stream`: weights that don't fit may flow from its disk.
    """

    worker: WorkerId
    budget_bytes: int
    base_bytes: int = 0
    can_stream: bool = False

    @staticmethod
    def of(worker: WorkerId, profile: DeviceProfile) -> Candidate:
        """Read a worker's profile: the budget of a GPU is memory of its own, which the process takes nothing of."""
        is_host = profile.device == HOST_DEVICE
        return Candidate(
            worker=worker,
            budget_bytes=profile.budget_bytes,
            base_bytes=profile.base_bytes if is_host else 0,
            can_stream=is_host,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What a worker holds: a share of so many layers, and, as head, the vocabulary."""

    spec: ModelSpec
    groups: Span
    ffn: Span
    num_layers: int
    is_head: bool

    @staticmethod
    def of(plan: Plan, worker: WorkerId) -> Holding:
        """Return what a worker of the plan holds."""
        number, is_head = plan.stage_of(worker), worker == plan.head
        none = Span(0, 0)
        if number is None:
            return Holding(spec=plan.model, groups=none, ffn=none, num_layers=0, is_head=is_head)
        stage = plan.stages[number]
        share = stage.members[stage.rank_of(worker)]
        return Holding(
            spec=plan.model, groups=share.groups, ffn=share.ffn, num_layers=len(stage.layers), is_head=is_head
        )

    @property
    def blocks(self) -> tuple[int, ...]:
        """Bytes of the blocks that could flow through a window, as `protocol.contract.window_blocks` has them."""
        _, attention, ffn = layer_blocks(self.spec, self.groups, self.ffn)
        layer = tuple(size for size in (attention, ffn) if size)
        return layer * self.num_layers + (head_blocks(self.spec) if self.is_head else ())

    @property
    def resident_bytes(self) -> int:
        """Bytes of the tiles that stay in any case."""
        norms = layer_blocks(self.spec, self.groups, self.ffn)[0] * self.num_layers
        return norms + (resident_tile_bytes(self.spec, tuple(head_tiles(self.spec))) if self.is_head else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes a worker must have for what it holds.

    `kv_bytes_per_position`: of keys and values, and what a step takes to look at them.
    `weight_bytes`: weights that take part in every step, so without an embedding that is no lm_head: rows of it are
    read one by one. `least_bytes`: those of them that must be in memory; fewer than all for a worker that may stream.
    `block_bytes`: the largest block.
    """

    base_bytes: int
    weight_bytes: int
    least_bytes: int
    block_bytes: int
    workspace_bytes: int
    kv_bytes_per_position: int
    min_positions: int

    @property
    def total_bytes(self) -> int:
        """Bytes with all weights in memory, and the keys and values of one context."""
        return self.floor_bytes - self.least_bytes + self.weight_bytes

    @property
    def floor_bytes(self) -> int:
        """Bytes with as few weights in memory as it can compute with, and the keys and values of one context."""
        fixed = self.base_bytes + self.least_bytes + self.workspace_bytes
        return fixed + self.kv_bytes_per_position * self.min_positions

    def positions_in(self, budget_bytes: int) -> int | None:
        """Return for how many positions the budget has room beside all weights; None when this worker holds none.

        Beyond the least, room for one block stays free: on its way into memory a block is there twice.
        """
        if not self.kv_bytes_per_position:
            return None
        fixed = self.base_bytes + self.weight_bytes + self.workspace_bytes + self.block_bytes
        return max(self.min_positions, (budget_bytes - fixed) // self.kv_bytes_per_position)


def min_positions(spec: ModelSpec, kv_positions: int = DEFAULT_KV_POSITIONS) -> int:
    """Return the positions that every worker must have room for; `kv_positions` is the most that is wanted."""
    return min(spec.max_positions, MIN_CONTEXT, kv_positions)


def need_of_holding(holding: Holding, candidate: Candidate, step: StepBounds, kv_positions: int) -> Need:
    """Return what this worker must have to hold this."""
    spec, blocks = holding.spec, holding.blocks
    least = floor_of_blocks(blocks) if candidate.can_stream else sum(blocks)
    kv_bytes = spec.kv_bytes_per_token(len(holding.groups), holding.num_layers)
    return Need(
        base_bytes=candidate.base_bytes,
        weight_bytes=holding.resident_bytes + sum(blocks),
        least_bytes=holding.resident_bytes + least,
        block_bytes=max(blocks, default=0),
        workspace_bytes=workspace_bytes(
            spec, ffn_tiles=len(holding.ffn), is_head=holding.is_head, rows=step.rows, samples=step.sampled
        ),
        kv_bytes_per_position=kv_bytes + mask_bytes_per_position(spec, step.rows) if kv_bytes else 0,
        min_positions=min_positions(spec, kv_positions),
    )


def need_of(plan: Plan, candidate: Candidate, step: StepBounds, kv_positions: int = DEFAULT_KV_POSITIONS) -> Need:
    """Return what this worker must have under a plan."""
    return need_of_holding(Holding.of(plan, candidate.worker), candidate, step, kv_positions)


class KvRoom(NamedTuple):
    """How many positions of keys and values all sessions may have together, and the worker that leaves no more.

    No worker: the setting allows no more.
    """

    positions: int
    worker: WorkerId | None

    @property
    def text(self) -> str:
        """Say what bounds the room."""
        return f"{'memory is left' if self.worker else 'there is room'} for {self.positions}"

    @property
    def remedy(self) -> str:
        """Say how to have more room."""
        return "give the worker more memory (--memory)" if self.worker else "allow more (--kv-positions)"


def kv_room(plan: Plan, candidates: Iterable[Candidate], kv_positions: int) -> KvRoom:
    """Return the room for sessions under a plan whose workers all have their floor.

    What memory leaves, up to `kv_positions`; but the least when a worker streams, as more room would mean more to read.
    """
    least = min_positions(plan.model, kv_positions)
    by_worker = {candidate.worker: candidate for candidate in candidates}
    room = KvRoom(kv_positions, None)
    step = StepBounds(rows=plan.step_rows, sampled=plan.step_samples)
    for worker in plan.workers:
        candidate = by_worker[worker]
        need = need_of(plan, candidate, step, kv_positions)
        if need.total_bytes > candidate.budget_bytes:
            return KvRoom(least, worker)
        positions = need.positions_in(candidate.budget_bytes)
        if positions is not None and positions < room.positions:
            room = KvRoom(positions, worker)
    return room


def bytes_text(num_bytes: int) -> str:
    """Write a number of bytes for people, in powers of 1000 and rounded up: 1.3 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            tenths = -(-num_bytes * 10 // size)
            return f"{tenths // 10}.{tenths % 10} {unit}"
    return f"{num_bytes} bytes"

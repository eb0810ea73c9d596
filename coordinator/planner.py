"""Finds the plan: which worker computes which layers, in what shares.

Knows nothing of connections, epochs' lives or sessions; a pure function from devices to a `Plan` or a typed refusal.

With words, each number is a worker's share of the whole model: stages get layers in proportion to the sum of their
shares, members KV-head groups and FFN tiles in proportion to their own. Without words, every worker becomes a pipeline
stage in proportion to how many layers its memory holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.memory import (
    StepBounds,
    bytes_text,
    head_bytes,
    layer_bytes,
    min_positions,
    need_of,
    workspace_bytes,
)
from coordinator.shares import StageShares, deal, deal_stage, format_words
from protocol.errors import BudgetTooSmall, PlanImpossible
from protocol.ids import WorkerId
from protocol.plans import Plan, Share, Stage
from protocol.specs import ModelSpec, Span

AUTOMATIC = "auto"
MAX_STAGES = 128  # keeps a Load within one header
Reach = frozenset[tuple[WorkerId, WorkerId]]
"""Pairs (from, to): the first can dial the second's data socket."""

WAYS_OUT = "give more memory (--memory), let more workers join, or use a smaller dtype (--dtype)"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What kind of plan is wanted; `shares` None: automatic. `head_only`: the head holds no layers."""

    spec: ModelSpec
    shares: tuple[StageShares, ...] | None
    head_only: bool
    step: StepBounds

    def __post_init__(self) -> None:
        """Raises PlanImpossible when the shares can never fit the model, whoever joins."""
        if self.shares is None:
            return
        if len(self.shares) > self.spec.layers:
            raise PlanImpossible(
                f"plan {self.words} has {len(self.shares)} stages, the model has {self.spec.layers} layers",
                remedy="put more members into a stage and use fewer stages",
            )
        for stage in self.shares:
            deal_stage(stage, self.spec.kv_heads, self.spec.ffn_tiles)

    @property
    def words(self) -> str:
        """The plan as people write it."""
        return AUTOMATIC if self.shares is None else format_words(self.shares)

    @property
    def num_workers(self) -> int | None:
        """How many workers an explicit plan needs, the head counted; None: automatic."""
        return None if self.shares is None else sum(map(len, self.shares)) + self.head_only


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A worker that a plan may use, and the memory its owner lets it take."""

    worker: WorkerId
    budget_bytes: int


def seat_workers(head: WorkerId, others: Sequence[WorkerId], seats: Sequence[WorkerId]) -> tuple[WorkerId, ...]:
    """Return the order in which workers take shares: the head, then the others in the `seats` they had, if any.

    Newcomers take the seats of those who left, so a worker that stays keeps its share and with it its tiles.
    """
    newcomers = [worker for worker in others if worker not in seats]
    staying = set(others)
    order = [head]
    for worker in seats[1:]:
        if worker in staying:
            order.append(worker)
            staying.discard(worker)
        elif newcomers:
            order.append(newcomers.pop(0))
    late = [worker for worker in others if worker not in order]
    return (*order, *late)


def make_plan(request: PlanRequest, candidates: Sequence[Candidate], *, epoch: int, reach: Reach = frozenset()) -> Plan:
    """Return the plan over these workers, the head first; `reach` decides which member of a stage is its hub.

    Raises PlanImpossible (too few workers, or too little memory in all) or BudgetTooSmall naming the worker.
    """
    if not candidates:
        raise PlanImpossible("no worker is here", remedy="let a trusted worker join")
    if request.shares is None:
        stages = _automatic_stages(request, candidates)
    else:
        stages = _explicit_stages(request, request.shares, candidates)
    plan = Plan(
        epoch=epoch,
        model=request.spec,
        head=candidates[0].worker,
        stages=tuple(Stage(layers=layers, members=shares, hub=_hub(shares, reach)) for layers, shares in stages),
        wire=request.spec.activations,
        words=request.words,
    )
    _require_budgets(plan, candidates, request.step)
    return plan


_Stages = list[tuple[Span, tuple[Share, ...]]]


def _explicit_stages(request: PlanRequest, shares: tuple[StageShares, ...], candidates: Sequence[Candidate]) -> _Stages:
    spec, seats = request.spec, [candidate.worker for candidate in candidates][request.head_only :]
    wanted = sum(map(len, shares))
    if wanted > len(seats):
        beside = " beside the head" if request.head_only else ""
        raise PlanImpossible(
            f"plan {request.words} has {wanted} shares, but there are {len(seats)} workers{beside}",
            remedy="let more workers join, or use a plan with fewer shares",
        )
    counts = deal(spec.layers, [sum(stage) for stage in shares], [1] * len(shares))
    stages: _Stages = []
    layer = 0
    for count, stage in zip(counts, shares, strict=True):
        members, seats = seats[: len(stage)], seats[len(stage) :]
        stages.append((Span(layer, layer + count), _members(spec, members, stage)))
        layer += count
    return stages


def _members(spec: ModelSpec, workers: Sequence[WorkerId], shares: StageShares) -> tuple[Share, ...]:
    members = []
    group = tile = 0
    for worker, (groups, ffn) in zip(workers, deal_stage(shares, spec.kv_heads, spec.ffn_tiles), strict=True):
        members.append(Share(worker=worker, groups=Span(group, group + groups), ffn=Span(tile, tile + ffn)))
        group, tile = group + groups, tile + ffn
    return tuple(members)


def _automatic_stages(request: PlanRequest, candidates: Sequence[Candidate]) -> _Stages:
    spec = request.spec
    layer = _whole_layer_bytes(spec)
    head = candidates[0]
    free = {one.worker: _free_bytes(request, one, is_head=one is head) for one in candidates}
    room = {worker: min(spec.layers, max(0, left) // layer) for worker, left in free.items()}
    if request.head_only:
        room[head.worker] = 0
    # The largest rooms, should there be more workers than layers; `sorted` is stable, so the head wins ties.
    fitting = [worker for worker, layers in room.items() if layers]
    chosen = set(sorted(fitting, key=lambda worker: -room[worker])[: min(spec.layers, MAX_STAGES)])
    workers = [worker for worker in fitting if worker in chosen]
    held = sum(room[worker] for worker in workers)
    if held < spec.layers:
        missing = bytes_text((spec.layers - held) * layer + max(0, -free[head.worker]))
        raise PlanImpossible(
            f"the {len(candidates)} workers' memory holds {held} of {spec.layers} layers; about {missing} are missing",
            remedy=WAYS_OUT,
        )
    rooms = [room[worker] for worker in workers]
    counts = deal(spec.layers, rooms, [1] * len(rooms))
    ends = [sum(counts[: number + 1]) for number in range(len(counts))]
    groups, ffn = Span(0, spec.kv_heads), Span(0, spec.ffn_tiles)
    return [
        (Span(end - count, end), (Share(worker=worker, groups=groups, ffn=ffn),))
        for worker, count, end in zip(workers, counts, ends, strict=True)
    ]


def _whole_layer_bytes(spec: ModelSpec) -> int:
    """Bytes of one layer and its keys and values for one context."""
    weights = layer_bytes(spec, Span(0, spec.kv_heads), Span(0, spec.ffn_tiles))
    return weights + spec.kv_bytes_per_token(spec.kv_heads, 1) * min_positions(spec)


def _free_bytes(request: PlanRequest, candidate: Candidate, *, is_head: bool) -> int:
    """Return what a worker's memory leaves for layers beside what it must hold anyway; negative when not even that."""
    spec = request.spec
    fixed = workspace_bytes(spec, ffn_tiles=spec.ffn_tiles, is_head=is_head, step=request.step)
    return candidate.budget_bytes - fixed - (head_bytes(spec) if is_head else 0)


def _hub(members: tuple[Share, ...], reach: Reach) -> int:
    """Return the rank of the member with most direct links to the others; the first of equals."""

    def num_links(rank: int) -> int:
        own, others = members[rank].worker, [share.worker for share in members]
        return sum((own, other) in reach or (other, own) in reach for other in others if other != own)

    return max(range(len(members)), key=lambda rank: (num_links(rank), -rank))


def _require_budgets(plan: Plan, candidates: Sequence[Candidate], step: StepBounds) -> None:
    budgets = {candidate.worker: candidate.budget_bytes for candidate in candidates}
    for worker in plan.workers:
        need, budget = need_of(plan, worker, step), budgets[worker]
        if need.total_bytes > budget:
            raise BudgetTooSmall(
                f"{worker} needs {bytes_text(need.total_bytes)} for its part of plan {plan.words} "
                f"({bytes_text(need.tile_bytes)} of weights), its budget is {bytes_text(budget)}",
                node=worker,
                phase="planning",
            )

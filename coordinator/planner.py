"""Finds the plan: which worker computes which layers, in what shares.

Knows nothing of connections, epochs' lives or sessions; a pure function from devices to a `Plan` or a typed refusal.

With words, each number is a worker's share of the whole model: stages get layers in proportion to the sum of their
shares, members KV-head groups and FFN tiles in proportion to their own. Without words, every worker becomes a pipeline
stage in proportion to how many layers its memory holds; when that is not enough, weights flow from the workers' disks,
alike on all in proportion to their memory.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from coordinator.memory import (
    DEFAULT_KV_POSITIONS,
    Candidate,
    Holding,
    Need,
    StepBounds,
    bytes_text,
    kv_room,
    need_of,
    need_of_holding,
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
    kv_positions: int = DEFAULT_KV_POSITIONS  # of all sessions together; fewer when memory holds no more

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

    Prompts are computed in smaller pieces where memory for the temporaries of the wanted ones is lacking. Raises
    PlanImpossible (too few workers, or too little memory in all) or BudgetTooSmall naming the worker, with the least
    that it must have.
    """
    if not candidates:
        raise PlanImpossible("no worker is here", remedy="let a trusted worker join")
    *wanted, least = request.step.smaller()
    for step in wanted:
        with contextlib.suppress(PlanImpossible, BudgetTooSmall):
            return _make_plan(replace(request, step=step), candidates, epoch, reach)
    return _make_plan(replace(request, step=least), candidates, epoch, reach)


def _make_plan(request: PlanRequest, candidates: Sequence[Candidate], epoch: int, reach: Reach) -> Plan:
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
        step_rows=request.step.rows,
        step_samples=request.step.sampled,
    )
    _require_floors(plan, request, candidates)
    return replace(plan, kv_positions=kv_room(plan, candidates, request.kv_positions).positions)


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
    """Hold all weights in memory if that is possible, else stream."""
    spec = request.spec
    needs = _layer_needs(request)
    servants = [_Servant(needs, one, is_head=one is candidates[0]) for one in candidates]
    layers = _deal_held(servants, spec.layers) or _deal_streamed(servants, spec.layers)
    if layers is None:
        raise _too_little_memory(servants, spec.layers)
    groups, ffn = Span(0, spec.kv_heads), Span(0, spec.ffn_tiles)
    stages: _Stages = []
    start = 0
    for one, count in zip(candidates, layers, strict=True):
        if count:
            stages.append((Span(start, start + count), (Share(worker=one.worker, groups=groups, ffn=ffn),)))
            start += count
    return stages


def _too_little_memory(servants: Sequence[_Servant], num_layers: int) -> PlanImpossible:
    head, bearers = servants[0], [one for one in servants if one.takes_layers]
    if not bearers:
        return PlanImpossible("no worker is here beside the head, which holds no layers", remedy="let a worker join")
    held, streamed = (sum(one.room(streams=streams) for one in bearers) for streams in (False, True))
    beside = max(0, head.bytes_for(0, streams=True) - head.candidate.budget_bytes)
    missing = min(one.missing_bytes(num_layers - streamed) + (one is not head) * beside for one in bearers)
    what = f"holds {held} of {num_layers} layers" + (f" ({streamed} with streaming)" if streamed > held else "")
    return PlanImpossible(
        f"the {len(servants)} workers' memory {what}; about {bytes_text(missing)} are missing", remedy=WAYS_OUT
    )


class _LayerNeeds:
    """What whole layers of one model cost, kept for each number of them: a thousand devices ask for the same few."""

    def __init__(self, request: PlanRequest) -> None:
        self.request = request
        self._needs: dict[tuple[int, bool, bool], Need] = {}

    def of(self, candidate: Candidate, num_layers: int, *, is_head: bool) -> Need:
        """Return what a worker must have to hold so many layers, but for the bytes that its bare process takes."""
        key = num_layers, is_head, candidate.can_stream
        found = self._needs.get(key)
        return found if found is not None else self._needs.setdefault(key, self._count(*key))

    def _count(self, num_layers: int, is_head: bool, can_stream: bool) -> Need:
        spec = self.request.spec
        whole = Span(0, spec.kv_heads), Span(0, spec.ffn_tiles)
        groups, ffn = whole if num_layers else (Span(0, 0), Span(0, 0))
        holding = Holding(spec=spec, groups=groups, ffn=ffn, num_layers=num_layers, is_head=is_head)
        anybody = Candidate(worker=WorkerId(""), budget_bytes=0, can_stream=can_stream)
        return need_of_holding(holding, anybody, self.request.step, self.request.kv_positions)


@lru_cache(maxsize=8)
def _layer_needs(request: PlanRequest) -> _LayerNeeds:
    return _LayerNeeds(request)


class _Servant:
    """A worker that may get whole layers, and how many of them its memory allows."""

    def __init__(self, needs: _LayerNeeds, candidate: Candidate, *, is_head: bool) -> None:
        self.candidate = candidate
        self.takes_layers = not (is_head and needs.request.head_only)
        self._num_layers = needs.request.spec.layers
        self._needs = needs
        self._is_head = is_head

    def need(self, num_layers: int) -> Need:
        """What it must have to hold so many layers, beside what its process takes."""
        return self._needs.of(self.candidate, num_layers, is_head=self._is_head)

    def bytes_for(self, num_layers: int, *, streams: bool) -> int:
        """Bytes it must have to hold so many layers, with all of their weights in memory or as few as it may."""
        need = self.need(num_layers)
        return self.candidate.base_bytes + (need.floor_bytes if streams else need.total_bytes)

    def room(self, *, streams: bool) -> int:
        """How many layers its budget allows."""
        if not self.takes_layers:
            return 0
        sizes = range(1, self._num_layers + 1)
        budget = self.candidate.budget_bytes
        return bisect_right(sizes, budget, key=lambda count: self.bytes_for(count, streams=streams))

    def missing_bytes(self, more_layers: int) -> int:
        """Bytes its budget lacks for so many layers more than it has room for."""
        wanted = self.room(streams=True) + more_layers
        return self.bytes_for(wanted, streams=True) - self.candidate.budget_bytes


def _deal_held(servants: Sequence[_Servant], num_layers: int) -> tuple[int, ...] | None:
    """Return each one's layers in proportion to how many fit into its memory; None when not all do."""
    rooms = _rooms(servants, num_layers, streams=False)
    if sum(rooms) < num_layers:
        return None
    chosen = [number for number, room in enumerate(rooms) if room]
    counts = deal(num_layers, [rooms[number] for number in chosen], [1] * len(chosen))
    by_number = dict(zip(chosen, counts, strict=True))
    return tuple(by_number.get(number, 0) for number in range(len(rooms)))


def _deal_streamed(servants: Sequence[_Servant], num_layers: int) -> tuple[int, ...] | None:
    """Return layers so that all hold about the same part of their weights in memory; None when floors don't allow it.

    Nobody gets more than its floor allows; what would be more is dealt again among the others.
    """
    rooms = _rooms(servants, num_layers, streams=True)
    if sum(rooms) < num_layers:
        return None
    weights = _fair_weights(servants, num_layers)
    counts = [0] * len(rooms)
    while (left := num_layers - sum(counts)) > 0:
        able = [number for number, room in enumerate(rooms) if counts[number] < room]
        # Those with no claim of their own (a head whose memory the vocabulary takes) get what nobody else can hold.
        wanted = [number for number in able if weights[number]] or able
        dealt = deal(left, [max(1, weights[number]) for number in wanted], [0] * len(wanted))
        for number, more in zip(wanted, dealt, strict=True):
            counts[number] = min(rooms[number], counts[number] + more)
    return tuple(counts)


def _fair_weights(servants: Sequence[_Servant], num_layers: int) -> list[int]:
    """Return each one's claim to layers in bytes: its part, by memory, of all weights, less the vocabulary it holds."""
    own = [one.need(0).weight_bytes for one in servants]
    # What remains beside process, temporaries and one layer's keys and values.
    free = [
        max(0, one.candidate.budget_bytes - one.bytes_for(1, streams=False) + one.need(1).weight_bytes)
        for one in servants
    ]
    layer = servants[-1].need(1).weight_bytes - own[-1]
    everything = num_layers * layer + sum(own)
    return [
        max(0, mine * everything // max(1, sum(free)) - held) if one.takes_layers else 0
        for one, mine, held in zip(servants, free, own, strict=True)
    ]


def _rooms(servants: Sequence[_Servant], num_layers: int, *, streams: bool) -> list[int]:
    """Return how many layers each has room for; only the largest count, should there be more workers than layers."""
    rooms = [one.room(streams=streams) for one in servants]
    budgets = [one.candidate.budget_bytes for one in servants]
    # A stable order, so that of equals the first wins: the head.
    order = sorted(range(len(rooms)), key=lambda number: (-rooms[number], -budgets[number]))
    kept = set(order[: min(num_layers, MAX_STAGES)])
    return [room if number in kept else 0 for number, room in enumerate(rooms)]


def _hub(members: tuple[Share, ...], reach: Reach) -> int:
    """Return the rank of the member with most direct links to the others; the first of equals."""

    def num_links(rank: int) -> int:
        own, others = members[rank].worker, [share.worker for share in members]
        return sum((own, other) in reach or (other, own) in reach for other in others if other != own)

    return max(range(len(members)), key=lambda rank: (num_links(rank), -rank))


def _require_floors(plan: Plan, request: PlanRequest, candidates: Sequence[Candidate]) -> None:
    """Raise BudgetTooSmall for the first worker that can't hold its part, even by streaming where it may."""
    by_worker = {candidate.worker: candidate for candidate in candidates}
    for worker in plan.workers:
        candidate = by_worker[worker]
        need = need_of(plan, candidate, request.step, request.kv_positions)
        if need.floor_bytes > candidate.budget_bytes:
            weights = f"{bytes_text(need.least_bytes)} of weights"
            if need.least_bytes < need.weight_bytes:
                weights += f" while the rest of {bytes_text(need.weight_bytes)} flows from its disk"
            raise BudgetTooSmall(
                f"{worker} needs {bytes_text(need.floor_bytes)} for its part of plan {plan.words} ({weights}), "
                f"its budget is {bytes_text(candidate.budget_bytes)}",
                node=worker,
                phase="planning",
            )

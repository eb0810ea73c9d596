"""The plan: which worker holds which tiles of which layers, in one immutable value that carries its epoch.

Knows nothing of how a plan is found. Constructors prove that spans tile `[0, layers)` and that shares cover every
tile once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from protocol.ids import WorkerId
from protocol.schema import Count, Epoch, Name
from protocol.specs import ActivationFormat, ModelSpec, Span, require_tiling
from protocol.tiles import TileId, head_tiles, layer_tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one member holds in every layer of its stage: a range of KV-head groups and a range of FFN tiles.

    Either range may be empty (more members than KV-head groups): that member then adds nothing to that sum.
    """

    worker: WorkerId
    groups: Span
    ffn: Span

    def __post_init__(self) -> None:
        if not len(self.groups) and not len(self.ffn):
            raise ValueError(f"share of {self.worker} holds no tile")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A span of layers and the members that compute it together; `members[hub]` is the centre of their star.

    Partial sums are added in the order of `members`, whoever is hub.
    """

    layers: Span
    members: tuple[Share, ...]
    hub: Count = 0

    def __post_init__(self) -> None:
        if not len(self.layers):
            raise ValueError("a stage needs at least one layer")
        if not 0 <= self.hub < len(self.members):
            raise ValueError(f"hub {self.hub} is not one of {len(self.members)} members")
        names = [share.worker for share in self.members]
        if len(set(names)) != len(names):
            raise ValueError(f"a worker stands twice in one stage: {names}")

    @property
    def hub_worker(self) -> WorkerId:
        """The worker at the centre of the star."""
        return self.members[self.hub].worker

    def rank_of(self, worker: WorkerId) -> int:
        """Return the rank of a member; raises KeyError for a stranger."""
        for rank, share in enumerate(self.members):
            if share.worker == worker:
                return rank
        raise KeyError(worker)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Stages in order, the head, and the wire format of hidden states; `epoch` names this membership and plan."""

    epoch: Epoch
    model: ModelSpec
    head: WorkerId
    stages: tuple[Stage, ...]
    wire: ActivationFormat
    words: Name = "auto"  # the plan as its author wrote it, e.g. "1,1/2,1"
    kv_positions: Count = 0  # of all sessions together: the size of each worker's KV arena
    step_rows: Count = 0  # the largest step there will be, and how many of its rows are sampled
    step_samples: Count = 0

    def __post_init__(self) -> None:
        require_tiling(tuple(stage.layers for stage in self.stages), self.model.layers, "layers of the stages")
        for number, stage in enumerate(self.stages):
            where = f"stage {number}"
            groups = tuple(share.groups for share in stage.members)
            require_tiling(groups, self.model.kv_heads, f"KV-head groups of {where}")
            require_tiling(tuple(share.ffn for share in stage.members), self.model.ffn_tiles, f"FFN tiles of {where}")
        members = [share.worker for stage in self.stages for share in stage.members]
        if len(set(members)) != len(members):
            raise ValueError(f"a worker stands in two stages: {members}")

    @property
    def workers(self) -> tuple[WorkerId, ...]:
        """Every worker of the plan, the head first, each once."""
        members = [share.worker for stage in self.stages for share in stage.members]
        return tuple(dict.fromkeys([self.head, *members]))

    def stage_of(self, worker: WorkerId) -> int | None:
        """Return the number of the stage that `worker` is a member of, or None (a head without tiles)."""
        for number, stage in enumerate(self.stages):
            if any(share.worker == worker for share in stage.members):
                return number
        return None

    def prompt_rows(self, most: int) -> int:
        """Return how many rows of prompts a step may have: `most`, or fewer where memory for more is lacking."""
        return min(most, self.step_rows - self.step_samples) if self.step_rows else most

    def enters_after(self, number: int, layer: int) -> bool:
        """Say whether a layer is one of this stage or of the next: what enters it goes no further from this hub."""
        following = self.stages[min(number + 1, len(self.stages) - 1)]
        return self.stages[number].layers.start <= layer < following.layers.end

    def tiles_of(self, worker: WorkerId) -> tuple[TileId, ...]:
        """Return the tiles that `worker` must hold."""
        tiles = list(head_tiles(self.model)) if worker == self.head else []
        number = self.stage_of(worker)
        if number is not None:
            stage = self.stages[number]
            share = stage.members[stage.rank_of(worker)]
            for layer in range(stage.layers.start, stage.layers.end):
                tiles += layer_tiles(layer, share.groups, share.ffn)
        return tuple(tiles)

    def links(self) -> tuple[tuple[WorkerId, WorkerId], ...]:
        """Return each pair of workers that must exchange data frames, as (hub side, other side), each pair once."""
        pairs: list[tuple[WorkerId, WorkerId]] = []
        for stage in self.stages:
            pairs += [(stage.hub_worker, share.worker) for share in stage.members if share.worker != stage.hub_worker]
        hubs = [stage.hub_worker for stage in self.stages]
        pairs += list(itertools.pairwise(hubs))
        pairs += [(hubs[0], self.head), (hubs[-1], self.head)]
        unique: dict[frozenset[WorkerId], tuple[WorkerId, WorkerId]] = {}
        for pair in pairs:
            if pair[0] != pair[1]:
                unique.setdefault(frozenset(pair), pair)
        return tuple(unique.values())

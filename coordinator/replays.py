"""What has to be computed again of a session after a change of plan: which positions, through which layers.

Knows nothing of queues or steps; a pure function of what workers say they have. Positions that only some layers lack
are computed through these alone, when what enters the first of them is kept by the hub of its stage or of the stage
before, or is the embedding. Whatever can't be proven is computed through all layers, from the least position on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from protocol.ids import SessionId, WorkerId
from protocol.messages import HeldKv, Loaded
from protocol.plans import Plan
from protocol.specs import NO_LAYERS, Span


class Kept(NamedTuple):
    """So many positions of what enters a layer are kept by the hub of `stage`."""

    positions: int
    stage: int


@dataclass(slots=True)
class Remains:
    """What the workers of a plan have of one session, each from its beginning.

    `lengths`: positions of keys and values, by layer. `inputs`: what is kept where it can be put in, by the layer that
    it enters.
    """

    lengths: list[int]
    inputs: dict[int, Kept] = field(default_factory=dict)


class Replay(NamedTuple):
    """A session goes on at `start`; up to `until` only `layers` are computed again, from there on all.

    `stage`: whose hub puts in what enters the first of these layers.
    """

    start: int
    until: int
    layers: Span = NO_LAYERS
    stage: int = 0

    def num_rows(self, reached: int, num_layers: int) -> int:
        """Return the positions times layers that it takes to come to where the session was."""
        return (self.until - self.start) * len(self.layers) + (reached - self.until) * num_layers


class Repeated(NamedTuple):
    """What some sessions have to compute again: positions, positions times layers, and the layers, from first to last.

    `layers` is empty when there is nothing to compute again.
    """

    positions: int = 0
    rows: int = 0
    layers: Span = NO_LAYERS

    def plus(self, other: Repeated) -> Repeated:
        """Add what others have to compute again."""
        if not self.positions or not other.positions:
            return self if self.positions else other
        layers = Span(min(self.layers.start, other.layers.start), max(self.layers.end, other.layers.end))
        return Repeated(self.positions + other.positions, self.rows + other.rows, layers)

    def text(self, num_layers: int) -> str:
        """Say it in a few words; empty when there is nothing."""
        if not self.positions or len(self.layers) == num_layers:
            return f"{self.positions} positions" if self.positions else ""
        return f"{layers_text(self.layers)} of {self.positions} positions"


NOTHING: Final = Repeated()


def layers_text(layers: Span) -> str:
    """Return "layers 4 to 7", the last one included."""
    return f"layer {layers.start}" if len(layers) == 1 else f"layers {layers.start} to {layers.end - 1}"


def find_remains(plan: Plan, reports: Mapping[WorkerId, Loaded]) -> dict[SessionId, Remains]:
    """Return what is left of each session that some worker names; what a worker does not say it has is not there."""
    claims = {worker: {one.session: one for one in reports[worker].held} for worker in plan.workers}
    sessions = dict.fromkeys(session for held in claims.values() for session in held)
    remains = {session: _remains(plan, session, claims) for session in sessions}
    if not all(reports[worker].knows_layers for worker in plan.workers):
        for one in remains.values():
            one.lengths = [min(one.lengths)] * len(one.lengths)
    return remains


def find_replay(remains: Remains, reached: int) -> Replay:
    """Return the way that computes least for a session of which `reached` positions were computed before."""
    lengths = [min(length, reached) for length in remains.lengths]
    start = min(lengths)
    ways = [Replay(start, start)]
    for until in sorted({*lengths, *(min(kept.positions, reached) for kept in remains.inputs.values())}):
        lacking = [layer for layer, length in enumerate(lengths) if length < until]
        if until <= start or not lacking:
            continue
        layers = Span(lacking[0], lacking[-1] + 1)
        kept = remains.inputs.get(layers.start) if layers.start else Kept(until, 0)  # the head embeds its log again
        if len(layers) < len(lengths) and kept is not None and kept.positions >= until:
            ways.append(Replay(start, until, layers, kept.stage))
    return min(ways, key=lambda way: way.num_rows(reached, len(lengths)))


def repeated_by(replay: Replay, reached: int, num_layers: int) -> Repeated:
    """Return what one session has to compute again."""
    if replay.start >= reached:
        return NOTHING
    layers = replay.layers if replay.until == reached else Span(0, num_layers)
    return Repeated(reached - replay.start, replay.num_rows(reached, num_layers), layers)


def _remains(plan: Plan, session: SessionId, claims: Mapping[WorkerId, Mapping[SessionId, HeldKv]]) -> Remains:
    found = Remains([])
    for number, stage in enumerate(plan.stages):
        parts = [
            _lengths(claims[share.worker].get(session), stage.layers) for share in stage.members if len(share.groups)
        ]
        found.lengths += [min(lengths) for lengths in zip(*parts, strict=True)]
        held = claims[stage.hub_worker].get(session)
        for one in held.inputs if held is not None else ():
            if plan.enters_after(number, one.layer):
                found.inputs[one.layer] = max(Kept(one.positions, number), found.inputs.get(one.layer, Kept(0, 0)))
    return found


def _lengths(held: HeldKv | None, layers: Span) -> list[int]:
    """Return the positions that a worker says it has, by layer."""
    lengths = [held.positions if held is not None else 0] * len(layers)
    for more in held.layers if held is not None else ():
        for layer in more.layers & layers:
            lengths[layer - layers.start] = max(lengths[layer - layers.start], more.positions)
    return lengths

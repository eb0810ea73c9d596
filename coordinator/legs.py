"""The words in which an answer says who computed it.

Knows nothing of sessions.
"""

from __future__ import annotations

from coordinator.replays import NOTHING, Repeated
from protocol.messages import Leg
from protocol.plans import Plan, Stage
from protocol.specs import NO_LAYERS

MAX_STAGES = 128
MAX_TEXT = 1000  # characters


def leg_of(plan: Plan, start: int, cause: str, repeated: Repeated = NOTHING) -> Leg:
    """Return the leg of an answer that begins under a plan at its token `start`."""
    stages = tuple(_line(stage)[:MAX_TEXT] for stage in plan.stages[:MAX_STAGES])
    return Leg(
        epoch=plan.epoch,
        start=start,
        words=plan.words,
        stages=stages,
        repeated=repeated.positions,
        cause=cause[:MAX_TEXT],
        layers=repeated.layers if len(repeated.layers) < plan.model.layers else NO_LAYERS,
    )


def _line(stage: Stage) -> str:
    members = ", ".join(share.worker for share in stage.members)
    return f"layers {stage.layers.start} to {stage.layers.end - 1}: {members}"

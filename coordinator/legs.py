"""The words in which an answer says who computed it.

Knows nothing of sessions.
"""

from __future__ import annotations

from protocol.messages import Leg
from protocol.plans import Plan, Stage

MAX_STAGES = 128
MAX_TEXT = 1000  # characters


def leg_of(plan: Plan, start: int, repeated: int, cause: str) -> Leg:
    """Return the leg of an answer that begins under a plan at its token `start`."""
    stages = tuple(_line(stage)[:MAX_TEXT] for stage in plan.stages[:MAX_STAGES])
    return Leg(
        epoch=plan.epoch, start=start, words=plan.words, stages=stages, repeated=repeated, cause=cause[:MAX_TEXT]
    )


def _line(stage: Stage) -> str:
    members = ", ".join(share.worker for share in stage.members)
    return f"layers {stage.layers.start} to {stage.layers.end - 1}: {members}"

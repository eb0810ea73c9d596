"""Whether a worker is far behind its own pace: a suspect, not a corpse.

Knows nothing of plans. While steps are under way a worker's progress counter moves at a certain pace; one whose counter
stands still for much longer than it ever did is suspect, until it moves again.
"""

from __future__ import annotations

from typing import Final

from coordinator.registry import Member
from protocol.ids import WorkerId

LEAST_S: Final = 2.0  # heartbeats are half a second apart: less proves nothing
TIMES: Final = 8.0  # as long as the usual pause between two moves of its counter
SMOOTHING: Final = 0.2


class Pace:
    """The usual pause of each worker between two moves of its progress counter, while there was work."""

    def __init__(self) -> None:
        self._usual_s: dict[WorkerId, float] = {}  # bounded by the number of keys that were ever admitted
        self._moved_at: dict[WorkerId, float] = {}

    def is_late(self, member: Member, oldest_step_at: float | None, now: float) -> bool:
        """Take in what is known now; say whether the worker stands still for too long although there is work."""
        before = self._moved_at.get(member.worker)
        self._moved_at[member.worker] = member.progress_at
        if oldest_step_at is None:
            return False
        if before is not None and member.progress_at > before >= oldest_step_at:
            pause_s = member.progress_at - before
            usual_s = self._usual_s.get(member.worker, pause_s)
            self._usual_s[member.worker] = usual_s + SMOOTHING * (pause_s - usual_s)
        stands_s = now - max(member.progress_at, oldest_step_at)
        return stands_s > max(LEAST_S, TIMES * self._usual_s.get(member.worker, LEAST_S))

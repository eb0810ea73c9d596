"""Which workers are lost so often that a plan should not count on them for a while.

Knows nothing of why they were lost. Each loss beyond the first few within `MEMORY_S` doubles how long the worker must
stay before it is used again.
"""

from __future__ import annotations

from typing import Final

from protocol.ids import WorkerId

MEMORY_S: Final = 300.0
FORGIVEN: Final = 2  # losses that anybody may have
MOST_S: Final = 480.0
MOST_NOTED: Final = 16  # losses of one worker that are remembered


class Probation:
    """The losses of all workers; `first_s`: how long the first one who flaps has to wait, 0: nobody ever has to."""

    def __init__(self, first_s: float) -> None:
        self._first_s = first_s
        self._losses: dict[WorkerId, list[float]] = {}  # bounded by the number of keys that were ever admitted

    def lost(self, worker: WorkerId, now: float) -> None:
        """Note a loss."""
        recent = [at for at in self._losses.get(worker, ()) if now - at < MEMORY_S]
        self._losses[worker] = [*recent, now][-MOST_NOTED:]

    def left_s(self, worker: WorkerId, now: float) -> float:
        """Return how long this worker is not to be used yet; 0 when it may be."""
        recent = [at for at in self._losses.get(worker, ()) if now - at < MEMORY_S]
        beyond = len(recent) - FORGIVEN
        if beyond <= 0 or not self._first_s:
            return 0.0
        return max(0.0, recent[-1] + min(MOST_S, self._first_s * 2.0 ** (beyond - 1)) - now)

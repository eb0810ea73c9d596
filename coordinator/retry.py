"""When the next plan may be tried after one has failed.

Knows nothing of plans. A lost worker is answered at once; after other failures the pause doubles until a step has
succeeded.
"""

from __future__ import annotations

from typing import Final

from protocol.ids import WorkerId

MAX_DOUBLINGS: Final = 16
PROOF_S: Final = 0.3  # after a broken link: the time in which a neighbour that is dead shows it to the coordinator too


class Retry:
    """The pause after failures, from `first_s` to `most_s` seconds."""

    def __init__(self, first_s: float, most_s: float) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._failures = 0
        self._at = 0.0
        self._doubted: WorkerId | None = None

    def is_due(self, now: float) -> bool:
        """Say whether the pause is over."""
        return now >= self._at

    def at_once(self, now: float) -> float:
        """A worker is gone, or a plan ends by choice: nothing to wait for. Returns the pause, as all of these do."""
        return self._pause(0.0, now)

    def after_error(self, now: float) -> float:
        """A plan failed for a reason of its own."""
        self._failures += 1
        return self._pause(self._backoff_s(self._failures - 1), now)

    def after_broken_link(self, doubted: WorkerId, now: float) -> float:
        """A worker lost its link to another, which has the time of a first pause to turn out dead."""
        self._doubted = doubted
        self._failures += 1
        return self._pause(self._backoff_s(self._failures - 1) if self._failures > 1 else PROOF_S, now)

    def lost(self, worker: WorkerId, now: float) -> None:
        """A worker is gone: if it was the doubted one, the broken link was its doing."""
        if worker == self._doubted:
            self._doubted, self._at = None, now

    def succeeded(self) -> None:
        """A step has passed all stages: the next failure pauses from the beginning."""
        self._failures = 0

    def _backoff_s(self, failures: int) -> float:
        return min(self._most_s, self._first_s * 2.0 ** min(failures, MAX_DOUBLINGS))

    def _pause(self, pause_s: float, now: float) -> float:
        self._at = now + pause_s
        return pause_s

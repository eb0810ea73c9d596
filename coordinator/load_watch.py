"""Who of those that load a plan is ready, how far the others have come, and what they brought along.

Knows nothing of what is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from coordinator.cluster_status import LoadingStatus
from coordinator.memory import bytes_text
from coordinator.replays import Remains, find_remains
from protocol.errors import DeadlineExceeded
from protocol.ids import SessionId, WorkerId
from protocol.messages import Loaded, LoadProgress
from protocol.plans import Plan


class _Loading(NamedTuple):
    """How far a worker has come, and since when."""

    step: str
    done_bytes: int
    total_bytes: int
    since: float


class LoadWatch:
    """The workers of one epoch, from the order to load until all have loaded."""

    def __init__(self, epoch: int = 0, workers: Iterable[WorkerId] = (), now: float = 0.0) -> None:
        self.epoch = epoch
        self._loading = {worker: _Loading("", 0, 0, now) for worker in workers}
        self.reports: dict[WorkerId, Loaded] = {}

    @property
    def awaited(self) -> tuple[WorkerId, ...]:
        """The workers that have not loaded yet."""
        return tuple(self._loading)

    def progressed(self, worker: WorkerId, progress: LoadProgress, now: float) -> None:
        """A worker's loading got further (or not: then its deadline stays)."""
        before = self._loading.get(worker)
        if before is None or progress.epoch != self.epoch:
            return
        moved = (progress.phase, progress.done_bytes) != (before.step, before.done_bytes)
        since = now if moved else before.since
        self._loading[worker] = _Loading(progress.phase, progress.done_bytes, progress.total_bytes, since)

    def loaded(self, worker: WorkerId, loaded: Loaded) -> bool:
        """Take in that a worker is ready; False when that was not awaited."""
        if loaded.epoch != self.epoch or worker not in self._loading:
            return False
        del self._loading[worker]
        self.reports[worker] = loaded
        return True

    def lost(self, worker: WorkerId) -> None:
        """Wait for a worker no longer: it only gave what it had, and whoever waits for that goes on without."""
        self._loading.pop(worker, None)

    def stuck(self, now: float, limit_s: float) -> DeadlineExceeded | None:
        """Return what to say of the first worker that has made no progress for so long; None when all move."""
        for worker, state in self._loading.items():
            if now - state.since >= limit_s:
                text = f"{worker} made no progress in loading for {limit_s:g} s ({state.step or 'not begun'})"
                return DeadlineExceeded(text, node=worker, phase="loading")
        return None

    def remains(self, plan: Plan) -> dict[SessionId, Remains]:
        """Return what those that have loaded still have of each carried session."""
        return find_remains(plan, self.reports)

    def status_of(self, worker: WorkerId) -> LoadingStatus | None:
        """Return how far a worker has come; None when nobody waits for it."""
        state = self._loading.get(worker)
        if state is None:
            return None
        return LoadingStatus(step=state.step, done_bytes=state.done_bytes, total_bytes=state.total_bytes)

    def text(self) -> str:
        """Say how far all have come."""
        done = sum(state.done_bytes for state in self._loading.values())
        total = sum(state.total_bytes for state in self._loading.values())
        return f"{bytes_text(done)} of {bytes_text(total)}, waiting for {', '.join(self._loading)}"

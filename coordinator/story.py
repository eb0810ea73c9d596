"""What happened to the cluster, in words for people and in numbers for those who measure; the latest of each.

Knows nothing of why it happened. Times are the core's, in seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from coordinator.memory import bytes_text
from coordinator.replays import NOTHING, Repeated
from protocol.plans import Plan
from protocol.tiles import TileId, tile_bytes

MAX_HAPPENINGS: Final = 64
MAX_RECOVERIES: Final = 32


class Happening(NamedTuple):
    """One line of the story."""

    at: float
    text: str


@dataclass(slots=True, kw_only=True)
class Recovery:
    """The way from one plan's end to the next one's first token; times are None until they are reached.

    `worker_load_s`: the longest that a worker took to load, fetching excluded. `repeated`: what was computed again.
    """

    cause: str
    began_at: float
    planned_at: float | None = None
    ready_at: float | None = None
    resumed_at: float | None = None
    epoch: int = 0
    fetched_bytes: int = 0
    worker_load_s: float = 0.0
    repeated: Repeated = NOTHING


class Story:
    """The latest happenings and recoveries."""

    def __init__(self) -> None:
        self.happenings: deque[Happening] = deque(maxlen=MAX_HAPPENINGS)
        self.recoveries: deque[Recovery] = deque(maxlen=MAX_RECOVERIES)

    def tell(self, now: float, text: str) -> None:
        """Add a line."""
        self.happenings.append(Happening(now, text))

    def broke(self, now: float, cause: str) -> None:
        """A plan that served is over; a recovery that is not over yet goes on."""
        if self.current is None:
            self.recoveries.append(Recovery(cause=cause, began_at=now))

    @property
    def current(self) -> Recovery | None:
        """The recovery under way."""
        last = self.recoveries[-1] if self.recoveries else None
        return last if last is not None and last.ready_at is None else None

    def planned(self, now: float, plan: Plan, lacking: Sequence[TileId]) -> None:
        """The next plan is made and sent; `lacking`: tiles that nobody is known to have."""
        size = bytes_text(sum(tile_bytes(plan.model, tile) for tile in lacking))
        fetch = f"; at most {len(lacking)} tiles to fetch ({size})" if lacking else ""
        self.tell(now, f"planned over {', '.join(plan.workers)} ({plan.words}){fetch}")
        if self.current is not None:
            self.current.planned_at, self.current.epoch = now, plan.epoch

    def ready(self, now: float, plan: Plan, *, fetched_bytes: int, worker_load_s: float, repeated: Repeated) -> None:
        """The next plan serves."""
        what = repeated.text(plan.model.layers)
        self.tell(now, f"ready; {what} to compute again" if what else "ready")
        recovery = self.current
        if recovery is not None:
            recovery.ready_at, recovery.fetched_bytes = now, fetched_bytes
            recovery.worker_load_s, recovery.repeated = worker_load_s, repeated

    def resumed(self, now: float) -> None:
        """A session got a token."""
        last = self.recoveries[-1] if self.recoveries else None
        if last is not None and last.ready_at is not None and last.resumed_at is None:
            last.resumed_at = now

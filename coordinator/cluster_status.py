"""The cluster as people see it: a tree of plain values that the rim turns into JSON.

Knows nothing of JSON, nor of how the values came about.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.events import Phase
from coordinator.story import Happening, Recovery
from protocol.errors import ManyhandsError
from protocol.ids import WorkerId
from protocol.messages import DeviceProfile, Heartbeat, Loaded, Role
from protocol.plans import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingStatus:
    """How far a worker has come with its part of a plan; `step` is fetch, load or link, empty when it has not begun."""

    step: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker. `heartbeat` is its last one, `loaded` what it said when it had loaded its part of the plan.

    `link`: "relay" when one of its links of the plan goes through the coordinator, else "direct". `loading` is None
    for a worker that the plan does not wait for. `state`: what else there is to say: that it leaves, is paused, on
    probation or suspect, and why; mostly empty.
    """

    name: WorkerId
    role: Role
    profile: DeviceProfile
    addresses: tuple[str, ...]
    heartbeat: Heartbeat | None
    loaded: Loaded | None
    last_heard_s: float
    link: str
    loading: LoadingStatus | None
    state: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionCounts:
    """Sessions on the workers, and in the queue."""

    running: int
    waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStatus:
    """Positions of keys and values that all sessions together may have, and those that are taken."""

    positions: int
    used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Counts since the coordinator started; `requests`: those queued; `errors`: those that failed."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    errors: int = 0

    def plus(self, *, prompt_tokens: int = 0, completion_tokens: int = 0, requests: int = 0, errors: int = 0) -> Totals:
        """Return the counts after so many more."""
        return Totals(
            prompt_tokens=self.prompt_tokens + prompt_tokens,
            completion_tokens=self.completion_tokens + completion_tokens,
            requests=self.requests + requests,
            errors=self.errors + errors,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """The whole cluster. `plan` is None while there is none; `last_error` is empty when nothing ever failed.

    `now`: the core's own time, which stands still while the coordinator is away; happenings and recoveries count by it.
    """

    term: int
    epoch: int
    phase: Phase
    detail: str
    plan: Plan | None
    workers: tuple[WorkerStatus, ...]
    sessions: SessionCounts
    kv: KvStatus
    totals: Totals
    last_error: str
    refusal: ManyhandsError | None = None  # why the workers that are here can't hold the model, while that is so
    happenings: tuple[Happening, ...] = ()
    recoveries: tuple[Recovery, ...] = ()
    now: float = 0.0

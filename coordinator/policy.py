"""The core's knobs in one checked value.

Knows nothing of files, flags or the environment; the rim builds it from its configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from coordinator.memory import DEFAULT_KV_POSITIONS

MAX_SESSIONS = 1024  # rows of one Step
MAY_BE_ZERO = frozenset({"spares", "probation_s", "return_s"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPolicy:
    """What the coordinator waits for, how long, and how much it takes on. Times in seconds.

    `plan_words` None: automatic, over all workers as soon as there are `workers` (the head counts) of them.
    `head_only`: the head holds no layers. `kv_positions`: the most tokens of all sessions together whose keys and
    values the workers keep; fewer when memory holds no more. `spares`: how many lost workers at once the others should
    have the tiles for; `replicate_kv`: keys and values are copied to who would take over; `probation_s`: how long a
    worker that is lost time and again must stay before it is used again, 0 for never; `return_s`: how long after its
    own restart the coordinator waits for the workers that it had.
    """

    plan_words: str | None = None
    workers: int = 1
    head_only: bool = False
    heartbeat_s: float = 0.5
    lease_s: float = 2.8
    probe_timeout_s: float = 3.0
    load_timeout_s: float = 60.0  # without a LoadProgress that got further
    step_timeout_s: float = 60.0  # without progress on any worker of the plan
    form_timeout_s: float = 60.0  # how long a request waits for a model that isn't even loading
    retry_first_s: float = 1.0
    retry_most_s: float = 30.0
    max_sessions: int = 16
    max_waiting: int = 256
    prefill_chunk: int = 256
    kv_positions: int = DEFAULT_KV_POSITIONS
    spares: int = 0
    replicate_kv: bool = False
    probation_s: float = 30.0
    return_s: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                if field.name in MAY_BE_ZERO and value == 0:
                    continue
                raise ValueError(f"{field.name} {value} must be positive")
        if self.max_sessions > MAX_SESSIONS:
            raise ValueError(f"max_sessions {self.max_sessions} exceeds {MAX_SESSIONS}")
        if self.heartbeat_s >= self.lease_s:
            raise ValueError(f"heartbeat_s {self.heartbeat_s} must be shorter than lease_s {self.lease_s}")

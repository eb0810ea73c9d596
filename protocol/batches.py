"""What one step computes: which rows of which sessions, and how a session's next token is chosen.

Knows nothing of queues or tensors. A step's hidden states are the rows of its sessions one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from protocol.ids import SessionId
from protocol.schema import Count, Within
from protocol.specs import Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRows:
    """`count` consecutive positions of one session from `start`; `capacity` positions are reserved for its KV cache.

    `sample` says that the last of these rows yields the session's next token. `at`: where in the KV arena of every
    worker the session's positions lie; the coordinator hands out these places, alike for all. `alone`: each row attends
    by itself, as it did when it was the newest: computed again it gets the same bits.
    """

    session: SessionId
    start: Count
    count: Positive
    capacity: Positive
    sample: bool = False
    at: Count = 0
    alone: bool = False

    def __post_init__(self) -> None:
        if self.start + self.count > self.capacity:
            raise ValueError(f"rows [{self.start}, {self.start + self.count}) exceed the capacity {self.capacity}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a session's tokens are chosen; `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 switch those filters off.

    The random number of a token depends on (seed, position) alone, so a resumed stream samples the same tokens.
    """

    temperature: Annotated[float, Within(0.0, 100.0)] = 0.0
    top_k: Count = 0
    top_p: Annotated[float, Within(0.0, 1.0)] = 1.0
    min_p: Annotated[float, Within(0.0, 1.0)] = 0.0
    repetition_penalty: Annotated[float, Within(0.01, 100.0)] = 1.0
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 1e-6, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.01, 100.0),
            ("top_k", 0, 2**31 - 1),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses NaN
                raise ValueError(f"{name} {value} is outside [{low}, {high}]")


def num_rows(rows: tuple[SessionRows, ...]) -> int:
    """Return how many rows of hidden states the batch has."""
    return sum(part.count for part in rows)

"""The sessions, as the life of the plan needs them.

Knows nothing of what a session is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from coordinator.events import Effect
from coordinator.memory import KvRoom
from coordinator.replays import Remains, Repeated
from protocol.errors import ManyhandsError
from protocol.ids import SessionId
from protocol.messages import Carry
from protocol.plans import Plan


class Service(Protocol):
    """The sessions, as the life of the plan needs them. While `is_held`, no step begins."""

    is_held: bool

    @property
    def is_idle(self) -> bool:
        """Whether no session holds anything on the workers."""
        ...

    @property
    def is_between_steps(self) -> bool:
        """Whether no step is under way."""
        ...

    @property
    def num_tokens_shown(self) -> int:
        """Tokens of the answers of all sessions that run."""
        ...

    @property
    def num_open(self) -> int:
        """Sessions that run or wait."""
        ...

    def prepare(self, plan: Plan, room: KvRoom) -> tuple[Carry, ...]:
        """Give the sessions that have begun their places under a plan that is about to load."""
        ...

    def serve(self, plan: Plan, remains: Mapping[SessionId, Remains]) -> Repeated:
        """Go on under a plan; returns what is computed again."""
        ...

    def interrupt(self, error: ManyhandsError, now: float) -> list[Effect]:
        """The plan is over because of an error."""
        ...

    def rest(self, cause: str, now: float) -> None:
        """The plan is over between two steps, for a better one."""
        ...

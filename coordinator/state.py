"""The coordinator's core: one state, `handle(event, now) -> effects`.

Knows nothing of sockets, clocks, files or threads; `now` is a parameter, and the rim carries out the effects.
"""

from __future__ import annotations

from coordinator.cluster_status import ClusterStatus
from coordinator.events import Effect, Event
from coordinator.policy import ClusterPolicy
from protocol.ids import SessionId, WorkerId
from protocol.plans import Plan
from protocol.specs import ModelSpec


class ClusterState:
    """Membership, the plan and the sessions of one model. Mutated through `handle` only, by one thread.

    `term` rises with every start of the coordinator; epochs of a later term are greater than all before.
    """

    def __init__(self, spec: ModelSpec, policy: ClusterPolicy, *, term: int) -> None:
        """Raises PlanImpossible when the policy's plan words can't be read or never fit this model."""
        raise NotImplementedError

    @property
    def plan(self) -> Plan | None:
        """The plan that is loading or ready."""
        raise NotImplementedError

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event at monotonic time `now` (seconds) and return what must be done, in order.

        Raises InvariantBroken for a bug (a session number used twice); everything a peer can cause comes back as
        effects.
        """
        raise NotImplementedError

    def can_relay(self, source: WorkerId, target: WorkerId) -> bool:
        """Say whether the plan that is loading or ready has a relayed link between these two."""
        raise NotImplementedError

    def session_phase(self, session: SessionId) -> str:
        """Say in a few words what an open session waits for; empty for an unknown one."""
        raise NotImplementedError

    def status(self, now: float) -> ClusterStatus:
        """Describe the whole cluster."""
        raise NotImplementedError

"""Who is here: members with their role, device, lease and place in the order of joining.

Knows nothing of plans or sockets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from coordinator.events import WorkerJoined
from protocol.ids import WorkerId
from protocol.liveness import Lease
from protocol.messages import DeviceProfile, Heartbeat, Peer, Role


@dataclass(slots=True, kw_only=True)
class Member:
    """One worker that is here. `order`: when its name was first seen, kept when it comes back."""

    worker: WorkerId
    role: Role
    public_key: bytes
    profile: DeviceProfile
    addresses: tuple[str, ...]
    order: int
    incarnation: int
    lease: Lease
    progress_at: float
    heartbeat: Heartbeat | None = None

    @property
    def peer(self) -> Peer:
        """How other workers reach this one."""
        return Peer(worker=self.worker, public_key=self.public_key, addresses=self.addresses)


class Registry:
    """The members, by name. Bounded by the number of keys that were ever admitted."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._members: dict[WorkerId, Member] = {}
        self._order: dict[WorkerId, int] = {}
        self._incarnations = 0

    def __contains__(self, worker: WorkerId) -> bool:
        return worker in self._members

    def __iter__(self) -> Iterator[Member]:
        """Members in the order in which their names first appeared."""
        return iter(sorted(self._members.values(), key=lambda member: member.order))

    def __len__(self) -> int:
        return len(self._members)

    def get(self, worker: WorkerId) -> Member | None:
        """Return a member, or None for a stranger."""
        return self._members.get(worker)

    def join(self, event: WorkerJoined, now: float) -> Member:
        """Enter a worker; an older incarnation under the same name is replaced."""
        self._incarnations += 1
        lease = Lease(self._lease_s)
        lease.heard(now)
        member = Member(
            worker=event.worker,
            role=event.role,
            public_key=event.public_key,
            profile=event.hello.profile,
            addresses=event.hello.data_addresses,
            order=self._order.setdefault(event.worker, len(self._order)),
            incarnation=self._incarnations,
            lease=lease,
            progress_at=now,
        )
        self._members[event.worker] = member
        return member

    def leave(self, worker: WorkerId) -> Member | None:
        """Forget a worker; returns it, or None for a stranger."""
        return self._members.pop(worker, None)

    def heard(self, worker: WorkerId, heartbeat: Heartbeat | None, now: float) -> Member | None:
        """Renew a worker's lease; returns it, or None for a stranger. Notes whether its progress counter moved."""
        member = self._members.get(worker)
        if member is None:
            return None
        member.lease.heard(now)
        if heartbeat is not None:
            if member.heartbeat is None or heartbeat.progress != member.heartbeat.progress:
                member.progress_at = now
            member.heartbeat = heartbeat
        return member

    def silent(self, now: float) -> list[Member]:
        """Return the members whose lease is over."""
        return [member for member in self if member.lease.is_over(now)]

    def renew_all(self, now: float) -> None:
        """Begin every lease anew: the coordinator itself was away, so silence proves nothing."""
        for member in self._members.values():
            member.lease.heard(now)

    @property
    def head(self) -> Member | None:
        """The trusted worker that came first, or None."""
        return next((member for member in self if member.role is Role.HEAD), None)

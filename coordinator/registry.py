"""Who is here: members with their role, device, lease, place in the order of joining, and what is on their disks.

Knows nothing of plans or sockets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from coordinator.events import WorkerJoined
from protocol.ids import WorkerId
from protocol.liveness import Lease
from protocol.messages import DeviceProfile, Heartbeat, Peer, Role
from protocol.tiles import TileId


@dataclass(slots=True, kw_only=True)
class Member:
    """One worker that is here. `order`: when its name was first seen, kept when it comes back.

    `is_leaving`: it hands over and ends, `is_own_wish` when it asked itself, `is_dismissed` once it was told that it
    may. `is_suspect`: it is far behind its own pace.
    """

    worker: WorkerId
    role: Role
    public_key: bytes
    profile: DeviceProfile
    addresses: tuple[str, ...]
    tile_addresses: tuple[str, ...]
    order: int
    incarnation: int
    lease: Lease
    progress_at: float
    heartbeat: Heartbeat | None = None
    is_leaving: bool = False
    is_own_wish: bool = False
    is_dismissed: bool = False
    is_suspect: bool = False

    @property
    def paused(self) -> str:
        """Why its owner does not want it to compute now; empty when it may."""
        return self.heartbeat.paused if self.heartbeat else ""

    @property
    def peer(self) -> Peer:
        """How other workers reach this one."""
        return Peer(worker=self.worker, public_key=self.public_key, addresses=self.addresses)

    @property
    def tile_peer(self) -> Peer:
        """How other workers fetch tiles from this one."""
        return Peer(worker=self.worker, public_key=self.public_key, addresses=self.tile_addresses)


class Registry:
    """The members, by name. Bounded by the number of keys that were ever admitted."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._members: dict[WorkerId, Member] = {}
        self._order: dict[WorkerId, int] = {}
        self._tiles: dict[WorkerId, set[TileId]] = {}
        self._incarnations = 0
        self.revision = 0  # rises when somebody comes, goes, or can be used otherwise than before
        self._last_head: WorkerId | None = None
        self._head: tuple[int, Member | None] = (-1, None)
        self._leaving: tuple[int, tuple[Member, ...]] = (-1, ())

    def __contains__(self, worker: WorkerId) -> bool:
        return worker in self._members

    def __iter__(self) -> Iterator[Member]:
        """Members in the order in which their names first appeared."""
        return iter(self._members.values())

    def __len__(self) -> int:
        return len(self._members)

    @property
    def names(self) -> frozenset[WorkerId]:
        """The names of all members."""
        return frozenset(self._members)

    def get(self, worker: WorkerId) -> Member | None:
        """Return a member, or None for a stranger."""
        return self._members.get(worker)

    def join(self, event: WorkerJoined, now: float) -> Member:
        """Enter a worker; an older incarnation under the same name is replaced."""
        self._incarnations += 1
        self.revision += 1
        lease = Lease(self._lease_s)
        lease.heard(now)
        member = Member(
            worker=event.worker,
            role=event.role,
            public_key=event.public_key,
            profile=event.hello.profile,
            addresses=event.hello.data_addresses,
            tile_addresses=event.hello.tile_addresses,
            order=self._order.setdefault(event.worker, len(self._order)),
            incarnation=self._incarnations,
            lease=lease,
            progress_at=now,
        )
        is_last = member.order >= max((other.order for other in self._members.values()), default=-1)
        self._members[event.worker] = member
        if not is_last:
            self._members = dict(sorted(self._members.items(), key=lambda item: item[1].order))
        return member

    def leave(self, worker: WorkerId) -> Member | None:
        """Forget a worker; returns it, or None for a stranger."""
        self.revision += worker in self._members
        return self._members.pop(worker, None)

    def mark_leaving(self, worker: WorkerId, *, own_wish: bool) -> Member | None:
        """Note that a worker is to hand over and go; returns it, or None for a stranger."""
        member = self._members.get(worker)
        if member is not None:
            self.revision += 1
            member.is_leaving, member.is_own_wish = True, member.is_own_wish or own_wish
        return member

    def mark_staying(self, member: Member) -> None:
        """Note that a worker can't be spared after all."""
        self.revision += 1
        member.is_leaving = False

    def heard(self, worker: WorkerId, heartbeat: Heartbeat | None, now: float) -> Member | None:
        """Renew a worker's lease; returns it, or None for a stranger. Notes whether its progress counter moved."""
        member = self._members.get(worker)
        if member is None:
            return None
        member.lease.heard(now)
        if heartbeat is not None:
            if member.heartbeat is None or heartbeat.progress != member.heartbeat.progress:
                member.progress_at = now
            was_paused, member.heartbeat = member.paused, heartbeat
            self.revision += bool(was_paused) != bool(heartbeat.paused)
        return member

    def note_tiles(self, worker: WorkerId, tiles: Iterable[TileId]) -> None:
        """Remember what is on a worker's disk, also when it comes back later."""
        self._tiles.setdefault(worker, set()).update(tiles)

    def num_tiles(self, worker: WorkerId) -> int:
        """Return how many tiles a worker is known to have on its disk."""
        return len(self._tiles.get(worker, ()))

    def lacks(self, worker: WorkerId, tiles: Iterable[TileId]) -> list[TileId]:
        """Return those of `tiles` that a worker is not known to have on its disk."""
        known = self._tiles.get(worker, set())
        return [tile for tile in tiles if tile not in known]

    def silent(self, now: float) -> list[Member]:
        """Return the members whose lease is over."""
        return [member for member in self if member.lease.is_over(now)]

    def renew_all(self, now: float) -> None:
        """Begin every lease anew: the coordinator itself was away, so silence proves nothing."""
        for member in self._members.values():
            member.lease.heard(now)

    @property
    def head(self) -> Member | None:
        """The trusted worker that was head last, else the one that came first; one that leaves only for want of others.

        None when no trusted worker is here.
        """
        if self._head[0] != self.revision:
            trusted = [member for member in self if member.role is Role.HEAD]
            best = min(trusted, key=lambda one: (one.is_leaving, one.worker != self._last_head), default=None)
            self._head = self.revision, best
        return self._head[1]

    def was_head(self, worker: WorkerId | None) -> None:
        """Remember who is head, or was before the coordinator's restart: it has tiles, keys and values of its own."""
        if worker != self._last_head:
            self._last_head = worker
            self.revision += 1

    @property
    def leaving(self) -> tuple[Member, ...]:
        """The members that are to hand over and go."""
        if self._leaving[0] != self.revision:
            self._leaving = self.revision, tuple(member for member in self if member.is_leaving)
        return self._leaving[1]

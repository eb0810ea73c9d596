"""The sources of tiles: for each, how fast it answers, how much to ask of it at once, and whether to ask it at all.

Knows nothing of sockets or clocks: times are parameters. A source sets its own pace: it is asked for about a second's
worth of what it has shown it can send, so a fast one gets more and a slow one is never far behind when the end comes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from protocol.ids import WorkerId
from protocol.messages import Holder, Peer
from protocol.tiles import TileEntry, TileId, TileKind

COORDINATOR: Final = WorkerId("")
AHEAD_S: Final = 1.0  # how much is under way, in time
BITE_S: Final = 0.25  # how much is asked for by one request, in time
FIRST_BITE_BYTES: Final = 64 << 10  # of a source that has shown nothing yet
LEAST_BITE_BYTES: Final = 8 << 10
PEER_BITE_BYTES: Final = 256 << 10  # at most of a peer, which has memory for few of them
MAX_PIECES: Final = 32
LEAST_PIECES: Final = 2  # once it is measured, so that it never waits for the next question
STALL_S: Final = 4.0
LATE_S: Final = 0.3  # of silence, after which others may give what a peer has
REST_S: Final = 0.5
MAX_FAILURES: Final = 3  # in a row, without a byte between them
HEAD_START_S: Final = 0.3  # of peers that have not answered yet, before the coordinator is asked for what they have
PATIENCE_S: Final = 1.0  # how long the peers may still take, before the coordinator helps
KEPT_SHARE: Final = 0.8  # of what an answer counts for the pace, when the next one comes


class PieceKey(NamedTuple):
    """A request of a source: `offset` within the tile of this hash."""

    digest: bytes
    offset: int


class _Asked(NamedTuple):
    length: int
    at: float


class Source:
    """A peer, or the coordinator (empty name), which is asked last, is never given up, and has all tiles."""

    def __init__(self, worker: WorkerId, holds: Collection[bytes], most_bite_bytes: int) -> None:
        self.worker = worker
        self.holds = holds
        self.lacks: set[bytes] = set()  # what it said, or has shown, that it can't give
        self.pace_s: float | None = None  # seconds a byte takes; None until the first answer
        self.under_way: dict[PieceKey, _Asked] = {}
        self.under_way_bytes = 0
        self.num_opening = 0
        self.is_dropped = False
        self.is_suspect = False
        self._most_bite_bytes = most_bite_bytes
        self._failures = 0
        self._rests_until = 0.0
        self._heard_at = 0.0
        self._seconds = self._bytes = 0.0  # of the latest answers, older ones counting less

    @property
    def is_coordinator(self) -> bool:
        """Whether this is the last resort."""
        return self.worker == COORDINATOR

    def can_give(self, digest: bytes) -> bool:
        """Whether it has this tile as far as we know, and is still a source at all."""
        return not self.is_dropped and digest not in self.lacks and digest in self.holds

    def is_resting(self, now: float) -> bool:
        """Whether it failed a moment ago."""
        return now < self._rests_until

    def has_room(self, now: float) -> bool:
        """Whether it may be asked for more now."""
        if self.is_dropped or self.is_resting(now):
            return False
        pieces = len(self.under_way) + self.num_opening
        if self.pace_s is None:
            return not pieces
        return pieces < LEAST_PIECES or (pieces < MAX_PIECES and self.under_way_bytes * self.pace_s < AHEAD_S)

    def bite_bytes(self) -> int:
        """Return how much to ask for by one request."""
        if self.pace_s is None:
            return min(FIRST_BITE_BYTES, self._most_bite_bytes)
        return min(max(LEAST_BITE_BYTES, int(BITE_S / self.pace_s)), self._most_bite_bytes)

    def seconds_to(self, num_bytes: int) -> float | None:
        """Return when this many bytes more would be here, in seconds; None when it has shown nothing yet."""
        return None if self.pace_s is None else (self.under_way_bytes + num_bytes) * self.pace_s

    def lateness_s(self, key: PieceKey, now: float) -> float:
        """Return how long the answer may still take; of one that is overdue, as long again as it is overdue."""
        asked = self.under_way[key]
        due = asked.at + self.under_way_bytes * (self.pace_s or 0.0)
        return abs(due - now)

    def ask(self, key: PieceKey, length: int, now: float) -> None:
        """A request goes out."""
        if not self.under_way:
            self._heard_at = now  # its silence before was no fault
        self.under_way[key] = _Asked(length, now)
        self.under_way_bytes += length

    def answer(self, key: PieceKey, now: float) -> int | None:
        """A chunk came: return the length that was asked for, None when nobody asked."""
        asked = self._end(key)
        if asked is None:
            return None
        if self.pace_s is None:
            self._seconds = self._bytes = 0.0
        self._seconds = KEPT_SHARE * self._seconds + max(now - max(asked.at, self._heard_at), 1e-6)
        self._bytes = KEPT_SHARE * self._bytes + asked.length
        self.pace_s = self._seconds / self._bytes
        self.speak(now)
        return asked.length

    def speak(self, now: float) -> None:
        """It is alive, whatever it said."""
        self._heard_at = now
        self._failures = 0

    def lack(self, digest: bytes) -> list[PieceKey]:
        """It can't give this tile: return what was asked of it."""
        self.lacks.add(digest)
        return [key for key in tuple(self.under_way) if key.digest == digest and self._end(key)]

    def is_stalled(self, now: float) -> bool:
        """Whether it owes an answer and has been silent for longer than any of its answers should take."""
        silence_s = now - self._heard_at
        if not self.under_way or silence_s < STALL_S:
            return False
        longest_bytes = max(asked.length for asked in self.under_way.values())
        return silence_s >= 3 * longest_bytes * (self.pace_s or 0.0)

    def is_lively(self, now: float) -> bool:
        """Whether it has answered, and does not owe the next answer for much longer than that takes."""
        return self.pace_s is not None and self.is_in_time(now)

    def is_in_time(self, now: float) -> bool:
        """Whether nothing speaks against it: its next answer is not late, and it may be asked."""
        if self.is_dropped or self.is_resting(now):
            return False
        due_s = max((asked.length for asked in self.under_way.values()), default=0) * (self.pace_s or 0.0)
        return now - self._heard_at < LATE_S + 3 * due_s if self.under_way else self.pace_s is not None

    def fail(self, now: float) -> list[PieceKey]:
        """It is silent, unreachable or gone: let it rest, longer each time. Return what was asked of it."""
        if not self.is_coordinator:  # without it there is nothing to wait for: it is asked again at once
            self._failures += 1
            self._rests_until = now + REST_S * 2**self._failures
            self.is_dropped = self._failures >= MAX_FAILURES
            self.pace_s = None  # it has to show anew that it answers
        return self._end_all()

    def busy(self, now: float) -> list[PieceKey]:
        """It has too much to do: ask nothing for a moment. Return what was asked of it."""
        self._rests_until = now + REST_S
        return self._end_all()

    def drop(self) -> list[PieceKey]:
        """Never ask it again. Return what was asked of it."""
        self.is_dropped = True
        return self._end_all()

    def _end_all(self) -> list[PieceKey]:
        return [key for key in tuple(self.under_way) if self._end(key)]

    def _end(self, key: PieceKey) -> _Asked | None:
        asked = self.under_way.pop(key, None)
        if asked is not None:
            self.under_way_bytes -= asked.length
        return asked


def holdings(
    holders: Iterable[Holder], entries: Iterable[TileEntry], own_key: bytes
) -> tuple[dict[WorkerId, Peer], dict[WorkerId, set[bytes]]]:
    """Return the peers that have any of these tiles and can be dialled, and the hashes of those that each has.

    Tiles of the head are the coordinator's to give, whoever else has them.
    """
    wanted = tuple(entries)
    peers: dict[WorkerId, Peer] = {}
    held: dict[WorkerId, set[bytes]] = {}
    for one in holders:
        digests = {entry.digest for entry in wanted if _holds(one, entry.tile)}
        if digests and one.peer.addresses and one.peer.public_key != own_key:
            peers[one.peer.worker] = one.peer
            held.setdefault(one.peer.worker, set()).update(digests)
    return peers, held


def _holds(holder: Holder, tile: TileId) -> bool:
    if tile.layer not in holder.layers:
        return False
    match tile.kind:
        case TileKind.ATTENTION:
            return tile.index in holder.groups
        case TileKind.FFN:
            return tile.index in holder.ffn
        case TileKind.NORMS:
            return True
        case _:
            return False


class Sources:
    """All sources of one fetch; iterated, the coordinator comes last."""

    def __init__(
        self, wanted: Collection[bytes], holders: Mapping[WorkerId, Collection[bytes]], most_bite_bytes: int, now: float
    ) -> None:
        """`holders`: the hashes that each peer is said to have; the coordinator has all that are `wanted`."""
        bite_bytes = min(PEER_BITE_BYTES, most_bite_bytes)
        self.peers = tuple(Source(worker, frozenset(held), bite_bytes) for worker, held in holders.items())
        self.coordinator = Source(COORDINATOR, frozenset(wanted), most_bite_bytes)
        self._by_name = {source.worker: source for source in (*self.peers, self.coordinator)}
        self._started = now

    def __getitem__(self, worker: WorkerId) -> Source:
        return self._by_name[worker]

    def __iter__(self) -> Iterator[Source]:
        return iter(self._by_name.values())

    def has_lively(self, peers: Iterable[Source], now: float) -> bool:
        """Whether one of these answers as it did before; one that has not answered yet has a head start, no more."""
        is_early = now < self._started + HEAD_START_S
        return any(one.is_lively(now) or (is_early and one.pace_s is None and not one.is_resting(now)) for one in peers)

    def coordinator_helps(self, bytes_left: int, now: float) -> bool:
        """Whether the peers would take long, and the coordinator is faster than the best of them, or not known yet."""
        paces = [one.pace_s for one in self.peers if one.pace_s and one.is_lively(now)]
        own = self.coordinator.pace_s
        rest_s = bytes_left / sum(1 / pace for pace in paces) if paces else 0.0
        return rest_s > 2 * PATIENCE_S if own is None else rest_s > PATIENCE_S and own <= min(paces)

"""Requests for tiles that wait to be served: each connection in turn, and no longer a queue than is fair.

Knows nothing of sockets, disks or clocks: time is a parameter.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from protocol.errors import Overloaded
from protocol.frames import Buffer
from protocol.messages import TileRequest

MAX_WAITING: Final = 64  # of one key, whatever the number of its connections
HOLD_FIRST_S: Final = 0.002
HOLD_MOST_S: Final = 0.1


@dataclass(slots=True)
class Waiting:
    """One request: whose it is, the way back, and its answer once that is read."""

    key: bytes
    route: bytes
    asked: TileRequest
    frames: Sequence[Buffer] = ()


@dataclass(slots=True)
class _Lane:
    """The requests of one connection, in order; held back while it does not take what it asked for."""

    requests: deque[Waiting] = field(default_factory=deque)
    held_until: float = 0.0
    hold_s: float = HOLD_FIRST_S


class TileQueue:
    """Who is served next."""

    def __init__(self, most_waiting: int = MAX_WAITING) -> None:
        self._most_waiting = most_waiting
        self._lanes: dict[bytes, _Lane] = {}  # in the order of their turns
        self._num_waiting: Counter[bytes] = Counter()

    def __len__(self) -> int:
        return sum(self._num_waiting.values())

    def add(self, waiting: Waiting) -> Overloaded | None:
        """Take a request in, or return why not."""
        if self._num_waiting[waiting.key] >= self._most_waiting:
            return Overloaded(f"{self._most_waiting} tile requests of this key wait already", phase="serve")
        self._num_waiting[waiting.key] += 1
        self._lanes.setdefault(waiting.route, _Lane()).requests.append(waiting)
        return None

    def next(self, now: float) -> Waiting | None:
        """Return the request whose turn it is, None when all are held back or nobody waits; `done` or `hold` it."""
        for lane in self._lanes.values():
            if lane.held_until <= now:
                return lane.requests[0]
        return None

    def done(self, waiting: Waiting) -> None:
        """It was answered, so its connection keeps up."""
        lane = self._lanes.pop(waiting.route)
        lane.requests.popleft()
        self._uncount(waiting.key)
        if lane.requests:
            lane.hold_s = HOLD_FIRST_S
            self._lanes[waiting.route] = lane  # at the end of the line

    def hold(self, waiting: Waiting, now: float) -> None:
        """Its answer was not taken: try it again, a little later each time."""
        lane = self._lanes.pop(waiting.route)
        lane.held_until = now + lane.hold_s
        lane.hold_s = min(2 * lane.hold_s, HOLD_MOST_S)
        self._lanes[waiting.route] = lane

    def forget(self, route: bytes) -> None:
        """The connection is gone, and with it whoever waits on it."""
        lane = self._lanes.pop(route, None)
        for waiting in lane.requests if lane else ():
            self._uncount(waiting.key)

    def wait_s(self, now: float) -> float | None:
        """Return how long until somebody can be served: 0 at once, None when nobody waits."""
        return min((max(0.0, lane.held_until - now) for lane in self._lanes.values()), default=None)

    def _uncount(self, key: bytes) -> None:
        self._num_waiting[key] -= 1
        if not self._num_waiting[key]:
            del self._num_waiting[key]

"""The compute thread's way out and in: what star and steps send, and which arrival is whose.

Knows nothing of commands but whether one waits that ends what is under way.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from protocol.errors import InvariantBroken, PeerLost
from protocol.frames import Buffer
from protocol.ids import WorkerId
from protocol.messages import KvRows
from worker.doors import Doors, Unread
from worker.due import Due
from worker.kv_traffic import KvTraffic
from worker.links import Links
from worker.wire import Arrival

MAX_INBOX: Final = 1024


class Superseded(Exception):
    """A command waits that ends what is under way."""


class DataPost:
    """What `worker.star`, `worker.steps` and `worker.forming` need of the outside, over the links of one worker.

    `traffic`: who takes keys and values under the plan of the moment; a neighbour that only it needs may be lost.
    """

    def __init__(self, links: Links, is_urgent: Callable[[], bool]) -> None:
        """`is_urgent`: whether a command waits that is about another epoch."""
        self.doors: Callable[[], Doors | None] = links.doors
        self.traffic: KvTraffic | None = None
        self._links = links
        self._is_urgent = is_urgent
        self._inbox: deque[Arrival] = deque()

    def send(self, targets: Sequence[WorkerId], message: object, payload: Buffer) -> None:
        """Send to neighbours."""
        self._links.send(targets, message, payload)

    def send_up(self, message: object) -> None:
        """Send to the coordinator."""
        self._links.send_up(message)

    def give_way(self) -> None:
        """End what is under way when a command waits that is about another epoch."""
        if self._is_urgent():
            raise Superseded

    def next(self, timeout_s: float) -> Arrival | None:
        """Return what arrived first and was not taken yet; None when nothing comes."""
        return self._inbox.popleft() if self._inbox else self._receive(timeout_s)

    def collect(self, due: Due, timeout_s: float, unread: Unread | None = None) -> Arrival | None:
        """Wait for what is due; a `Partial` or `Sum` that is not is returned, what else arrives waits for its turn.

        `unread`: a message that came by a short way and is taken in first.
        """
        missing, deadline = len(due.owing), time.monotonic() + timeout_s
        while due.owing:
            # What has come is taken before way is given: the sum that ends a step is worth the step.
            arrival = self._receive(0 if self._is_urgent() else deadline - time.monotonic(), unread)
            unread = None
            if arrival is not None and not isinstance(arrival.message, bytes):
                self._keep(arrival)
            elif arrival is not None and not due.take(arrival):
                return arrival
            elif arrival is None and due.owing:
                self.give_way()
            if len(due.owing) < missing:
                missing, deadline = len(due.owing), time.monotonic() + timeout_s
            elif time.monotonic() >= deadline:
                break
        return None

    def hear(self) -> None:
        """Take a message that came while a plan is loaded: neighbours say hello meanwhile."""
        self.give_way()
        if (arrival := self._receive(0)) is not None:
            self._keep(arrival)

    def clear(self) -> None:
        """The epoch is over: nothing that waits is wanted."""
        self.traffic = None
        self._inbox.clear()

    def _receive(self, timeout_s: float, unread: Unread | None = None) -> Arrival | None:
        """Return the next message; keys and values are taken at once, whatever is under way."""
        try:
            if unread is not None:
                self._links.read(unread)
            arrival = self._links.receive(timeout_s)
        except PeerLost as error:
            if self.traffic is None or error.node in self.traffic.neighbours:
                raise
            self._links.forget(WorkerId(error.node))
            self.traffic.lost(WorkerId(error.node))
            return None
        if arrival is None or not isinstance(arrival.message, KvRows):
            return arrival
        if self.traffic is not None:
            self.traffic.take(arrival)
        return None

    def _keep(self, arrival: Arrival) -> None:
        if len(self._inbox) >= MAX_INBOX:
            raise InvariantBroken(f"{MAX_INBOX} messages wait to be computed", node=arrival.sender)
        self._inbox.append(arrival)

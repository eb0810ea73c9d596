"""Waits until one of a worker's data sockets can be read from, or its waker has been rung.

Knows nothing of what arrives. `zmq_poll` asks every socket twice and makes two system calls a wait; that is a tenth of
the time of a small sum, so this sleeps on the sockets' descriptors and asks only those that may have something.

A ZeroMQ descriptor tells of a change once, and any call on its socket may take the news (zmq_getsockopt(3), ZMQ_FD).
Hence the rule: a socket is asked from the moment its descriptor spoke, or it was `touched`, that is used, until it has
nothing to tell. Nobody sleeps long without asking all, so a touch forgotten costs time, never a message.
"""

from __future__ import annotations

import selectors
from collections.abc import Iterable
from typing import Any, Final, cast

import zmq

from worker.waker import Waker

POLLIN: Final = int(zmq.POLLIN)
EVENTS: Final = int(zmq.EVENTS)
DESCRIPTOR: Final = int(zmq.FD)
LOOK_EVERY: Final = 64  # waits that end without a sleep, until all descriptors are looked at all the same
SLEEP_MOST_S: Final = 0.5


class Watch:
    """The sockets of one thread, and its waker."""

    def __init__(self, waker: Waker) -> None:
        self._waker = waker
        self._selector = selectors.DefaultSelector()
        self._sockets: list[zmq.Socket[Any]] = []
        self.touched: set[zmq.Socket[Any]] = set()
        """Sockets to ask at the next look: add one that was sent on, or asked for anything."""
        self._awake = 0

    def watch(self, sockets: Iterable[zmq.Socket[Any]]) -> None:
        """From now on wait for these and no others."""
        self._selector.close()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._waker.fileno(), selectors.EVENT_READ, self._waker)
        self._sockets = list(sockets)
        self.touched.clear()
        self.touched.update(self._sockets)
        for socket in self._sockets:
            self._selector.register(cast(int, socket.get(DESCRIPTOR)), selectors.EVENT_READ, socket)

    def readable(self, timeout_s: float) -> list[Any]:
        """Return the sockets with a message to read, and the waker when it was rung.

        The list may be empty before `timeout_s` is over: descriptors also speak of connections made and lost.
        """
        ready: list[Any] = [socket for socket in self._sockets if socket in self.touched and has_message(socket)]
        self.touched.clear()
        self.touched.update(ready)
        self._awake += 1
        if ready and self._awake < LOOK_EVERY:
            return ready
        self._awake = 0
        spoke = self._selector.select(0.0 if ready else min(max(0.0, timeout_s), SLEEP_MOST_S))
        if not spoke and not ready:
            self.touched.update(self._sockets)
        for key, _ in spoke:
            item = key.data
            if item is self._waker:
                ready.append(item)
            elif item not in ready and has_message(item):
                ready.append(item)
                self.touched.add(item)
        return ready

    def close(self) -> None:
        """Give the descriptors back; the sockets stay open."""
        self._selector.close()


def has_message(socket: zmq.Socket[Any]) -> bool:
    """Ask for events: cheaper than to try and be told by an exception."""
    return bool(cast(int, socket.get(EVENTS)) & POLLIN)

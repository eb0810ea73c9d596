"""Waits until one of a worker's data sockets can be read from, or its waker has been rung.

Knows nothing of what arrives. `zmq_poll` asks every socket twice and makes two system calls a wait; between two sums
that is a tenth of the time, so this sleeps on the sockets' descriptors instead.

A ZeroMQ descriptor tells of a change only once, and any call on its socket takes the news (zmq_getsockopt(3), ZMQ_FD).
Hence the rule kept here: sockets that are sent on are asked for their events before every sleep; sockets that are only
read from (monitors) are asked from the moment their descriptor speaks until they have nothing more to tell.
"""

from __future__ import annotations

import selectors
from collections.abc import Iterable
from typing import Any, Final

import zmq

from worker.waker import Waker

POLLIN: Final = int(zmq.POLLIN)
EVENTS: Final = int(zmq.EVENTS)
DESCRIPTOR: Final = int(zmq.FD)
LOOK_EVERY: Final = 64  # waits that end without a sleep, until the descriptors are looked at all the same


def is_readable(socket: zmq.Socket[Any]) -> bool:
    """Whether a message waits; cheaper than to try and be told so by an exception."""
    return bool(socket.get(EVENTS) & POLLIN)


class Watch:
    """The sockets of one thread, and its waker."""

    def __init__(self, waker: Waker) -> None:
        self._waker = waker
        self._selector = selectors.DefaultSelector()
        self._sockets: list[zmq.Socket[Any]] = []
        self._telling: list[zmq.Socket[Any]] = []
        self._awake = 0

    def watch(self, sockets: Iterable[zmq.Socket[Any]], monitors: Iterable[zmq.Socket[Any]]) -> None:
        """From now on wait for these and no others; `monitors` must never be sent on."""
        self._selector.close()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._waker.fileno(), selectors.EVENT_READ, self._waker)
        self._sockets, self._telling = list(sockets), list(monitors)
        for socket in (*self._sockets, *self._telling):
            self._selector.register(socket.get(DESCRIPTOR), selectors.EVENT_READ, socket)

    def readable(self, timeout_s: float) -> list[Any]:
        """Return the sockets with something to read, and the waker when it was rung.

        The list may be empty before `timeout_s` is over: a descriptor also speaks of a connection made or lost.
        """
        ready = [socket for socket in self._sockets if is_readable(socket)]
        if self._telling:
            self._telling = [monitor for monitor in self._telling if is_readable(monitor)]
            ready += self._telling
        self._awake += 1
        if ready and self._awake < LOOK_EVERY:
            return ready
        self._awake = 0
        for key, _ in self._selector.select(0 if ready else max(0.0, timeout_s)):
            spoke = key.data
            if spoke is self._waker:
                ready.append(spoke)
            elif spoke not in ready and is_readable(spoke):
                ready.append(spoke)
                if spoke not in self._sockets:
                    self._telling.append(spoke)
        return ready

    def close(self) -> None:
        """Give the descriptors back; the sockets stay open."""
        self._selector.close()

"""Wakes the compute thread out of its wait for frames when the control side has something to say.

Knows nothing of what is said: that stands in a queue beside it.
"""

from __future__ import annotations

import contextlib
import socket


class Waker:
    """A socket pair: `wake` from any thread makes `fileno` readable until `clear`."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        """The descriptor to poll for reading."""
        return self._reader.fileno()

    def wake(self) -> None:
        """Make the descriptor readable; harmless when it is already, or after `close`."""
        with contextlib.suppress(BlockingIOError, OSError):  # full: it is readable; closed: nobody waits any more
            self._writer.send(b"\0")

    def clear(self) -> None:
        """Take back all wakes so far."""
        with contextlib.suppress(BlockingIOError):
            while self._reader.recv(4096):
                pass

    def close(self) -> None:
        """Close both ends."""
        self._reader.close()
        self._writer.close()

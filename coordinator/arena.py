"""Where in the workers' KV arenas each session lies: places of whole positions, the first gap that is large enough.

Knows nothing of workers or bytes: all workers have arenas of equally many positions, and a place holds for all of them.
"""

from __future__ import annotations

from protocol.errors import InvariantBroken
from protocol.ids import SessionId
from protocol.specs import Span


class Arena:
    """Places in `[0, positions)`. No two overlap; what lies between two places is one gap, whatever was there."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self._places: dict[SessionId, Span] = {}  # in the order of their starts

    @property
    def used(self) -> int:
        """How many positions are taken."""
        return sum(map(len, self._places.values()))

    def take(self, session: SessionId, capacity: int) -> int | None:
        """Give a session the first gap of so many positions and return its start; None when there is no such gap.

        Raises InvariantBroken for a session that has a place, or a capacity below 1.
        """
        if session in self._places or capacity < 1:
            raise InvariantBroken(
                f"session {session} asks for {capacity} positions, in place: {session in self._places}"
            )
        start = 0
        for place in self._places.values():
            if place.start - start >= capacity:
                break
            start = place.end
        if start + capacity > self.positions:
            return None
        self._places[session] = Span(start, start + capacity)
        self._places = dict(sorted(self._places.items(), key=lambda item: item[1].start))
        return start

    def free(self, session: SessionId) -> None:
        """Take a session's place back; raises InvariantBroken when it has none."""
        if self._places.pop(session, None) is None:
            raise InvariantBroken(f"session {session} gives back a place that it does not have")

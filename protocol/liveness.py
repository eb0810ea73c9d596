"""Whether the other side still lives, and how long to wait before dialling it again.

Knows nothing of sockets or clocks: `now` is a parameter (seconds, monotonic), chance is a `random.Random`.
"""

from __future__ import annotations

import math
import random


class Lease:
    """A peer counts as alive for `lease_s` after it was last heard; one that was never heard holds no lease."""

    __slots__ = ("_last_heard", "lease_s")

    def __init__(self, lease_s: float) -> None:
        if not 0 < lease_s < math.inf:
            raise ValueError(f"lease_s {lease_s} must be positive and finite")
        self.lease_s = lease_s
        self._last_heard = -math.inf

    def heard(self, now: float) -> None:
        """Begin the lease anew at `now`; a `now` older than the last one changes nothing."""
        self._last_heard = max(self._last_heard, now)

    def silence_s(self, now: float) -> float:
        """Return seconds since the peer was last heard; infinity when it never was."""
        return max(0.0, now - self._last_heard)

    def is_over(self, now: float) -> bool:
        """Return whether the peer counts as lost; at exactly `lease_s` of silence it does."""
        return self.silence_s(now) >= self.lease_s


class Backoff:
    """Waits that double from `first_s` to `most_s`, each cut at random by up to half.

    The random cut keeps many peers that lost the same coordinator from dialling it in the same instant.
    """

    __slots__ = ("_dice", "_next_s", "first_s", "most_s")

    def __init__(self, first_s: float, most_s: float, dice: random.Random) -> None:
        if not 0 < first_s <= most_s < math.inf:
            raise ValueError(f"back-off needs 0 < first_s <= most_s, not {first_s} and {most_s}")
        self.first_s = first_s
        self.most_s = most_s
        self._dice = dice
        self._next_s = first_s

    def next_s(self) -> float:
        """Return how many seconds to wait before the next try; the one after it waits up to twice as long."""
        whole_s = self._next_s
        self._next_s = min(whole_s * 2, self.most_s)
        return self._dice.uniform(whole_s / 2, whole_s)

    def reset(self) -> None:
        """Start again from `first_s`, after a try that succeeded."""
        self._next_s = self.first_s

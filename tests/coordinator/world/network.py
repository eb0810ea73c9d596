"""The network of the world: late, in order within one connection, cut for a while, and, in some worlds, lossy.

Knows nothing of messages. Across a cut nothing passes until it is healed; then all arrives, as TCP would have it.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable

from world.node import Action, Time

MOST_DELAY_S = 0.08


class Network:
    """`loss` and `doubling`: probabilities for each message while `is_rough`. `num_lost` counts what was lost."""

    def __init__(self, time: Time, dice: random.Random, *, loss: float, doubling: float) -> None:
        self.is_rough = True
        self.num_lost = 0
        self._time = time
        self._dice = dice
        self._loss = loss
        self._doubling = doubling
        self._cuts: dict[tuple[str, str], float] = {}
        self._arrivals: dict[Hashable, float] = {}

    def cut(self, sources: Iterable[str], targets: Iterable[str], for_s: float) -> None:
        """Let nothing pass from any of the sources to any of the targets for a while."""
        until, targets = self._time.now + for_s, list(targets)
        for source in sources:
            for target in targets:
                self._cuts[source, target] = max(until, self._cuts.get((source, target), 0.0))

    def heal(self) -> None:
        """End all bad luck; what waits for a cut's end arrives when it would have."""
        self.is_rough = False
        self._cuts = {}

    def passes(self, source: str, target: str) -> bool:
        """Say whether frames pass both ways."""
        now = self._time.now
        return self._cuts.get((source, target), 0.0) <= now and self._cuts.get((target, source), 0.0) <= now

    def send(
        self,
        source: str,
        target: str,
        connection: Hashable,
        deliver: Action,
        *,
        may_lose: bool = True,
        may_double: bool = True,
    ) -> bool:
        """Deliver late, but in the order of the connection; False when it never will be."""
        if self.is_rough and may_lose and self._loss and self._dice.random() < self._loss:
            self.num_lost += 1
            return False
        self._deliver(source, target, connection, deliver)
        if self.is_rough and may_double and self._doubling and self._dice.random() < self._doubling:
            self._deliver(source, target, connection, deliver)
        return True

    def _deliver(self, source: str, target: str, connection: Hashable, deliver: Action) -> None:
        begins = max(self._time.now, self._cuts.get((source, target), 0.0))
        at = max(self._arrivals.get(connection, 0.0), begins + self._dice.uniform(0.001, MOST_DELAY_S))
        self._arrivals[connection] = at
        self._time.after(at - self._time.now, deliver)

"""Keeps a child process running: started again when it died, with growing waits, unless trying again can't help.

Knows nothing of what the child does. Time is a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from manyhands.processes import ChildProcess, child_error
from protocol import exits

FIRST_WAIT_S: Final = 1.0
MOST_WAIT_S: Final = 30.0
HEALTHY_S: Final = 60.0  # who has lived so long begins with the shortest wait again
HOPELESS: Final = frozenset({exits.USAGE, exits.CONFIG, exits.REFUSED, exits.DATA, exits.CANT_CREATE})


@dataclass(slots=True)
class Waits:
    """How long to wait before each new start: 1, 2, 4 ... 30 s, and 1 s again after a minute of life."""

    _next_s: float = FIRST_WAIT_S

    def after(self, lived_s: float) -> float:
        """Return the wait after a life of so many seconds."""
        wait_s = FIRST_WAIT_S if lived_s >= HEALTHY_S else self._next_s
        self._next_s = min(MOST_WAIT_S, 2 * wait_s)
        return wait_s


class Keeper:
    """Looks after the child that `child` returns, which others may replace too. One thread uses it.

    `start` starts it again, so that `child` returns the new one. `told` gets lines for people.
    """

    def __init__(
        self, name: str, child: Callable[[], ChildProcess], start: Callable[[], object], told: Callable[[str], None]
    ) -> None:
        self._name = name
        self._child = child
        self._start = start
        self._told = told
        self._waits = Waits()
        self._known: ChildProcess | None = None
        self._began_at = 0.0
        self._due_at: float | None = None  # when to start again; None while it lives, never is inf

    def look(self, now: float) -> None:
        """Look at the child at time `now` (seconds); start it again when it is dead and its wait is over.

        Raises `child_error`, once, when it ended for a reason that a new start can't mend.
        """
        child = self._child()
        if child is not self._known:
            self._known, self._began_at, self._due_at = child, now, None
        if child.is_alive:
            return
        if self._due_at is None:
            self._mourn(child, now)
        elif now >= self._due_at:
            self._revive(now)

    def _mourn(self, child: ChildProcess, now: float) -> None:
        """Tell that it died, and when it is started again; one that ended as it was told to stays away."""
        self._due_at = math.inf
        error = child_error(child, self._name)
        if child.process.returncode == exits.OK:
            self._told(f"{self._name} has ended as it was told to; it is not started again")
        elif child.process.returncode in HOPELESS:
            raise error
        else:
            wait_s = self._waits.after(now - self._began_at)
            self._due_at = now + wait_s
            self._told(f"{error.message}; it is started again in {wait_s:g} s")

    def _revive(self, now: float) -> None:
        try:
            self._start()
        except OSError as error:  # no memory or no process number is left for it: later, maybe
            self._due_at = now + self._waits.after(0.0)
            self._told(f"{self._name} can't be started: {error}")

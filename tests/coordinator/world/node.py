"""A process in the world: it lives, freezes and dies, and what is due for it while it is frozen waits.

Knows nothing of what it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Action = Callable[[], None]


class Time(Protocol):
    """Virtual time, in seconds."""

    now: float

    def after(self, delay_s: float, action: Action) -> None:
        """Do something later."""
        ...


class Node:
    """`life` counts its starts: what was meant for an earlier life never happens."""

    def __init__(self, name: str, time: Time) -> None:
        self.name = name
        self.life = 0
        self.is_alive = self.is_frozen = False
        self._time = time
        self._backlog: list[tuple[int, Action]] = []

    def begin_life(self) -> None:
        self.life += 1
        self.is_alive, self.is_frozen = True, False
        self._backlog = []

    def end_life(self) -> None:
        self.is_alive = self.is_frozen = False

    def later(self, delay_s: float, action: Action) -> None:
        """Have this process do something, unless it dies before."""
        life = self.life
        self._time.after(delay_s, lambda: self.take(life, action))

    def take(self, life: int, action: Action) -> None:
        """Do what was meant for this life: now, or once it is no longer frozen."""
        if not self.is_alive or life != self.life:
            return
        if self.is_frozen:
            self._backlog.append((life, action))
        else:
            action()

    def freeze(self, for_s: float) -> None:
        """SIGSTOP, and SIGCONT later."""
        if self.is_alive and not self.is_frozen:
            self.is_frozen = True
            life = self.life
            self._time.after(for_s, lambda: self.thaw(life))

    def thaw(self, life: int) -> None:
        if not self.is_frozen or life != self.life:
            return
        self.is_frozen = False
        waited, self._backlog = self._backlog, []
        for of_life, action in waited:
            self.take(of_life, action)

"""The compute thread's wait for a sum: what extends it, and what comes out of it."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.ids import WorkerId
from worker import post as post_module
from worker.due import OWING, Due
from worker.post import DataPost
from worker.wire import Arrival

SENDERS = tuple(WorkerId(name) for name in "abc")
HEADER = b"header"


class SlowLinks:
    """Hands in one frame every so many seconds of its own clock."""

    def __init__(self, frames: list[Arrival], every_s: float) -> None:
        self.now = 0.0
        self.doors = lambda: None
        self._frames = frames
        self._every_s = every_s

    def receive(self, timeout_s: float) -> Arrival | None:
        if not self._frames or timeout_s < self._every_s:
            self.now += max(timeout_s, 0.0)
            return None
        self.now += self._every_s
        return self._frames.pop(0)


def collect(monkeypatch: pytest.MonkeyPatch, frames: list[Arrival], every_s: float) -> tuple[Due, float]:
    links: Any = SlowLinks(frames, every_s)
    monkeypatch.setattr(post_module.time, "monotonic", lambda: links.now)
    due = Due(1, 2, 4, dict.fromkeys(SENDERS, HEADER), dict.fromkeys(SENDERS, OWING))
    assert DataPost(links, lambda: False).collect(due, 30.0) is None
    return due, links.now


def test_every_part_that_comes_extends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Arrival(sender, HEADER, memoryview(b"four")) for sender in reversed(SENDERS)]
    due, now = collect(monkeypatch, frames, every_s=20.0)
    assert due.owing == []
    assert list(due.parts) == list(SENDERS)  # in the order in which they are added, whatever order they came in
    assert now == 60.0


def test_a_wait_ends_when_nothing_more_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    due, now = collect(monkeypatch, [Arrival(SENDERS[0], HEADER, memoryview(b"four"))], every_s=20.0)
    assert due.owing == list(SENDERS[1:])
    assert now == 50.0

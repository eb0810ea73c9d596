"""What is new between two looks at a cluster, in lines for people; and how fast a long wait gets on.

Knows nothing of terminals, sockets or clocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manyhands.cli.screen import bytes_text
from manyhands.cli.tables import plan_line

Tree = Mapping[str, Any]
SMOOTHING = 0.3  # weight of the newest rate: a pause of a second must not double the time left


def news(before: Tree, after: Tree) -> list[str]:
    """Return what happened between two statuses: workers that came and went, phases, trouble."""
    return [*_workers(before, after), *_trouble(before, after), *_phase(before, after)]


def _workers(before: Tree, after: Tree) -> list[str]:
    was = {worker["name"]: worker for worker in before.get("workers", [])}
    now = {worker["name"]: worker for worker in after.get("workers", [])}
    came = [f"{name} joined ({_device(worker)})" for name, worker in now.items() if name not in was]
    return came + [f"{name} is gone" for name in was if name not in now]


def _device(worker: Tree) -> str:
    machine = f"{worker.get('system', '?')} {worker.get('machine', '')}".strip()
    budget = bytes_text(worker.get("budget_bytes", 0))
    return f"{machine}, {worker.get('device', '?')}, {worker.get('cores', '?')} cores, may take {budget}"


def _trouble(before: Tree, after: Tree) -> list[str]:
    error = after.get("last_error")
    return [f"trouble: {error}"] if error and error != before.get("last_error") else []


def _phase(before: Tree, after: Tree) -> list[str]:
    phase, epoch = after.get("phase"), after.get("epoch")
    if phase == "ready" and (before.get("phase"), before.get("epoch")) != (phase, epoch):
        return [f"ready: plan {plan_line(after)}"]
    detail = after.get("detail", "")
    if phase == "waiting" and (before.get("phase"), before.get("detail")) != (phase, detail):
        return [detail] if detail else []
    if phase == "probing" and before.get("phase") != phase:
        return [detail]
    return []  # LoadMeter tells how loading gets on


class LoadMeter:
    """How loading gets on over all workers of an epoch: bytes, rate, time left, and who does what."""

    def __init__(self) -> None:
        self._epoch: object = None
        self._seen: dict[str, tuple[int, int]] = {}  # name: bytes done, bytes in all
        self._last: tuple[float, int] | None = None
        self._rate = 0.0

    def see(self, status: Tree, now: float) -> str:
        """Take a look at the status at time `now` (seconds); returns a line, empty when nothing loads."""
        if status.get("phase") != "loading":
            self._epoch = None
            return ""
        if status.get("epoch") != self._epoch:
            self._epoch, self._seen, self._last, self._rate = status.get("epoch"), {}, None, 0.0
        busy = {worker["name"]: worker["loading"] for worker in status.get("workers", []) if worker.get("loading")}
        for name, loading in busy.items():
            self._seen[name] = (loading["done_bytes"], loading["total_bytes"])
        for name in self._seen.keys() - busy.keys():  # it has finished
            self._seen[name] = (self._seen[name][1], self._seen[name][1])
        done = sum(done for done, _ in self._seen.values())
        total = sum(total for _, total in self._seen.values())
        self._measure(done, now)
        who = ", ".join(f"{name} {loading['step'] or 'begins'}" for name, loading in busy.items())
        return f"loading: {self._text(done, total)}" + (f" ({who})" if who else "")

    def _measure(self, done: int, now: float) -> None:
        if self._last is not None and now > self._last[0]:
            rate = max(0, done - self._last[1]) / (now - self._last[0])
            self._rate = SMOOTHING * rate + (1 - SMOOTHING) * self._rate if self._rate else rate
        self._last = (now, done)

    def _text(self, done: int, total: int) -> str:
        text = f"{bytes_text(done)} of {bytes_text(total)}"
        if self._rate <= 0 or done >= total:
            return text
        left_s = (total - done) / self._rate
        left = f"{left_s:.0f} s" if left_s < 120 else f"{left_s / 60:.0f} min"
        return f"{text}, {bytes_text(self._rate)}/s, {left} left"

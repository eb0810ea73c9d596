"""What is new between two looks at a cluster, in lines for people; and how fast a long wait gets on.

Knows nothing of terminals, sockets or clocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from manyhands.cli.screen import bytes_text
from manyhands.cli.tables import plan_line

Tree = Mapping[str, Any]
SMOOTHING = 0.3  # weight of the newest rate: a pause of a second must not double the time left


def news(before: Tree, after: Tree) -> list[str]:
    """Return what happened between two statuses: who came, what the coordinator tells of it, phases, states."""
    told = new_events(before, after)
    events = [text for text in told if text != "ready" and not text.endswith(" is here")]  # of these others tell more
    people = [*_came(before, after), *events, *_went(before, after, told), *_states(before, after)]
    return people + _phase(before, after)


def new_events(before: Tree, after: Tree) -> list[str]:
    """Return the texts of the events of a status that an earlier one did not have.

    Both hold the latest few, and events have no numbers: the earlier ones' end is looked for at the later ones' start.
    """
    old, new = ([event["text"] for event in tree.get("events", [])] for tree in (before, after))
    overlap = next(size for size in range(min(len(old), len(new)), -1, -1) if old[len(old) - size :] == new[:size])
    return new[overlap:]


def _came(before: Tree, after: Tree) -> list[str]:
    was = {worker["name"] for worker in before.get("workers", [])}
    return [f"{one['name']} joined ({_device(one)})" for one in after.get("workers", []) if one["name"] not in was]


def _went(before: Tree, after: Tree, told: Iterable[str]) -> list[str]:
    """Who is gone without an event that tells it: those that had no part in the plan."""
    now = {worker["name"] for worker in after.get("workers", [])}
    names = [worker["name"] for worker in before.get("workers", []) if worker["name"] not in now]
    return [f"{name} is gone" for name in names if not any(text.startswith(f"{name} ") for text in told)]


def _states(before: Tree, after: Tree) -> list[str]:
    """Who may not be used, and who may again; of other states the events tell."""
    was = {worker["name"]: worker.get("state", "") for worker in before.get("workers", [])}
    lines = []
    for worker in after.get("workers", []):
        state, old = worker.get("state", ""), was.get(worker["name"], "")
        if _spares(state) and _spares(state) != _spares(old):
            lines.append(f"{worker['name']} is {state}")
        elif _spares(old) and not state:
            lines.append(f"{worker['name']} may be used again")
    return lines


def _spares(state: str) -> str:
    """Return the words of a state in which a worker is not used; what follows them may count seconds."""
    return next((words for words in ("paused", "on probation") if state.startswith(words)), "")


def _device(worker: Tree) -> str:
    machine = f"{worker.get('system', '?')} {worker.get('machine', '')}".strip()
    budget = bytes_text(worker.get("budget_bytes", 0))
    return f"{machine}, {worker.get('device', '?')}, {worker.get('cores', '?')} cores, may take {budget}"


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

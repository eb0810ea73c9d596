"""The cluster as tables and lines for people, from the coordinator's status.

Knows nothing of terminals or of how a status is had. Keys that an older coordinator lacks are shown as a dash.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manyhands.cli.screen import bytes_text, count_text

DASH = "-"
PLAN_HEADINGS = ("worker", "pid", "role", "layers", "groups", "FFN", "weights", "budget", "use", "peak")
WORKER_HEADINGS = ("worker", "role", "phase", "device", "layers", "heard", "link")
MEMORY_HEADINGS = ("worker", "weights", "KV", "budget", "use", "peak")
WORK_HEADINGS = ("worker", "steps", "a step", "computing", "disk", "sums")
STREAM_HEADINGS = ("worker", "pinned", "window", "read/token", "disk", "waiting")

Tree = Mapping[str, Any]
Row = tuple[str, ...]


def plan_rows(status: Tree, pids: Mapping[str, int]) -> list[Row]:
    """Return who holds what: a row for each worker in the order of the plan, a head without layers first."""
    shares = _shares(status)
    head: str = (status.get("plan") or {}).get("head", "")
    workers = {worker["name"]: worker for worker in status.get("workers", [])}
    names = [name for name in (head, *shares) if name in workers]
    return [
        (
            name,
            str(pids.get(name, DASH)),
            _role(name, head, shares),
            _range(shares.get(name, {}).get("layers")),
            _range(shares.get(name, {}).get("groups")),
            _range(shares.get(name, {}).get("ffn")),
            bytes_text(workers[name].get("weight_bytes", 0)),
            *_budget_use_peak(workers[name]),
        )
        for name in dict.fromkeys(names)
    ]


def worker_rows(status: Tree) -> list[Row]:
    """Return how every worker is: a row for each, in the order they joined."""
    shares = _shares(status)
    return [
        (
            worker["name"],
            worker.get("role", DASH),
            worker.get("phase", DASH),
            f"{worker.get('device', DASH)} x{worker.get('cores', DASH)}",
            _range(shares.get(worker["name"], {}).get("layers")),
            f"{worker.get('last_heard_s', 0):.1f} s",
            worker.get("link", DASH),
        )
        for worker in status.get("workers", [])
    ]


def memory_rows(status: Tree) -> list[Row]:
    """Return what every worker may take of its machine's memory, takes, and took at most."""
    return [
        (
            worker["name"],
            bytes_text(worker.get("weight_bytes", 0)),
            bytes_text(worker.get("kv_bytes", 0)),
            *_budget_use_peak(worker),
        )
        for worker in status.get("workers", [])
    ]


def stream_rows(status: Tree) -> list[Row]:
    """Return how the workers do whose weights flow from disk: what stays, what flows, and what waiting for it costs.

    Read per step, which makes one token of every request that is computed. Waiting: the part of the computing time.
    """
    return [
        (
            worker["name"],
            bytes_text(worker.get("pinned_bytes", 0)),
            bytes_text(worker["window_bytes"]),
            bytes_text(worker.get("streamed_bytes_per_step", 0)),
            f"{bytes_text(worker.get('disk_bytes_per_s', 0))}/s",
            f"{worker.get('stalled_share', 0):.0%}",
        )
        for worker in status.get("workers", [])
        if worker.get("window_bytes")
    ]


def work_rows(status: Tree) -> list[Row]:
    """Return where the time of a worker's steps goes: its own computing, waiting for its disk, sums with others."""
    return [
        (
            worker["name"],
            f"{worker['steps']}",
            f"{1e3 * worker.get('step_s', 0):.1f} ms",
            f"{max(0.0, 1 - worker.get('stalled_share', 0) - worker.get('sums_share', 0)):.0%}",
            f"{worker.get('stalled_share', 0):.0%}",
            f"{worker.get('sums_share', 0):.0%}",
        )
        for worker in status.get("workers", [])
        if worker.get("steps")
    ]


def state_rows(status: Tree) -> list[Row]:
    """Return who is paused, on probation, suspect or leaving, and why; those of whom there is nothing to say lack."""
    return [(worker["name"], worker["state"]) for worker in status.get("workers", []) if worker.get("state")]


def event_rows(status: Tree, most: int = 8) -> list[Row]:
    """Return what happened lately, the latest last: how long ago, and what."""
    return [(ago_text(event["ago_s"]), event["text"]) for event in status.get("events", [])[-most:]]


def ago_text(seconds: float) -> str:
    """Return how long ago something was, for people."""
    if seconds < 100:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 6000 else f"{seconds / 3600:.0f} h ago"


def model_line(status: Tree) -> str:
    """Return one line on the model."""
    model = status.get("model") or {}
    size = count_text(model.get("parameters", 0))
    kind = f"{model.get('family', '?')}, {size} parameters, {model.get('layers', '?')} layers"
    return f"{model.get('name', '?')} ({kind}, {model.get('weights', '?')})"


def plan_line(status: Tree) -> str:
    """Return one line on the plan."""
    plan = status.get("plan")
    if not plan:
        return "none yet"
    stages = len(plan.get("stages", []))
    members = len(_shares(status))
    return f"{plan.get('words', '?')} ({members} workers in {stages} stage{'s' if stages != 1 else ''})"


def _shares(status: Tree) -> dict[str, Tree]:
    plan = status.get("plan") or {}
    return {
        member["worker"]: {**member, "layers": stage["layers"], "hub": stage["hub"]}
        for stage in plan.get("stages", [])
        for member in stage["members"]
    }


def _budget_use_peak(worker: Tree) -> tuple[str, str, str]:
    """What a worker may take, takes, and took at most, which not every system tells."""
    peak = worker.get("peak_bytes")
    use = bytes_text(worker.get("resident_bytes", 0))
    return bytes_text(worker.get("budget_bytes", 0)), use, bytes_text(peak) if peak else DASH


def _role(name: str, head: str, shares: Mapping[str, Tree]) -> str:
    roles = ["head"] if name == head else []
    if name in shares:
        roles.append("hub" if shares[name]["hub"] == name else "member")
    return ", ".join(roles) or DASH


def _range(span: Any) -> str:
    """Return the half-open span as it is written everywhere: 0..3 for the layers 0, 1 and 2."""
    if not span or span[0] == span[1]:
        return DASH
    return f"{span[0]}..{span[1]}"

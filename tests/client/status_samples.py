"""Statuses as a coordinator reports them, for the tests of what people see."""

from __future__ import annotations

from typing import Any


def worker(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "role": "worker",
        "phase": "ready",
        "device": "cpu",
        "system": "Linux",
        "machine": "aarch64",
        "cores": 4,
        "memory_bytes": 8_000_000_000,
        "budget_bytes": 4_000_000_000,
        "base_bytes": 200_000_000,
        "predicted_bytes": 330_000_000,
        "resident_bytes": 300_000_000,
        "peak_bytes": 320_000_000,
        "weight_bytes": 3_100_000,
        "kv_bytes": 0,
        "pinned_bytes": 3_100_000,
        "window_bytes": 0,
        "steps": 0,
        "streamed_bytes_per_step": 0,
        "disk_bytes_per_s": 0,
        "step_s": 0.0,
        "stalled_share": 0.0,
        "sums_share": 0.0,
        "last_heard_s": 0.2,
        "addresses": ["127.0.0.1:4000"],
        "link": "direct",
        "loading": None,
        "state": "",
    } | changes


def member(name: str, groups: list[int], ffn: list[int]) -> dict[str, Any]:
    return {"worker": name, "groups": groups, "ffn": ffn}


WORDS = "1,1/1"
PLAN: dict[str, Any] = {
    "words": WORDS,
    "wire": "float32",
    "head": "w1",
    "stages": [
        {"layers": [0, 4], "hub": "w1", "members": [member("w1", [0, 2], [0, 5]), member("w2", [2, 4], [5, 10])]},
        {"layers": [4, 6], "hub": "w3", "members": [member("w3", [0, 4], [0, 10])]},
    ],
}
READY: dict[str, Any] = {
    "cluster": "home",
    "version": "manyhands 0.1.0",
    "term": 1,
    "epoch": 7,
    "phase": "ready",
    "detail": "",
    "model": {
        "name": "demo",
        "family": "llama",
        "layers": 6,
        "hidden": 256,
        "weights": "float32",
        "parameters": 4656384,
    },
    "plan": PLAN,
    "workers": [worker("w1", role="head"), worker("w2"), worker("w3", link="relay")],
    "sessions": {"running": 1, "waiting": 2},
    "kv": {"positions": 8192, "used": 300},
    "totals": {"prompt_tokens": 5, "completion_tokens": 40, "requests": 3, "errors": 0},
    "last_error": "",
    "events": [],
}


def status(**changes: Any) -> dict[str, Any]:
    return READY | changes

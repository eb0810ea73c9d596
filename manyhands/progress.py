"""Whether a cluster that is starting gets on, judged from its status reports; and the words for where it stands.

Knows nothing of processes or clocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from protocol.errors import DeadlineExceeded
from protocol.liveness import Lease

# What changes in a status although nothing gets on.
IDLE_KEYS = frozenset(
    {
        "last_heard_s",
        "resident_bytes",
        "peak_bytes",
        "streamed_bytes_per_step",
        "disk_bytes_per_s",
        "step_s",
        "stalled_share",
        "sums_share",
        "state",
    }
)


def essence(status: Mapping[str, Any]) -> str:
    """Return a text that changes when the cluster gets on, and not when it merely lives."""
    workers = [
        {key: value for key, value in worker.items() if key not in IDLE_KEYS} for worker in status.get("workers", [])
    ]
    return json.dumps([status.get("phase"), status.get("detail"), status.get("epoch"), workers], sort_keys=True)


def headline(status: Mapping[str, Any]) -> str:
    """Return one line on where the cluster stands."""
    phase, detail = status.get("phase", "starting"), status.get("detail", "")
    return f"{phase}: {detail}" if detail else str(phase)


class StartWatch:
    """Bounds the time without progress: `timeout_s` runs anew with every sign of it."""

    def __init__(self, timeout_s: float, now: float) -> None:
        self._lease = Lease(timeout_s)
        self._lease.heard(now)
        self._last_sign = ""
        self._where = "starting"

    def see(self, sign: str, where: str, now: float) -> None:
        """Note what can be seen; a sign that differs from the last one is progress."""
        self._where = where
        if sign != self._last_sign:
            self._last_sign = sign
            self._lease.heard(now)

    def check(self, now: float) -> None:
        """Raise DeadlineExceeded, saying where it stands, when there was no progress for too long."""
        if self._lease.is_over(now):
            raise DeadlineExceeded(
                f"no progress for {self._lease.lease_s:g} s ({self._where})",
                remedy="look into the logs; allow more time with startup_timeout_s",
                phase="start",
            )

"""Start a coordinator, invite and start workers, and wait for the model to form; with deadlines that progress extends.

Knows nothing of where a cluster's folders come from or what they are for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhands.connection import Status
from manyhands.home import CLIENT_LINK_FILE, read_link_file
from manyhands.processes import ChildProcess
from manyhands.progress import StartWatch, essence, headline
from manyhands.sync import Client
from protocol.errors import from_code
from protocol.security import Link

POLL_S = 0.1
READY_FILE = "ready.json"

OnStatus = Callable[[Status], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinator:
    """A running coordinator of ours and the link of its clients."""

    child: ChildProcess
    link: Link
    state_dir: Path


def start_coordinator(
    settings: Mapping[str, str],
    state_dir: Path,
    log_path: Path,
    timeout_s: float,
    started: Callable[[ChildProcess], None],
    *,
    continues_log: bool = False,
) -> Coordinator:
    """Start a coordinator and wait until it listens; what it logs counts as progress.

    `started` gets the child at once, so that the caller can end it whatever happens. Raises `child_error` with the
    coordinator's own words, DeadlineExceeded after `timeout_s` seconds without progress.
    """
    child = ChildProcess(
        "coordinator",
        {**settings, "state_dir": str(state_dir), "exit_on_stdin_close": "true"},
        log_path,
        continues_log=continues_log,
    )
    started(child)
    watch = StartWatch(timeout_s, time.monotonic())
    while not _is_ready(state_dir, child.pid):
        child.require_alive("coordinator")
        watch.see(str(child.log_bytes()), "the coordinator reads the model", time.monotonic())
        watch.check(time.monotonic())
        time.sleep(POLL_S)
    link = Link.parse(read_link_file(state_dir / CLIENT_LINK_FILE))
    return Coordinator(child=child, link=link, state_dir=state_dir)


def start_worker(
    settings: Mapping[str, str], link: str, state_dir: Path, log_path: Path, *, continues_log: bool = False
) -> ChildProcess:
    """Start a worker that joins by this link; one whose state folder knows its cluster needs none that is fresh."""
    own = {"link": link, "state_dir": str(state_dir), "exit_on_stdin_close": "true"}
    return ChildProcess("worker", {**settings, **own}, log_path, continues_log=continues_log)


def wait_until_ready(
    client: Client, children: Mapping[str, ChildProcess], timeout_s: float, on_status: OnStatus | None = None
) -> Status:
    """Wait until the model has formed and return the status; `on_status` sees each status on the way.

    Raises `child_error` when one of the children ends, what the planner refused (PlanImpossible, BudgetTooSmall), and
    DeadlineExceeded after `timeout_s` seconds without progress.
    """
    watch = StartWatch(timeout_s, time.monotonic())
    while True:
        for name, child in children.items():
            child.require_alive(name)
        status = client.status()
        if on_status is not None:
            on_status(status)
        if status.get("phase") == "ready":
            return status
        if (refusal := status.get("refusal")) is not None:
            raise from_code(**refusal)
        logged = sum(child.log_bytes() for child in children.values())
        watch.see(f"{logged} {essence(status)}", headline(status), time.monotonic())
        watch.check(time.monotonic())
        time.sleep(POLL_S)


def _is_ready(state_dir: Path, pid: int) -> bool:
    """Return whether the coordinator of this process id says that it listens (a file of an older one does not)."""
    try:
        ready: Any = json.loads((state_dir / READY_FILE).read_text())
    except (FileNotFoundError, ValueError):  # not there, or not yet whole
        return False
    return isinstance(ready, dict) and ready.get("pid") == pid

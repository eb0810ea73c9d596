"""A coordinator and workers by name for what is measured under trouble: started in no time, killed, stopped, drained.

Knows nothing of what is measured. The first worker is trusted, so it is the head.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from benchmarks.nursery import Nursery
from manyhands import Client
from manyhands.connection import Status
from manyhands.launch import start_coordinator
from manyhands.processes import ChildProcess, stop_all

START_S = 120.0
POLL_S = 0.05


class Fleet:
    """`settings` are the coordinator's, `worker_settings` every worker's; `close` ends and removes everything."""

    def __init__(
        self,
        nursery: Nursery,
        model: Path,
        settings: Mapping[str, str],
        worker_settings: Mapping[str, str] | None = None,
    ) -> None:
        self._nursery = nursery
        self.folder = Path(tempfile.mkdtemp(prefix="manyhands-fleet-"))
        self._worker_settings = dict(worker_settings or {})
        self._all: list[ChildProcess] = []
        self._links: dict[str, str] = {}
        self.workers: dict[str, ChildProcess] = {}
        of_coordinator = {
            "model": str(model),
            "dtype": "float32",
            "port": "0",
            "cache_dir": str(self.folder / "manifests"),
            **settings,
        }
        try:
            self.coordinator = start_coordinator(
                of_coordinator, self.folder / "coordinator", self.folder / "coordinator.log", START_S, self._all.append
            )
            self.client = Client(self.coordinator.link)
        except BaseException:
            stop_all(self._all)
            raise

    @property
    def running(self) -> list[str]:
        """The workers whose process lives."""
        return [name for name, child in self.workers.items() if child.is_alive]

    def folder_of(self, name: str) -> Path:
        """Where a worker keeps its key and its tiles."""
        return self.folder / name

    def start(self, name: str) -> None:
        """Start a worker; one that was here before finds home by itself."""
        link = ""
        if name not in self._links:
            link = self._links[name] = self.client.invite(trusted=not self._links)
        settings = {
            "name": name,
            "threads": "1",
            "listen": "tcp://127.0.0.1:*",
            "state_dir": str(self.folder_of(name) / "state"),
            "cache_dir": str(self.folder_of(name) / "cache"),
            "exit_on_stdin_close": "true",
            "redial_most_s": "1",
            "link": link,
            **self._worker_settings,
        }
        self.workers[name] = self._nursery.start(settings, self.folder_of(name) / "log")
        self._all.append(self.workers[name])

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a worker."""
        self.workers[name].process.send_signal(number)

    def until(self, holds: Callable[[Status], object], timeout_s: float = START_S) -> Status:
        """Wait until something is true of the status; raises TimeoutError with the last one."""
        deadline = time.monotonic() + timeout_s
        while True:
            status = self.client.status()
            if holds(status):
                return status
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true; the last status: {status}")
            time.sleep(POLL_S)

    def until_ready(self, num_workers: int) -> Status:
        """Wait until a plan of this many workers is served."""
        return self.until(lambda status: status["phase"] == "ready" and len(members(status)) == num_workers)

    def coordinator_log(self) -> str:
        """All that the coordinator has logged."""
        return self.coordinator.child.log_path.read_text()

    def close(self) -> None:
        """End every process and remove every file."""
        for child in self._all:
            if child.is_alive:
                child.process.send_signal(signal.SIGCONT)
        self.client.close()
        stop_all(self._all)
        shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def members(status: Status) -> list[str]:
    """Return who computes under the plan of the moment."""
    plan: dict[str, Any] | None = status["plan"]
    return [] if plan is None else [one["worker"] for stage in plan["stages"] for one in stage["members"]]

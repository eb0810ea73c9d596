"""A cluster of real processes whose workers can be killed, frozen and started again on the same folders.

Knows nothing of models or of what goes wrong. Every wait has a deadline and tells what it saw last.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from manyhands import Client
from manyhands.connection import Status
from manyhands.launch import Coordinator, start_coordinator, start_worker, wait_until_ready
from manyhands.processes import ChildProcess, stop_all

DEADLINE_S = 45.0  # generous: several processes start at once on few cores
POLL_S = 0.05


class House:
    """A coordinator, its client, and workers by name; `worker-1` is trusted and so the head."""

    def __init__(self, folder: Path, model: Path, plan: str, **settings: str) -> None:
        self.folder = folder
        self.workers: dict[str, ChildProcess] = {}
        self._all: list[ChildProcess] = []
        self._settings = {
            "model": str(model),
            "plan": plan,
            "dtype": "float32",
            "port": "0",
            "cache_dir": str(folder / "hashes"),
            **settings,
        }
        self.links: dict[str, str] = {}
        try:
            self.coordinator = self._start_coordinator()
            self.client = Client(self.coordinator.link)
        except BaseException:
            stop_all(self._all)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for child in self._all:
            if child.is_alive:
                child.process.send_signal(signal.SIGCONT)  # a frozen one can't be told
        self.client.close()
        stop_all(self._all)

    def _start_coordinator(self) -> Coordinator:
        log = self.folder / "coordinator.log"
        return start_coordinator(self._settings, self.folder / "coordinator", log, DEADLINE_S, self._all.append)

    def restart_coordinator(self) -> None:
        """Kill the coordinator and start it again on its folder and its port."""
        self.coordinator.child.process.kill()
        self.coordinator.child.process.wait(DEADLINE_S)
        self._settings["port"] = self.coordinator.link.addresses[0].rpartition(":")[2]
        self.coordinator = self._start_coordinator()

    def cache_of(self, name: str) -> Path:
        """Where this worker keeps its tiles."""
        return self.folder / name / "cache"

    def start(self, name: str, link: str | None = None, **settings: str) -> ChildProcess:
        """Start a worker; a new one is invited, one that was here before finds home by itself."""
        if link is None and name not in self.links:
            link = self.links[name] = self.client.invite(trusted=name == "worker-1")
        chosen = {
            "name": name,
            "threads": "1",
            "listen": "tcp://127.0.0.1:*",
            "cache_dir": str(self.cache_of(name)),
            "connect_timeout_s": "10",
            **settings,
        }
        child = start_worker(chosen, link or "", self.folder / name / "state", self.folder / name / "log")
        self.workers[name] = child
        self._all.append(child)
        return child

    def start_stranger(self, link: str, **settings: str) -> tuple[int, str]:
        """Start a worker that is not let in; return its exit code and what it said once it has ended by itself."""
        child = self.start("stranger", link, **settings)
        del self.workers["stranger"]
        return child.process.wait(DEADLINE_S), child.log_tail()

    def stop(self, name: str) -> None:
        """Ask a worker to end, and wait until it is gone."""
        self.workers[name].process.terminate()
        self.workers[name].process.wait(DEADLINE_S)

    def kill(self, name: str) -> None:
        """End a worker without a word to anybody, and wait until it is gone."""
        self.workers[name].process.kill()
        self.workers[name].process.wait(DEADLINE_S)

    def until_ready(self) -> Status:
        """Wait until the plan is served; fails with the words of a process that ended."""
        return wait_until_ready(self.client, {"coordinator": self.coordinator.child, **self.workers}, DEADLINE_S)

    def until_whole(self) -> Status:
        """Wait until the plan is served as it was asked for, with every seat taken."""
        return self.until(
            lambda status: status["phase"] == "ready" and status["plan"]["words"] == self._settings["plan"]
        )

    def until(self, holds: Callable[[Status], object]) -> Status:
        """Wait until something is true of the status."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            status = self.client.status()
            if holds(status):
                return status
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true; the last status: {status}")
            time.sleep(POLL_S)

    def fetched_bytes(self, name: str) -> int:
        """Bytes of tiles that came over the wire for the last plan this process of the worker loaded."""
        told = re.findall(r"Loaded\(.*?fetched_bytes=(\d+)", self.workers[name].log_path.read_text())
        if not told:
            raise AssertionError(f"{name} has not loaded anything:\n{self.workers[name].log_tail()}")
        return int(told[-1])


def worker_of(status: Status, name: str) -> dict[str, Any]:
    """The status of one worker."""
    return next(worker for worker in status["workers"] if worker["name"] == name)

"""A whole cluster on this machine: a coordinator and workers, each a process of its own, ended with the `with` block.

Knows nothing of how they find each other (`manyhands.launch`) or what they compute.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from manyhands.connection import Status
from manyhands.launch import Coordinator, OnStatus, start_coordinator, start_worker, wait_until_ready
from manyhands.processes import ChildProcess, stop_all
from manyhands.sync import Client
from protocol.errors import ConfigInvalid, RequestInvalid

DEMO_MODEL = Path(__file__).resolve().parent / "demo_model"
DEFAULT_WORKERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalWorker:
    """One worker process of a local cluster."""

    name: str
    child: ChildProcess

    @property
    def pid(self) -> int:
        """The process id."""
        return self.child.pid


class LocalCluster:
    """A coordinator and `workers` workers on this machine, ready when the constructor returns.

    `model`: folder or hub name, None for the small one that comes along. `plan`: who computes what, e.g. "1,1/1" for
    two workers that share the first layers and one with the rest (the first share is the head's, the others go to the
    workers in the order they join); None leaves it to the coordinator. `workers`: None
    means as many as the plan has shares. `dtype`: of the weights: auto (as stored), float32, bfloat16, int8 or int4.
    `memory`: what each worker process may take, e.g. "900MB"; weights that don't fit flow from its disk. `cache_dir`:
    where workers keep tiles between clusters; None keeps nothing. `startup_timeout_s` bounds the time without progress.
    `on_status` sees the status while the model forms.

    Raises the error that a process which ended at start told in its log, DeadlineExceeded when the model does not form.
    `close` ends all processes and removes all files.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        workers: int | None = None,
        plan: str | None = None,
        dtype: str = "float32",
        *,
        threads: int = 1,
        memory: str | None = None,
        cache_dir: Path | None = None,
        head_only: bool = False,
        startup_timeout_s: float = 60.0,
        on_status: OnStatus | None = None,
    ) -> None:
        num_workers = _num_workers(workers, plan)
        self._timeout_s = startup_timeout_s
        self._folder = Path(tempfile.mkdtemp(prefix="manyhands-"))
        self._children: dict[str, ChildProcess] = {}
        self._clients: list[Client] = []
        self._closed = False
        self.workers: tuple[LocalWorker, ...] = ()
        for_coordinator = {
            "model": str(model or DEMO_MODEL),
            "plan": plan or "auto",
            "workers": str(num_workers),
            "dtype": dtype,
            "head_only": str(head_only).lower(),
            "port": "0",
            "cache_dir": str(cache_dir / "coordinator" if cache_dir else self._folder / "manifests"),
        }
        for_workers = {
            "threads": str(threads),
            "cache_dir": str(cache_dir or self._folder / "tiles"),
            "listen": "tcp://127.0.0.1:*",
        } | ({"memory": memory} if memory else {})
        try:
            self._coordinator = self._start_coordinator(for_coordinator)
            self._control = self.client()
            for number in range(1, num_workers + 1):
                self._start_worker(f"worker-{number}", for_workers, trusted=number == 1)
            wait_until_ready(self._control, self._children, startup_timeout_s, on_status)
        except BaseException:
            self.close()
            raise

    @property
    def link(self) -> str:
        """The client link; it holds a secret."""
        return self._coordinator.link.format()

    def client(self, timeout_s: float = 10.0) -> Client:
        """Return a new client of this cluster; the cluster closes it at its own end."""
        client = Client(self._coordinator.link, timeout_s)
        self._clients.append(client)
        return client

    def status(self) -> Status:
        """Return what the cluster looks like."""
        return self._control.status()

    def wait_until_ready(self) -> Status:
        """Wait until the model has formed (again); raises DeadlineExceeded."""
        coordinator = {"coordinator": self._coordinator.child}
        return wait_until_ready(self._control, coordinator, self._timeout_s)

    def logs(self, name: str = "coordinator", lines: int = 50) -> str:
        """Return the end of the log of a worker, by name, or of the coordinator; raises RequestInvalid."""
        if name not in self._children:
            raise RequestInvalid(f"no process {name!r}; there are {', '.join(self._children)}")
        return self._children[name].log_tail(lines)

    def close(self) -> None:
        """End every process and remove every file; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        try:
            for client in self._clients:
                client.close()
        finally:
            stop_all(self._children.values())
            shutil.rmtree(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_coordinator(self, settings: dict[str, str]) -> Coordinator:
        def started(child: ChildProcess) -> None:
            self._children["coordinator"] = child

        folder, log = self._folder / "coordinator", self._folder / "coordinator.log"
        return start_coordinator(settings, folder, log, self._timeout_s, started)

    def _start_worker(self, name: str, settings: dict[str, str], *, trusted: bool) -> None:
        link = self._control.invite(trusted=trusted)
        log = self._folder / f"{name}.log"
        child = start_worker({**settings, "name": name}, link, self._folder / name, log)
        self._children[name] = child
        self.workers = (*self.workers, LocalWorker(name=name, child=child))


def _num_workers(workers: int | None, plan: str | None) -> int:
    shares = len(re.split("[,/]", plan)) if plan else 0
    if workers is None:
        return shares or DEFAULT_WORKERS
    if workers < 1:
        raise ConfigInvalid(f"workers {workers} must be at least 1")
    if shares > workers:
        raise ConfigInvalid(f"plan {plan!r} has {shares} shares, but there are only {workers} workers")
    return workers

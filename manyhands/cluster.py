"""A whole cluster on this machine: a coordinator and workers, each a process of its own, ended with the `with` block.

Knows nothing of how they find each other (`manyhands.launch`) or what they compute.
"""

from __future__ import annotations

import itertools
import logging
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from manyhands.connection import Status
from manyhands.keeper import Keeper
from manyhands.launch import Coordinator, OnStatus, start_coordinator, start_worker, wait_until_ready
from manyhands.processes import ChildProcess, stop_all
from manyhands.sync import Client
from protocol.errors import ConfigInvalid, DeadlineExceeded, ManyhandsError, RequestInvalid

DEMO_MODEL = Path(__file__).resolve().parent / "demo_model"
DEFAULT_WORKERS = 3
COORDINATOR = "coordinator"
HEAD = "worker-1"
LOOK_EVERY_S = 0.1
HAND_OVER_S = 60.0  # a worker gives up waiting for its leave before
_log = logging.getLogger(__name__)


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
    `on_status` sees the status while the model forms. `supervise`: the head's process, worker-1, is started again when
    it dies. `coordinator_settings`, `worker_settings`: further settings of the daemons, by name.

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
        supervise: bool = True,
        coordinator_settings: Mapping[str, str] | None = None,
        worker_settings: Mapping[str, str] | None = None,
    ) -> None:
        num_workers = _num_workers(workers, plan)
        self._timeout_s = startup_timeout_s
        self._folder = Path(tempfile.mkdtemp(prefix="manyhands-"))
        self._children: dict[str, ChildProcess] = {}
        self._clients: list[Client] = []
        self._closed = False
        self._links: dict[str, str] = {}  # of the workers, in the order in which they came
        self._own_settings: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()  # held while a process is replaced
        self._ending = threading.Event()
        self._supervisor: threading.Thread | None = None
        self._for_coordinator = {
            "model": str(model or DEMO_MODEL),
            "plan": plan or "auto",
            "workers": str(num_workers),
            "dtype": dtype,
            "head_only": str(head_only).lower(),
            "port": "0",
            "cache_dir": str(cache_dir / "coordinator" if cache_dir else self._folder / "manifests"),
            **(coordinator_settings or {}),
        }
        self._for_workers = {
            "threads": str(threads),
            "cache_dir": str(cache_dir or self._folder / "tiles"),
            "listen": "tcp://127.0.0.1:*",
            **({"memory": memory} if memory else {}),
            **(worker_settings or {}),
        }
        try:
            self._coordinator = self._start_coordinator()
            self._control = self.client()
            for number in range(1, num_workers + 1):
                self.add_worker(trusted=number == 1)
            wait_until_ready(self._control, self._children, startup_timeout_s, on_status)
            if supervise:
                self._supervisor = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
                self._supervisor.start()
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> tuple[LocalWorker, ...]:
        """The workers and their latest processes, in the order in which they came."""
        return tuple(LocalWorker(name=name, child=self._children[name]) for name in self._links)

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
        coordinator = {COORDINATOR: self._coordinator.child}
        return wait_until_ready(self._control, coordinator, self._timeout_s)

    def logs(self, name: str = COORDINATOR, lines: int = 50) -> str:
        """Return the end of the log of a worker, by name, or of the coordinator; raises RequestInvalid."""
        return self._child(name).log_tail(lines)

    def kill(self, name: str) -> None:
        """End a worker, or the coordinator, without a word to anybody (SIGKILL); raises RequestInvalid.

        The head comes back by itself where it is supervised.
        """
        self._child(name).kill()

    def stop_worker(self, name: str) -> None:
        """Have a worker hand over what it does and end (SIGTERM), and wait until it is gone.

        Raises RequestInvalid, DeadlineExceeded.
        """
        child = self._child(name)
        child.process.terminate()
        try:
            child.process.wait(HAND_OVER_S)
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded(f"{name} has not ended within {HAND_OVER_S:g} s", node=name, phase="stop") from None

    def add_worker(
        self, name: str = "", *, trusted: bool = False, settings: Mapping[str, str] | None = None
    ) -> LocalWorker:
        """Start one more worker; `name` empty: the next number. `settings`: of its own, before those of all workers.

        Raises RequestInvalid when the name is taken.
        """
        numbers = (f"worker-{number}" for number in itertools.count(1))
        name = name or next(free for free in numbers if free not in self._links)
        if name in self._children:
            raise RequestInvalid(f"there is a process {name!r} already", remedy="restart_worker starts it again")
        link = self._control.invite(trusted=trusted)
        with self._lock:
            self._own_settings[name] = dict(settings or {})
            self._start_worker(name, link)
            self._links[name] = link
        return LocalWorker(name=name, child=self._children[name])

    def restart_worker(self, name: str) -> LocalWorker:
        """Start a worker again, as the same one with the tiles it has; one that still runs is asked to end before."""
        child = self._child(name)
        if name not in self._links:
            raise RequestInvalid(f"{name!r} is no worker", remedy="use restart_coordinator")
        with self._lock:
            stop_all([child])
            self._start_worker(name, self._links[name])
        return LocalWorker(name=name, child=self._children[name])

    def restart_coordinator(self) -> None:
        """Kill the coordinator, if it still runs, and start it again with what it has kept, at the same address."""
        self._child(COORDINATOR).kill()
        self._for_coordinator["port"] = self._coordinator.link.addresses[0].rpartition(":")[2]
        self._coordinator = self._start_coordinator()

    def close(self) -> None:
        """End every process and remove every file; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._ending.set()
        if self._supervisor is not None:
            self._supervisor.join()
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

    def _child(self, name: str) -> ChildProcess:
        if name not in self._children:
            raise RequestInvalid(f"no process {name!r}; there are {', '.join(self._children)}")
        return self._children[name]

    def _start_coordinator(self) -> Coordinator:
        def started(child: ChildProcess) -> None:
            self._children[COORDINATOR] = child

        folder, log = self._folder / COORDINATOR, self._folder / f"{COORDINATOR}.log"
        settings, again = self._for_coordinator, COORDINATOR in self._children
        return start_coordinator(settings, folder, log, self._timeout_s, started, continues_log=again)

    def _start_worker(self, name: str, link: str) -> None:
        settings = {**self._for_workers, **self._own_settings[name], "name": name}
        log = self._folder / f"{name}.log"
        again = name in self._children
        self._children[name] = start_worker(settings, link, self._folder / name, log, continues_log=again)

    def _supervise(self) -> None:
        """Keep the head running, in a thread, until the cluster is closed."""

        def start() -> None:
            self._start_worker(HEAD, self._links[HEAD])

        keeper = Keeper(HEAD, lambda: self._children[HEAD], start, _log.warning)
        while not self._ending.wait(LOOK_EVERY_S):
            with self._lock:
                try:
                    keeper.look(time.monotonic())
                except ManyhandsError:
                    _log.exception("%s is not started again", HEAD)


def _num_workers(workers: int | None, plan: str | None) -> int:
    shares = len(re.split("[,/]", plan)) if plan else 0
    if workers is None:
        return shares or DEFAULT_WORKERS
    if workers < 1:
        raise ConfigInvalid(f"workers {workers} must be at least 1")
    if shares > workers:
        raise ConfigInvalid(f"plan {plan!r} has {shares} shares, but there are only {workers} workers")
    return workers

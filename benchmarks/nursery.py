"""Worker processes in a tenth of a second: one process has everything imported, and each worker is a fork of it.

Knows nothing of clusters. What comes out is a process like any other, with its own folders, settings and log; only the
second and a half of importing torch is paid once, which is what lets a test kill hundreds of them.

`Nursery` is this side. The other is `python -m benchmarks.nursery FD`, which ends when this side closes the socket.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

from manyhands.processes import PACKAGES, ChildProcess
from protocol.heap import steady_environment
from protocol.settings import ENV_PREFIX

MAX_ORDER_BYTES = 65_536
ANSWER_S = 60.0  # for the first order, which waits for the imports
LOOK_S = 0.05


class Nursery:
    """The parent of all workers of a test run; used from several threads. `close` ends every child."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
        own = steady_environment(own)
        self._env = own | {"PYTHONPATH": str(PACKAGES), "PYTHONUNBUFFERED": "1", "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "benchmarks.nursery", str(theirs.fileno())],
                env=self._env, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        self._lock = threading.Lock()
        self._pids: list[int] = []
        self._codes: dict[int, int] = {}

    def start(self, settings: Mapping[str, str], log_path: Path) -> Nursling:
        """Start a worker with these settings; its output goes to `log_path`."""
        return Nursling(self, settings, log_path)

    def born(self, settings: Mapping[str, str], log_fd: int, stdin_fd: int) -> int:
        """Have a child made and return its process id."""
        env = self._env | {ENV_PREFIX + name.upper(): value for name, value in settings.items()}
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(env).encode()], [log_fd, stdin_fd])
            known = len(self._pids)
            deadline = time.monotonic() + ANSWER_S
            while len(self._pids) == known:
                if not self._hear(deadline - time.monotonic()):
                    raise TimeoutError(f"no child within {ANSWER_S:g} s")
            return self._pids[-1]

    def code_of(self, pid: int, timeout_s: float = 0.0) -> int | None:
        """Return a child's exit code (minus the signal that ended it); None while it runs."""
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                while pid not in self._codes and self._hear(0.0):
                    pass
                if pid in self._codes or time.monotonic() >= deadline:
                    return self._codes.get(pid)
            select.select([self._socket], [], [], min(LOOK_S, max(0.0, deadline - time.monotonic())))

    def living(self) -> list[int]:
        """Return the process ids of the children that run."""
        return [pid for pid in self._pids if self.code_of(pid) is None]

    def close(self) -> None:
        """Kill what still runs, and end the other side."""
        for pid in self.living():
            os.kill(pid, signal.SIGKILL)
            self.code_of(pid, ANSWER_S)
        self._socket.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hear(self, timeout_s: float) -> bool:
        """Take in one piece of news; False when none came."""
        if not select.select([self._socket], [], [], max(0.0, timeout_s))[0]:
            return False
        news = self._socket.recv(MAX_ORDER_BYTES)
        if not news:
            raise ChildProcessError("the process that starts workers has ended")
        pid, code = json.loads(news)
        if code is None:
            self._pids.append(pid)
        else:
            self._codes[pid] = code
        return True


class Nursling(ChildProcess):
    """A worker from the nursery, with the face of a child process of ours."""

    def __init__(self, nursery: Nursery, settings: Mapping[str, str], log_path: Path) -> None:
        self.module = "worker"
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        theirs, ours = os.pipe()
        with os.fdopen(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as log:
            self._log_start = os.fstat(log.fileno()).st_size
            pid = nursery.born(settings, log.fileno(), theirs)
        os.close(theirs)
        self.process: Any = _Process(nursery, pid, ours)


class _Process:
    """What `subprocess.Popen` offers, for a child of another process."""

    def __init__(self, nursery: Nursery, pid: int, stdin: int) -> None:
        self._nursery = nursery
        self.pid = pid
        self.stdin = os.fdopen(stdin, "wb")

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._nursery.code_of(self.pid)

    def wait(self, timeout: float = 3600.0) -> int:
        code = self._nursery.code_of(self.pid, timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"worker {self.pid}", timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# ---------------------------------------------------------------- the other side


def _serve(orders: socket.socket) -> None:
    """Fork a worker for each order and tell what became of each, until the orders end."""
    import gc

    import worker.__main__
    import worker.daemon  # noqa: F401  brings torch along

    gc.collect()
    gc.freeze()  # the children share these pages
    wake, woken = os.pipe()
    for end in (wake, woken):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken)
    sources: list[socket.socket | int] = [orders, wake]
    while True:
        ready, _, _ = select.select(sources, [], [])
        if wake in ready:
            os.read(wake, 4096)
            _tell_ends(orders)
        if orders in ready:
            order, fds, _, _ = socket.recv_fds(orders, MAX_ORDER_BYTES, 2)
            if not order:
                return
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for fd in (wake, woken, orders.fileno()):
                    os.close(fd)
                _be_worker(json.loads(order), *fds)
            for fd in fds:
                os.close(fd)
            orders.send(json.dumps([pid, None]).encode())


def _tell_ends(orders: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # none is left
            return
        if pid == 0:
            return
        orders.send(json.dumps([pid, os.waitstatus_to_exitcode(status)]).encode())


def _be_worker(env: dict[str, str], log_fd: int, stdin_fd: int) -> NoReturn:
    from worker.__main__ import main

    code = 1
    try:
        os.setsid()
        for fd, number in ((stdin_fd, 0), (log_fd, 1), (log_fd, 2)):
            os.dup2(fd, number)
        for fd in (stdin_fd, log_fd):
            os.close(fd)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = ["worker"]
        code = main()
    except BaseException:  # noqa: BLE001  the edge of the process: what a daemon can't say by its exit code stands in its log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))

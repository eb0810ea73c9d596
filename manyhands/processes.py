"""Daemons as child processes: started with their settings in the environment, watched, and always ended.

Knows nothing of what the daemons do. A child's standard input is its life line: it ends itself when the pipe closes,
so that none outlives a parent that was killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from protocol import exits
from protocol.errors import (
    AccessRefused,
    CheckpointInvalid,
    ConfigInvalid,
    CoordinatorLost,
    InvariantBroken,
    ManyhandsError,
    PeerLost,
    StorageFailed,
    StorageFull,
)
from protocol.heap import steady_environment
from protocol.logs import redact
from protocol.settings import ENV_PREFIX

PACKAGES = Path(__file__).resolve().parent.parent
WORKER = "worker"  # the module whose process holds memory for steps
STOP_GRACE_S = 8.0
TAIL_BYTES = 16_384


class ChildProcess:
    """One running `python -m MODULE`; its standard output and error go to a log file.

    `settings` are keyed by setting name. They travel in the environment, where no other user can read a secret; what
    this process has in its own MANYHANDS_ variables is not handed down. `continues_log`: behind what an earlier child
    has logged there.
    """

    def __init__(
        self, module: str, settings: Mapping[str, str], log_path: Path, *, continues_log: bool = False
    ) -> None:
        self.module = module
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beginning = os.O_APPEND if continues_log else os.O_TRUNC
        with os.fdopen(os.open(log_path, os.O_WRONLY | os.O_CREAT | beginning, 0o600), "wb") as log:
            self._log_start = os.fstat(log.fileno()).st_size
            environment = _environment(settings)
            # -P: a folder called `worker` where the user happens to stand must not shadow ours.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", module],
                env=steady_environment(environment) if module == WORKER else environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone; we end the children in order
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def log_bytes(self) -> int:
        """Return how much it has logged: life that others can't see yet."""
        return self.log_path.stat().st_size

    def log_tail(self, lines: int = 20) -> str:
        """Return the last lines of what it has logged, link secrets blacked out."""
        with self.log_path.open("rb") as log:
            log.seek(max(self._log_start, self.log_bytes() - TAIL_BYTES))
            text = log.read(TAIL_BYTES).decode("utf-8", "replace")
        return redact("\n".join(text.splitlines()[-lines:]))

    def require_alive(self, name: str) -> None:
        """Raise the error of `child_error` when it has ended."""
        if not self.is_alive:
            raise child_error(self, name)

    def kill(self) -> None:
        """End it without a word (SIGKILL) and wait until it is gone."""
        self.process.kill()
        self.process.wait()
        self.ask_to_stop()  # closes our end of its life line

    def ask_to_stop(self) -> None:
        """Tell it to end: SIGTERM, and the life line is cut."""
        if self.is_alive:
            self.process.terminate()
        if self.process.stdin is not None:
            self.process.stdin.close()


# What a daemon's exit code says about why it ended; anything else is a loss.
_REASONS: Mapping[int, type[ManyhandsError]] = {
    exits.CONFIG: ConfigInvalid,
    exits.DATA: CheckpointInvalid,
    exits.CANT_CREATE: StorageFull,
    exits.IO: StorageFailed,
    exits.REFUSED: AccessRefused,
    exits.SOFTWARE: InvariantBroken,
}


def child_error(child: ChildProcess, name: str) -> ManyhandsError:
    """Return the error that tells why a daemon of ours ended, in its own words, or with the end of its log."""
    code = child.process.returncode
    loss = CoordinatorLost if child.module == "coordinator" else PeerLost
    tail = child.log_tail()
    said = _last_line(tail, "error: ")
    how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with code {code}"
    return _REASONS.get(code, loss)(
        f"{name} {how}" + (f": {said}" if said else ""),
        remedy=_last_line(tail, "remedy: ") or (f"the end of its log:\n{tail}" if tail else ""),
        node=name,
        phase="start",
    )


def stop_all(children: Iterable[ChildProcess], grace_s: float = STOP_GRACE_S) -> None:
    """End all children: asked at once, killed after `grace_s` seconds in all; returns when all are gone."""
    running = list(children)
    for child in running:
        child.ask_to_stop()
    deadline = time.monotonic() + grace_s
    for child in running:
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    paths = [str(PACKAGES), *filter(None, own.get("PYTHONPATH", "").split(os.pathsep))]
    own["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    own["PYTHONUNBUFFERED"] = "1"
    return own | {ENV_PREFIX + name.upper(): value for name, value in settings.items()}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name
        return f"signal {number}"


def _last_line(tail: str, beginning: str) -> str:
    found = [line.removeprefix(beginning) for line in tail.splitlines() if line.startswith(beginning)]
    return found[-1] if found else ""

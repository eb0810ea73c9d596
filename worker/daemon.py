"""Runs a worker as a process, until it is told to end.

Knows nothing of what a worker does.
"""

from __future__ import annotations

from protocol.process import run_loop, told_to_stop
from worker.config import WorkerConfig
from worker.control import Control


def run(config: WorkerConfig) -> int:
    """Work until SIGINT, SIGTERM or, where asked for, the end of standard input; returns the exit code 0.

    What this worker does is handed over before, unless the signal comes twice or standard input has ended.

    Call it in the main thread. Raises what `Control` raises.
    """
    run_loop(_work_until_told(config))
    return 0


async def _work_until_told(config: WorkerConfig) -> None:
    control = Control(config)
    with told_to_stop(control.leave, watch_stdin=config.exit_on_stdin_close, at_once=control.stop):
        await control.serve()

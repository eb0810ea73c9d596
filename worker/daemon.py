"""Runs a worker as a process, until it is told to end.

Knows nothing of what a worker does.
"""

from __future__ import annotations

from protocol.process import run_loop, told_to_stop
from worker.config import WorkerConfig
from worker.control import Control


def run(config: WorkerConfig) -> int:
    """Work until SIGINT, SIGTERM or, where asked for, the end of standard input; returns the exit code 0.

    Call it in the main thread. Raises what `Control` raises.
    """
    run_loop(_work_until_told(config))
    return 0


async def _work_until_told(config: WorkerConfig) -> None:
    control = Control(config)
    with told_to_stop(control.stop, watch_stdin=config.exit_on_stdin_close):
        await control.serve()

"""Runs a coordinator as a process, until it is told to end.

Knows nothing of what a coordinator does.
"""

from __future__ import annotations

import asyncio

from coordinator.config import CoordinatorConfig
from coordinator.daemon import Callbacks, serve
from protocol.process import run_loop, told_to_stop


def run_process(config: CoordinatorConfig, callbacks: Callbacks | None = None) -> int:
    """Serve until SIGINT, SIGTERM or, where asked for, the end of standard input; returns the exit code 0.

    Call it in the main thread. Raises what `serve` raises.
    """
    run_loop(_serve_until_told(config, callbacks))
    return 0


async def _serve_until_told(config: CoordinatorConfig, callbacks: Callbacks | None) -> None:
    stop = asyncio.Event()
    with told_to_stop(lambda _: stop.set(), watch_stdin=config.exit_on_stdin_close):
        await serve(config, stop, callbacks)

"""Runs a worker as a process: event loop, signals, the end of standard input.

Knows nothing of what a worker does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable

from worker.config import WorkerConfig
from worker.control import Control

STDIN = 0
_log = logging.getLogger(__name__)


def run(config: WorkerConfig) -> int:
    """Work until SIGINT, SIGTERM or, where asked for, the end of standard input; returns the exit code 0.

    Call it in the main thread. Raises what `Control` raises.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_work_until_told(config))
    return 0


async def _work_until_told(config: WorkerConfig) -> None:
    loop, control = asyncio.get_running_loop(), Control(config)
    handled: list[signal.Signals] = []
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, control.stop, number.name)
            handled.append(number)
        if config.exit_on_stdin_close:
            _watch_stdin(lambda: loop.call_soon_threadsafe(control.stop, "standard input was closed"))
        await control.serve()
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


def _watch_stdin(on_close: Callable[[], object]) -> None:
    """Call `on_close` when standard input ends. A thread, because an event loop can't watch a file or /dev/null."""

    def watch() -> None:
        try:
            while os.read(STDIN, 4096):
                pass
        except OSError as error:
            _log.warning("standard input can't be read: %s", error)
        try:
            on_close()
        except RuntimeError:  # the loop has ended before standard input did
            _log.debug("standard input ended after the worker")

    threading.Thread(target=watch, name="stdin", daemon=True).start()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # no wheel for this platform; asyncio's own loop is slower, nothing else
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory

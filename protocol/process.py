"""Runs a daemon as a process: event loop (uvloop where there is one), signals, the end of standard input.

Knows nothing of what the daemon does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

STDIN = 0
ENDING = (signal.SIGINT, signal.SIGTERM)
_log = logging.getLogger(__name__)


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end in a loop of its own; call it in the main thread."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(main)


@contextmanager
def told_to_stop(
    stop: Callable[[str], None], *, watch_stdin: bool, at_once: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Within the running loop, call `stop` with the reason at SIGINT, SIGTERM or, if watched, the end of stdin.

    `at_once` is called instead when stdin ends: whoever held it is gone, and nobody waits for an orderly end.
    """
    loop = asyncio.get_running_loop()
    handled: list[signal.Signals] = []
    try:
        for number in ENDING:
            loop.add_signal_handler(number, stop, number.name)
            handled.append(number)
        if watch_stdin:
            _watch_stdin(lambda: loop.call_soon_threadsafe(at_once or stop, "standard input was closed"))
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


def end_quietly_when_told() -> None:
    """From the first line of a daemon on: end with exit code 0 at SIGTERM, until `told_to_stop` takes over.

    Importing torch takes seconds, and a daemon that has not begun has nothing to hand over or clean up.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


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
            _log.debug("standard input ended after the daemon")

    threading.Thread(target=watch, name="stdin", daemon=True).start()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # no wheel for this platform; asyncio's own loop is slower, nothing else
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory

"""The ring at work: one loader thread reads blocks ahead into slots, the computing thread takes them in turn.

Knows nothing of what a block means, or of how it gets into a slot (`runtime.slots`). What to read next is decided by
`runtime.window`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from protocol.errors import DeadlineExceeded, ManyhandsError
from runtime.slots import Slots
from runtime.window import Read, Window, WindowPlan

READ_DEADLINE_S = 30.0


class StreamCounts(NamedTuple):
    """What has flowed since the start: bytes read, seconds of reading, seconds the computing thread stood waiting."""

    read_bytes: int
    read_s: float
    stalled_s: float


class Ring:
    """Slots and their loader thread. `acquire` and `release` are for one computing thread."""

    def __init__(self, plan: WindowPlan, slots: Slots, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin to read; the slots are closed with the ring."""
        self.slots = slots
        self._window = Window(plan.streamed, plan.num_slots)
        self._clock = clock
        self._changed = threading.Condition()
        self._failure: ManyhandsError | None = None
        self._closed = False
        self._counts = StreamCounts(0, 0.0, 0.0)
        self._loader = threading.Thread(target=self._load, name="window-loader", daemon=True)
        self._loader.start()

    def counts(self) -> StreamCounts:
        """Return what has flowed so far; may be called from any thread."""
        with self._changed:
            return self._counts

    def restart_counts(self) -> None:
        """Count anew."""
        with self._changed:
            self._counts = StreamCounts(0, 0.0, 0.0)

    def acquire(self, block: int) -> int:
        """Wait until `block` is read and return its slot; it stays valid until `release`.

        Raises StorageFailed when it can't be read, DeadlineExceeded when nothing was read for 30 seconds.
        """
        with self._changed:
            self._window.seek(block)
            self._changed.notify_all()
            slot = self._window.ready_slot()
            began = self._clock()
            while slot is None:
                self._wait_for_progress(block)
                slot = self._window.ready_slot()
            waited = self._clock() - began
            if waited > 0:
                self._counts = self._counts._replace(stalled_s=self._counts.stalled_s + waited)
            return slot

    def release(self) -> None:
        """The block that was acquired is computed; its slot is read into again."""
        with self._changed:
            self._window.release()
            self._changed.notify_all()

    def close(self) -> None:
        """End the loader and close the slots."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._loader.join()
        self.slots.close()

    def _wait_for_progress(self, block: int) -> None:
        """One wait for the loader; its deadline starts anew with every piece that is read."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            self._changed.notify_all()
            raise failure
        if not self._changed.wait(READ_DEADLINE_S):
            raise DeadlineExceeded(
                f"block {block} was not read from {self.slots.path(block)} within {READ_DEADLINE_S:.0f} s",
                phase="window",
                remedy="check the disk that holds the cache (--cache-dir)",
            )

    def _load(self) -> None:
        """The loader thread: take an order, read outside the lock, tell."""
        while (order := self._next_order()) is not None:
            began, num_bytes = self._clock(), 0
            failure: ManyhandsError | None = None
            try:
                num_bytes = self.slots.fill(order.block, order.slot, self._progress)
            except ManyhandsError as error:
                failure = error
            self._tell(num_bytes, self._clock() - began, failure)

    def _progress(self) -> None:
        """A piece of a block is read: who waits for it waits on."""
        with self._changed:
            self._changed.notify_all()

    def _next_order(self) -> Read | None:
        with self._changed:
            while not self._closed:
                # After a failure nothing is read until the computing thread has been told and asks again.
                order = self._window.next_read() if self._failure is None else None
                if order is not None:
                    return order
                self._changed.wait()
            return None

    def _tell(self, num_bytes: int, took_s: float, failure: ManyhandsError | None) -> None:
        with self._changed:
            if failure is None:
                self._window.read_done()
                counts = self._counts
                self._counts = counts._replace(read_bytes=counts.read_bytes + num_bytes, read_s=counts.read_s + took_s)
            else:
                self._window.read_failed()
                self._failure = failure
            self._changed.notify_all()

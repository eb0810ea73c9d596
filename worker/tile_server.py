"""Serves this worker's tiles to other workers: one listener and one thread, beside all else that the worker does.

Knows nothing of plans. Whom it lets in and which tiles it may hand out it is told (`admit`, `offer`). The tiles of
embedding, final norm and lm_head are for the coordinator alone to give, to the head alone: nobody gets them here.

It reads one range at a time, at low priority, so that a neighbour's fetch disturbs neither steps nor heartbeats, and
holds at most a few chunks for each connection: one that does not take them is passed by until it does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Final

import zmq

from protocol.errors import FrameMalformed, ManyhandsError, ProtocolViolation, TileUnavailable
from protocol.frames import decode, encode
from protocol.messages import ErrorReport, TileChunk, TileRequest
from protocol.security import Gate, KeyPair
from protocol.tiles import HEAD_KINDS, TileEntry
from protocol.transport import Envelope, bind_router, envelope_of
from worker.store import TileStore
from worker.tile_queue import TileQueue, Waiting
from worker.waker import Waker

MAX_REQUEST_BYTES: Final = 4096
MAX_UNSENT: Final = 4  # chunks that one connection may leave with us before it is passed by
MAX_TAKEN: Final = 64  # messages read in a row before the next chunk is served
OPEN_DEADLINE_S: Final = 10.0
CLOSE_DEADLINE_S: Final = 5.0
NICENESS: Final = 10
_log = logging.getLogger(__name__)


class TileServer:
    """The listener. `admit`, `offer` and `close` may be called from any thread; `num_served_bytes` only grows."""

    def __init__(self, keys: KeyPair, listen: str, store: TileStore) -> None:
        """Listen, e.g. on "tcp://0.0.0.0:*"; raises ConfigInvalid when that is not possible."""
        self._store = store
        self._admitted: frozenset[bytes] = frozenset()
        self._offered: dict[bytes, TileEntry] = {}
        self._private: set[bytes] = set()
        self._queue = TileQueue()
        self._waker = Waker()
        self._is_closing = False
        self.num_served_bytes = 0
        self.num_refused = 0
        opened: Future[str] = Future()
        self._thread = threading.Thread(target=self._run, args=(keys, listen, opened), name="tile-server", daemon=True)
        self._thread.start()
        try:
            self.address = opened.result(OPEN_DEADLINE_S)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------ from any thread

    def admit(self, keys: Iterable[bytes]) -> None:
        """Serve these keys and no others."""
        self._admitted = frozenset(keys)

    def offer(self, entries: Iterable[TileEntry]) -> None:
        """Hand out these tiles too, once they are on disk.

        Nothing else in the store is ever handed out: it also holds blocks, of the lm_head too, whose names say nothing.
        """
        offered = dict(self._offered)
        for entry in entries:
            if entry.tile.kind in HEAD_KINDS:
                self._private.add(entry.digest)
            else:
                offered[entry.digest] = entry
        self._offered = offered  # replaced as a whole: the serving thread reads it without a lock

    def close(self) -> None:
        """Stop serving and wait for the thread; harmless when it is closed."""
        self._is_closing = True
        self._waker.wake()
        self._thread.join(CLOSE_DEADLINE_S)
        if self._thread.is_alive():
            _log.warning("the tile server is still reading; it ends with the process")
            return
        self._waker.close()

    # ------------------------------------------------------------ in the thread

    def _run(self, keys: KeyPair, listen: str, opened: Future[str]) -> None:
        _give_way()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()  # its threads are born here and give way as well
        try:
            with Gate(context, lambda key: key in self._admitted):
                router, address = bind_router(context, keys, listen, MAX_REQUEST_BYTES, send_hwm=MAX_UNSENT)
                opened.set_result(address)
                with contextlib.closing(router):
                    self._serve(router)
        except Exception as error:  # noqa: BLE001  the edge of this thread: without tiles to serve a worker computes
            if opened.done():
                _log.exception("the tile server broke: neighbours must fetch elsewhere until this worker is restarted")
            else:
                opened.set_exception(error)
        finally:
            context.destroy(linger=0)

    def _serve(self, router: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(router, zmq.POLLIN)
        poller.register(self._waker.fileno(), zmq.POLLIN)
        while not self._is_closing:
            wait_s = self._queue.wait_s(time.monotonic())
            poller.poll(None if wait_s is None else -int(-wait_s * 1000 // 1))
            self._waker.clear()
            self._take_requests(router)
            waiting = self._queue.next(time.monotonic())
            if waiting is not None:
                self._answer(router, waiting)

    def _take_requests(self, router: zmq.Socket[bytes]) -> None:
        for _ in range(MAX_TAKEN):
            try:
                envelope = envelope_of(router.recv_multipart(zmq.NOBLOCK, copy=False))
            except zmq.Again:
                return
            self._take(router, envelope)

    def _take(self, router: zmq.Socket[bytes], envelope: Envelope) -> None:
        if envelope.public_key not in self._admitted:  # let in once, and no longer a member
            self.num_refused += 1
            return
        try:
            asked = decode(envelope.frames).message
            if not isinstance(asked, TileRequest):
                raise ProtocolViolation(f"{type(asked).__name__} came where a TileRequest belongs", phase="serve")
            waiting = Waiting(envelope.public_key, envelope.routing_id, asked)
        except ProtocolViolation as error:
            self._refuse(router, envelope.routing_id, error, b"")
            return
        error_found = self._queue.add(waiting)
        if error_found is not None:
            self._refuse(router, waiting.route, error_found, asked.digest)

    def _answer(self, router: zmq.Socket[bytes], waiting: Waiting) -> None:
        asked = waiting.asked
        if not waiting.frames:
            try:
                chunk = TileChunk(digest=asked.digest, offset=asked.offset)
                waiting.frames = encode(chunk, self._read(asked))
            except (ManyhandsError, OSError) as error:
                _log.warning("tile %s can't be served: %s", asked.digest.hex()[:16], error)
                self._refuse(router, waiting.route, TileUnavailable(f"not here: {error}"), asked.digest)
                self._queue.done(waiting)
                return
        try:
            router.send_multipart([waiting.route, *waiting.frames], zmq.NOBLOCK)
            self.num_served_bytes += asked.length
            self._queue.done(waiting)
        except zmq.Again:
            self._queue.hold(waiting, time.monotonic())
        except zmq.ZMQError as error:
            _log.debug("a neighbour no longer waits for tile %s: %s", asked.digest.hex()[:16], error.strerror)
            self._queue.forget(waiting.route)

    def _read(self, asked: TileRequest) -> bytes:
        """Return the bytes of a tile that was proven whole; raises TileUnavailable, FrameMalformed, OSError."""
        entry = self._offered.get(asked.digest)
        if entry is None or asked.digest in self._private:
            raise TileUnavailable("this worker does not offer it", phase="serve")
        if asked.offset + asked.length > entry.num_bytes:
            raise FrameMalformed(
                f"{entry.tile} has {entry.num_bytes} bytes; {asked.length} from {asked.offset} on were asked"
            )
        self._store.prove(entry)
        return self._store.read_range(entry, asked.offset, asked.length)

    def _refuse(self, router: zmq.Socket[bytes], route: bytes, error: ManyhandsError, digest: bytes) -> None:
        self.num_refused += 1
        with contextlib.suppress(zmq.ZMQError):  # gone, or it does not read: then it does not wait for this either
            router.send_multipart([route, *encode(ErrorReport.of(error, digest=digest))], zmq.NOBLOCK)


def _give_way() -> None:
    """Let the calling thread, and those it starts, run after the others; Linux knows this for one thread."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
